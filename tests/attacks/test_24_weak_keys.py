"""Keys that anyone can sign for: points of small order on the curve, under which one signature fits every message.

With the neutral element as key A, the signature R = A, S = 0 satisfies S·B = R + h·A whatever the message is (Chalkias
et al. 2020, "Taming the many EdDSAs"). Whoever gets such a key certified is a device that everyone can speak for, and a
request for its certificate proves no possession. A device that pins it as the coordinator's obeys everyone.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregation import client, envelope, server
from aggregation.entropy import SystemEntropy
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Advert, Offer
from aggregation.pki import Authority, Root, identity, requests
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.server import Coordinator
from aggregation.steps import BODY, Step
from aggregation.transcript.entries import read
from client.node.statedir import AUTHORITY, CERTIFICATE, COORDINATOR
from edgeadapt.authority import AuthorityStore
from tests.client.node.conftest import refusals
from tests.client.node.test_app import FIRST, Talk, talk
from tests.conftest import fleet_of
from tests.support import FleetOf, refused
from tests.support.authority import store
from tests.support.fleet import BEGIN, END, make_fleet
from tests.support.hostile import audit_failures
from tests.support.trial import call

__all__ = ["fleet_of", "refusals", "store", "talk"]
VICTIM = "device-02"
NEUTRAL = (1).to_bytes(32, "little")
FORGED = NEUTRAL + bytes(32)  # the signature that fits every message
DAY = timedelta(days=1)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "_SMALL_ORDER", frozenset())


def weak_pem() -> bytes:
    key = Ed25519PublicKey.from_public_bytes(NEUTRAL)
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def weak_request(name: str) -> bytes:
    """A request for the weak key, in DER: another one's with the key and the signature exchanged."""
    honest = IdentityKey(bytes(range(32)))
    der = x509.load_pem_x509_csr(requests.request(honest, name)).public_bytes(serialization.Encoding.DER)
    return der[:-64].replace(honest.public.raw, NEUTRAL) + FORGED


