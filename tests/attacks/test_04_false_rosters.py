"""A roster with a replaced key, a replayed advert, or a device that the coordinator created."""

import dataclasses
import datetime as dt
from typing import Any

import pytest
from cryptography import x509

from aggregation import checks, client, envelope, masks, shamir, sharing
from aggregation.errors import ProtocolError
from aggregation.messages import Advert, Offer, Roster, Shares
from aggregation.pki import Authority, Root
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import Revocation
from aggregation.session import Peer, Session, commitment, context_of
from tests.support import FleetOf, refused

VICTIM = "device-002"
BEGIN, END = dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2036, 1, 1, tzinfo=dt.UTC)


@pytest.fixture
def fleet(fleet_of: FleetOf) -> Any:
    return fleet_of(5)


def advertised(fleet: Any) -> tuple[Any, dict[str, bytes], bytes]:
    """The advert of every device, and the offer."""
    state, offer = fleet.offer()
    return state, {name: fleet.join(name, offer) for name in fleet.devices}, offer


def roster_of(fleet: Any, offer: bytes, adverts: dict[str, bytes]) -> bytes:
    return envelope.sign(fleet.key, Roster(offer, tuple(raw for _, raw in sorted(adverts.items()))))


def forged(fleet: Any, raw: bytes, **changes: Any) -> bytes:
    """Another device's advert with keys of the coordinator in it, signed by the only key that the coordinator has."""
    body = dataclasses.replace(Advert.decode(envelope.unverified_body(raw)), **changes)
    return envelope.sign(fleet.key, body)


def test_an_advert_with_a_replaced_key_is_refused(fleet: Any) -> None:
    state, adverts, _ = advertised(fleet)
    adverts["device-001"] = forged(fleet, adverts["device-001"], share_key=masks.public_key(bytes(range(32))))
    with refused(ProtocolError, "signature", peer="device-001", value="advert"):
        fleet.share(VICTIM, roster_of(fleet, state.offer, adverts))


