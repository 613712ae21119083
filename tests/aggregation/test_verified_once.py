"""A process that simulates many devices verifies once what all of them receive, and nothing passes for verified."""

import datetime as dt
from dataclasses import replace
from typing import Any

import pytest

from aggregation import checks, envelope
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Challenge, Offer, Roster, Unmask
from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.revocation import Revocation
from aggregation.session import COORDINATOR
from tests.support import FleetOf
from tests.support.fleet import BEGIN, END, CountedEntropy

NOW = BEGIN + dt.timedelta(days=1)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tag of each signature that was verified."""
    seen: list[str] = []
    real = PublicKey.verify

    def verify(self: PublicKey, tag: str, body: bytes, signature: bytes) -> None:
        seen.append(tag)
        real(self, tag, body, signature)

    monkeypatch.setattr(PublicKey, "verify", verify)
    return seen


def round_of(fleet: Any) -> None:
    session = fleet.establish()
    state, bodies = fleet.collect(session)
    fleet.open(*fleet.confirm(state, bodies))


def test_signatures_verified_in_a_round_grow_with_the_devices_and_not_with_their_square(
    fleet_of: FleetOf, verified: list[str]
) -> None:
    counts = []
    for devices in (6, 12):
        verified.clear()
        round_of(fleet_of(devices))
        counts.append(len(verified))
    assert counts[1] <= 2 * counts[0]


def test_all_devices_of_a_process_share_one_session(fleet_of: FleetOf) -> None:
    fleet = fleet_of(5)
    fleet.establish()
    assert len({id(state.session) for state in fleet.states.values()}) == 1


def test_a_message_that_was_opened_is_not_taken_from_another_signer_or_for_another_kind() -> None:
    key, other = (IdentityKey.generate(CountedEntropy(seed)) for seed in (1, 2))
    raw = envelope.sign(key, Challenge(bytes(32), 7))
    assert envelope.open_repeated(Challenge, raw, key.public, COORDINATOR) == Challenge(bytes(32), 7)
    for kind, body, signer in (
        (Challenge, raw, other.public),
        (Offer, raw, key.public),
        (Challenge, raw[:-1] + bytes([raw[-1] ^ 1]), key.public),
    ):
        with pytest.raises(ProtocolError):
            envelope.open_repeated(kind, body, key.public if signer is key.public else signer, COORDINATOR)
    assert envelope.open_repeated(Challenge, raw, key.public, COORDINATOR) == Challenge(bytes(32), 7)


def test_a_certificate_that_was_verified_still_expires_and_can_be_revoked() -> None:
    entropy = CountedEntropy(1)
    authority, stranger = (Authority.create("a", entropy, BEGIN, END) for _ in range(2))
    key = IdentityKey.generate(entropy)
    der = authority.issue("device-1", key.public, not_before=BEGIN, not_after=NOW)
    assert authority.root.verify(der, NOW) == ("device-1", key.public)
    with pytest.raises(TrustError, match="not valid at"):
        authority.root.verify(der, NOW + dt.timedelta(seconds=1))
    with pytest.raises(TrustError, match="pinned authority"):
        stranger.root.verify(der, NOW)
    from aggregation.pki.certificates import serial

    listed = authority.revocations(1, {serial(der): Revocation(NOW)}, NOW, END)
    with pytest.raises(TrustError, match="revoked"):
        replace(authority.root, revoked=listed).verify(der, NOW)


def test_a_roster_that_was_verified_is_not_taken_for_another_offer_cohort_or_advert(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4)
    state, offer = fleet.offer()
    for name in fleet.devices:
        state = state.on_advert(name, fleet.join(name, offer))
    _, raw = state.close()
    roster = Roster.decode(envelope.unverified_body(raw))
    checks.roster(state.spec, state.offer, state.cohort, roster)
    fewer = {name: key for name, key in state.cohort.items() if name != "device-000"}
    damaged = roster.adverts[0][:-1] + bytes([roster.adverts[0][-1] ^ 1])
    for wrong in (
        (state.spec, bytes(32), state.cohort, roster),
        (state.spec, state.offer, fewer, roster),
        (state.spec, state.offer, state.cohort, replace(roster, adverts=(damaged, *roster.adverts[1:]))),
        (replace(state.spec, rounds=2), state.offer, state.cohort, roster),
    ):
        with pytest.raises(ProtocolError):
            checks.roster(*wrong)


def test_consistency_signatures_that_were_verified_do_not_cover_another_signature_or_set(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4)
    state, bodies = fleet.confirm(*fleet.collect(fleet.establish()))
    message = Unmask.decode(envelope.unverified_body(next(iter(bodies.values()))))
    session, plan = state.survivor_set.session, state.survivor_set.plan
    survivors, signatures = message.survivors, message.consistency_signatures
    checks.consistency_signatures(session, plan, survivors, signatures)
    first, second = list(signatures)[:2]
    other = replace(survivors, vectors={**survivors.vectors, first: bytes(32)})
    for wrong in (
        (session, plan, survivors, {**signatures, first: signatures[second]}),
        (session, plan, other, signatures),
    ):
        with pytest.raises(ProtocolError):
            checks.consistency_signatures(*wrong)