def weak_certificate(authority: Authority, name: str) -> bytes:
    """A certificate for the weak key, as the authority issued it before it refused such keys."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.load_der_x509_certificate(authority.der).subject)
        .public_key(Ed25519PublicKey.from_public_bytes(NEUTRAL))
        .serial_number(7)
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    )
    signed = builder.sign(Ed25519PrivateKey.from_private_bytes(authority.key.raw), None)
    return signed.public_bytes(serialization.Encoding.DER)


# A request without proof of possession.


def test_nobody_can_have_a_weak_key_certified(store: AuthorityStore, tmp_path: Path) -> None:
    (tmp_path / "weak.csr").write_bytes(weak_request("kitchen"))
    (tmp_path / "weak.pem").write_bytes(weak_pem())
    with refused(TrustError, "key.small-order"):
        call("authority", "issue", store.folder, "--request", tmp_path / "weak.csr")
    with refused(TrustError, "key.small-order"):
        call("authority", "issue", store.folder, "--name", "kitchen", "--public-key", tmp_path / "weak.pem")
    assert not store.certificates()


def test_without_the_check_a_request_that_nobody_signed_is_certified(
    store: AuthorityStore, tmp_path: Path, unchecked: None
) -> None:
    (tmp_path / "weak.csr").write_bytes(weak_request("kitchen"))
    call("authority", "issue", store.folder, "--request", tmp_path / "weak.csr")
    ((issued, status),) = store.certificates()
    assert (issued.name, status) == ("kitchen", "valid")


def test_nobody_can_have_the_key_of_another_certified_and_without_the_check_everybody_can(
    store: AuthorityStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = IdentityKey(bytes(range(32))), IdentityKey(bytes(32)).public
    der = x509.load_pem_x509_csr(requests.request(mine, "kitchen")).public_bytes(serialization.Encoding.DER)
    (tmp_path / "stolen.csr").write_bytes(der.replace(mine.public.raw, theirs.raw))
    issue = ("authority", "issue", store.folder, "--request", tmp_path / "stolen.csr")
    with refused(TrustError, "request.signature"):
        call(*issue)
    assert not store.certificates()
    monkeypatch.setattr(requests, "x509", unsigned_requests())
    call(*issue)
    ((issued, _),) = store.certificates()
    assert (issued.name, issued.key) == ("kitchen", theirs.key_id)


def unsigned_requests() -> Any:
    """The library that reads requests, for which every request is signed."""

    def load(der: bytes) -> Any:
        asked = x509.load_der_x509_csr(der)
        kept = ("public_bytes", "public_key", "signature", "subject", "extensions")
        return SimpleNamespace(is_signature_valid=True, **{name: getattr(asked, name) for name in kept})

    return SimpleNamespace(load_der_x509_csr=load, InvalidVersion=x509.InvalidVersion)


# A device that everyone can speak for.


def with_weak_member(fleet: Any, name: str) -> bytes:
    """The coordinator's offer with a certificate of the weak key in the place of one device's."""
    offer = envelope.open_verified(Offer, fleet.offer()[1], fleet.key.public, "coordinator")
    members = [
        weak_certificate(fleet.authority, device) if device == name else each.certificate
        for device, each in sorted(fleet.devices.items())
    ]
    return envelope.sign(fleet.key, replace(offer, certificates=tuple(members)))


def test_an_offer_with_a_weak_member_is_refused_and_without_the_check_joined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet = make_fleet(8)
    offer = with_weak_member(fleet, "device-005")
    with refused(ProtocolError, "key.small-order"):
        client.join(fleet.devices["device-002"], offer, fleet.entropy)
    monkeypatch.setattr(identity, "_SMALL_ORDER", frozenset())
    client.join(fleet.devices["device-002"], offer, fleet.entropy)


def test_without_the_check_a_stranger_answers_for_a_weak_member(unchecked: None) -> None:
    fleet, name = make_fleet(8), "device-005"
    certificates = {device: each.certificate for device, each in fleet.devices.items()}
    certificates[name] = weak_certificate(fleet.authority, name)
    root, spec = fleet.authority.root, fleet.spec
    state, offer = server.open_session(Coordinator(fleet.key), root, spec, certificates, fleet.entropy)
    fleet.devices[name] = replace(fleet.devices[name], certificate=certificates[name], identity=Stranger())
    _, advert = client.join(fleet.devices[name], offer, fleet.entropy)
    assert name in state.on_advert(name, advert).adverts
    assert envelope.open_verified(Advert, advert, PublicKey(NEUTRAL), name).device == name


class Stranger:
    """Signs as a device with a weak key would, and knows no secret."""

    @property
    def public(self) -> PublicKey:
        return PublicKey(NEUTRAL)

    def sign(self, tag: str, body: bytes) -> bytes:
        return FORGED


@pytest.mark.parametrize("checked", [True, False])
def test_the_coordinators_app_admits_no_device_with_a_weak_key(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    fleet = fleet_of(8, rounds=1)
    authority = Authority.from_pem((fleet.out / "authority" / AUTHORITY).read_bytes())
    weak, real = weak_certificate(authority, VICTIM), client.check_in

    def check_in(key: IdentityKey, certificate: bytes, *given: Any, **named: Any) -> bytes:
        """A node of a stranger, who has the certificate and no secret."""
        raw = real(key, certificate, *given, **named)
        return raw[: -len(FORGED)] + FORGED if certificate == weak else raw

    monkeypatch.setattr(client, "check_in", check_in)
    (fleet.state_dir(VICTIM).folder / CERTIFICATE).write_bytes(weak)
    if not checked:
        monkeypatch.setattr(identity, "_SMALL_ORDER", frozenset())
    (record,) = fleet.federate(fleet.grid())
    (log,) = (fleet.out / "coordinator" / "transcript").glob("*.log")
    first = read(log.read_bytes()).entries[0]
    cohort = Offer.decode(envelope.unverified_body(first.message)).certificates
    assert len(cohort) == (7 if checked else 8)
    assert len(record.survivors) == 7
    monkeypatch.undo()
    assert audit_failures(fleet.out) == (set() if checked else {"key.small-order"})


def test_a_coordinator_that_is_certified_as_a_device_is_in_no_cohort() -> None:
    """A key has one role: no signature that a party makes in one of them can count in another."""
    fleet, name = make_fleet(8), "device-005"
    root = fleet.authority.root
    own = fleet.authority.issue(name, fleet.key.public, not_before=BEGIN, not_after=END)
    certificates = {device: each.certificate for device, each in fleet.devices.items()} | {name: own}
    with refused(ProtocolError, "offer.keys"):
        server.open_session(Coordinator(fleet.key), root, fleet.spec, certificates, fleet.entropy)
    offer = envelope.open_verified(Offer, fleet.offer()[1], fleet.key.public, "coordinator")
    forged = replace(offer, certificates=tuple(der for _, der in sorted(certificates.items())))
    with refused(ProtocolError, "offer.keys"):
        client.join(fleet.devices["device-002"], envelope.sign(fleet.key, forged), fleet.entropy)


# An authority that everyone can issue for.


def weak_authority() -> bytes:
    """A self-signed certificate of the weak key, in PEM; nobody signed it."""
    now = datetime.now(UTC)
    made = Authority.create("fleet", SystemEntropy(), now - DAY, now + DAY)
    forged = made.der[:-64].replace(made.key.public.raw, NEUTRAL) + FORGED
    return x509.load_der_x509_certificate(forged).public_bytes(serialization.Encoding.PEM)


def test_no_weak_authority_is_pinned_and_without_the_check_everyone_issues_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with refused(TrustError, "key.small-order"):
        Root.from_pem(weak_authority())
    monkeypatch.setattr(identity, "_SMALL_ORDER", frozenset())
    root, mine = Root.from_pem(weak_authority()), IdentityKey(bytes(range(32)))
    now = datetime.now(UTC)
    issued = Authority(mine, root.der).issue("a", mine.public, not_before=now - DAY, not_after=now + DAY)
    assert root.verify(issued[:-64] + FORGED, now) == ("a", mine.public)


# A coordinator that everyone can speak for.


def test_a_device_pins_no_weak_coordinator(tmp_path: Path, store: AuthorityStore) -> None:
    (tmp_path / "weak.pem").write_bytes(weak_pem())
    with refused(TrustError, "key.small-order"):
        pinned = ("--authority", store.folder / AUTHORITY, "--coordinator", tmp_path / "weak.pem")
        call("device", "enrol", "--state", tmp_path / "a", "--name", "a", "--base", "base", *pinned)
    assert not (tmp_path / "a").exists()


def test_a_device_with_a_weak_coordinator_answers_nobody_and_without_the_check_everybody(
    talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, offer = talk.offer()
    (talk.fleet.state_dir(FIRST).folder / COORDINATOR).write_bytes(weak_pem())
    forged = {BODY: offer[: -len(FORGED)] + FORGED}
    talk.refused(FIRST, Step.OFFER, forged, "key.small-order")
    monkeypatch.setattr(identity, "_SMALL_ORDER", frozenset())
    assert not talk.reply(FIRST, Step.OFFER, forged).has_error()