def test_with_signatures_unchecked_replaced_keys_reveal_secrets_of_the_victim(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, adverts, _ = advertised(fleet)
    private = {name: bytes([number]) * 32 for number, name in enumerate(sorted(adverts), 1) if name != VICTIM}
    for name, key in private.items():
        adverts[name] = forged(fleet, adverts[name], share_key=masks.public_key(key))
    monkeypatch.setattr(envelope, "verify", lambda *given: None)
    raw = roster_of(fleet, state.offer, adverts)
    shares = Shares.decode(envelope.unverified_body(fleet.share(VICTIM, raw)))
    session = session_of(fleet, state.offer, raw)
    pairs = {
        name: sharing.decrypt(session, masks.private_key(key), VICTIM, name, shares.encrypted_shares[name])
        for name, key in private.items()
    }
    holders = sorted(pairs)[: fleet.spec.threshold]
    seed = shamir.combine(
        shamir.lagrange(session.positions(holders)), [(pairs[name] or {})[1].seed for name in holders]
    )
    assert commitment(seed or b"", state.offer, VICTIM, 1) == session.peers[VICTIM].commitments[0]


def session_of(fleet: Any, offer: bytes, raw: bytes) -> Session:
    message = Roster.decode(envelope.unverified_body(raw))
    peers = {}
    for position, advert in enumerate(message.adverts, 1):
        a = Advert.decode(envelope.unverified_body(advert))
        identity = fleet.devices[a.device].identity.public
        peers[a.device] = Peer(a.device, position, identity, a.share_key, a.mask_keys, a.commitments)
    return Session(fleet.spec, offer, context_of(offer, message.digest()), peers)


def test_the_advert_of_the_victim_cannot_be_replaced_by_its_older_one(fleet: Any) -> None:
    state, offer = fleet.offer()
    adverts = {name: fleet.join(name, offer) for name in fleet.devices}
    older = adverts[VICTIM]
    fleet.join(VICTIM, offer)  # joins again, with new keys
    with refused(ProtocolError, "roster.self", peer="coordinator"):
        fleet.share(VICTIM, roster_of(fleet, state.offer, {**adverts, VICTIM: older}))


def test_a_roster_on_which_two_devices_have_one_key_is_refused(fleet: Any) -> None:
    state, adverts, _ = advertised(fleet)
    copied = Advert.decode(envelope.unverified_body(adverts["device-000"])).mask_keys
    corrupt = fleet.devices["device-004"].identity
    own = Advert.decode(envelope.unverified_body(adverts["device-004"]))
    adverts["device-004"] = envelope.sign(corrupt, dataclasses.replace(own, mask_keys=copied))
    with refused(ProtocolError, "roster.keys", peer="coordinator", value="device-004"):
        fleet.share(VICTIM, roster_of(fleet, state.offer, adverts))


def test_an_advert_of_an_older_session_is_refused(fleet: Any) -> None:
    _, old, _ = advertised(fleet)
    state, adverts, _ = advertised(fleet)
    with refused(ProtocolError, "advert.offer", peer="device-001"):
        fleet.share(VICTIM, roster_of(fleet, state.offer, {**adverts, "device-001": old["device-001"]}))


def test_with_its_offer_unchecked_a_replayed_advert_is_accepted(fleet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def signature_only(offer: bytes, rounds: int, signer: Any, device: str, raw: bytes) -> Advert:
        return envelope.open_verified(Advert, raw, signer, device)

    _, old, _ = advertised(fleet)
    state, adverts, _ = advertised(fleet)
    monkeypatch.setattr(checks, "advert", signature_only)
    fleet.share(VICTIM, roster_of(fleet, state.offer, {**adverts, "device-001": old["device-001"]}))


def with_a_sybil(fleet: Any) -> bytes:
    """An offer whose last member the coordinator created, with an authority of the same name."""
    own = Authority.create("test authority", fleet.entropy, BEGIN, END)
    sybil = own.issue("zed", IdentityKey.generate(fleet.entropy).public, not_before=BEGIN, not_after=END)
    _, offer = fleet.offer()
    message = envelope.open_verified(Offer, offer, fleet.key.public, "coordinator")
    certificates = (*message.certificates[:-1], sybil)
    return envelope.sign(fleet.key, dataclasses.replace(message, certificates=certificates))


def test_a_device_of_the_coordinators_own_making_is_refused(fleet: Any) -> None:
    with refused(ProtocolError, "certificate.issuer"):
        client.join(fleet.devices[VICTIM], with_a_sybil(fleet), fleet.entropy)


def test_with_certificates_unchecked_the_victim_joins_a_cohort_of_sybils(
    fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [*sorted(fleet.devices)[:-1], "zed"]
    keys = [fleet.devices[name].identity.public for name in names[:-1]] + [fleet.key.public]
    offer = with_a_sybil(fleet)
    monkeypatch.setattr(checks, "members", lambda *given: dict(zip(names, keys, strict=True)))
    state, _ = client.join(fleet.devices[VICTIM], offer, fleet.entropy)
    assert "zed" in state.cohort


def test_a_device_outside_the_cohort_cannot_be_put_on_the_roster(fleet: Any, fleet_of: FleetOf) -> None:
    state, adverts, _ = advertised(fleet)
    genuine = Advert.decode(envelope.unverified_body(adverts["device-004"]))
    adverts["zed"] = envelope.sign(fleet.key, dataclasses.replace(genuine, device="zed"))
    with refused(ProtocolError, "roster.members", peer="coordinator", value="zed"):
        fleet.share(VICTIM, roster_of(fleet, state.offer, adverts))


def test_a_revoked_member_stops_the_offer(fleet: Any) -> None:
    serial = x509.load_der_x509_certificate(fleet.devices["device-001"].certificate).serial_number
    begin, end = dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2027, 1, 1, tzinfo=dt.UTC)
    root = Root(fleet.authority.der, fleet.authority.revocations(1, {serial: Revocation(begin)}, begin, end))
    with refused(ProtocolError, "certificate.revoked", value="device-001"):
        client.join(dataclasses.replace(fleet.devices[VICTIM], root=root), fleet.offer()[1], fleet.entropy)
