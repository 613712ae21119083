"""Certificates with a critical extension that nobody here understands, for example one that limits them to another use.

RFC 5280, section 4.2: whoever does not understand such an extension must refuse the certificate. A member that the
authority certified for something else takes part otherwise, and hides nobody that it should.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregation import client, envelope
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Offer
from aggregation.pki import Authority, certificates, requests
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.transcript.entries import read
from client.node.statedir import AUTHORITY, CERTIFICATE
from edgeadapt.authority import AuthorityStore
from tests.support import FleetOf, refused
from tests.support.authority import store
from tests.support.fleet import make_fleet
from tests.support.hostile import audit_failures
from tests.support.trial import call

__all__ = ["store"]
VICTIM = "device-02"
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
DAY = timedelta(days=1)


def certified(authority: Authority, name: str, key: PublicKey, *, ca: bool = False) -> bytes:
    """A certificate with the extension, DER, as another program of the authority would issue it."""
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.load_der_x509_certificate(authority.der).subject)
        .public_key(Ed25519PublicKey.from_public_bytes(key.raw))
        .serial_number(7)
        .not_valid_before(now - DAY)
        .not_valid_after(now + DAY)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(UNKNOWN, critical=True)
    )
    signed = builder.sign(Ed25519PrivateKey.from_private_bytes(authority.key.raw), None)
    return signed.public_bytes(serialization.Encoding.DER)


def any_extension(of: Any, what: str) -> x509.BasicConstraints | None:
    """The basic constraints, whatever else there is."""
    found = [each.value for each in of.extensions if isinstance(each.value, x509.BasicConstraints)]
    return found[0] if found else None


@pytest.mark.parametrize("checked", [True, False])
def test_the_coordinators_app_admits_no_device_whose_certificate_is_not_understood(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    fleet = app_fleet_of(8, rounds=1)
    authority, state_dir = (
        Authority.from_pem((fleet.out / "authority" / AUTHORITY).read_bytes()),
        fleet.state_dir(VICTIM),
    )
    (state_dir.folder / CERTIFICATE).write_bytes(certified(authority, VICTIM, state_dir.identity.public))
    if not checked:
        monkeypatch.setattr(certificates, "constraints", any_extension)
    (record,) = fleet.federate(fleet.grid())
    (log,) = (fleet.out / "coordinator" / "transcript").glob("*.log")
    first = read(log.read_bytes()).entries[0]
    cohort = Offer.decode(envelope.unverified_body(first.message)).certificates
    assert len(cohort) == len(record.survivors) == (7 if checked else 8)
    monkeypatch.undo()
    assert audit_failures(fleet.out) == (set() if checked else {"certificate.extension"})


def test_a_device_joins_no_cohort_with_such_a_member_and_without_the_check_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fleet, name = make_fleet(8), "device-005"
    members = {device: each.certificate for device, each in fleet.devices.items()}
    members[name] = certified(fleet.authority, name, fleet.devices[name].identity.public)
    offer = envelope.open_verified(Offer, fleet.offer()[1], fleet.key.public, "coordinator")
    forged = replace(offer, certificates=tuple(der for _, der in sorted(members.items())))
    with refused(ProtocolError, "certificate.extension"):
        client.join(fleet.devices["device-002"], envelope.sign(fleet.key, forged), fleet.entropy)
    monkeypatch.setattr(certificates, "constraints", any_extension)
    client.join(fleet.devices["device-002"], envelope.sign(fleet.key, forged), fleet.entropy)


def test_a_request_for_such_a_certificate_is_refused_and_without_the_check_certified(
    store: AuthorityStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate would lack what was asked for."""
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kitchen")])
    asked = x509.CertificateSigningRequestBuilder(subject).add_extension(UNKNOWN, critical=True)
    pem = asked.sign(Ed25519PrivateKey.from_private_bytes(bytes(32)), None).public_bytes(serialization.Encoding.PEM)
    (tmp_path / "kitchen.csr").write_bytes(pem)
    issue = ("authority", "issue", store.folder, "--request", tmp_path / "kitchen.csr")
    with refused(TrustError, "request.extension", value="1.2.3.4"):
        call(*issue)
    assert not store.certificates()
    monkeypatch.setattr(requests, "constraints", any_extension)
    call(*issue)
    assert [issued.name for issued, _ in store.certificates()] == ["kitchen"]


def test_a_device_pins_no_such_authority_and_without_the_check_it_does(
    store: AuthorityStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = store.unlock(None)
    der = certified(signer, "fleet", signer.key.public, ca=True)
    (tmp_path / "authority.pem").write_bytes(certificates.to_pem(der))
    (tmp_path / "coordinator.pem").write_bytes(IdentityKey(bytes(32)).public.to_pem())
    pinned = ("--authority", tmp_path / "authority.pem", "--coordinator", tmp_path / "coordinator.pem")
    enrol = ("device", "enrol", "--state", tmp_path / "kitchen", "--name", "kitchen", "--base", "base", *pinned)
    with refused(TrustError, "certificate.extension", value="1.2.3.4"):
        call(*enrol)
    assert not (tmp_path / "kitchen").exists()
    monkeypatch.setattr(certificates, "constraints", any_extension)
    call(*enrol)
    assert (tmp_path / "kitchen").exists()
