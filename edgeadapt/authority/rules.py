"""What the authority's record allows: which names and keys, which invitations, which renewals."""

import base64
from collections.abc import Sequence
from datetime import datetime

from aggregation.errors import ConfigError, TrustError
from aggregation.pki.certificates import same_name
from aggregation.pki.identity import PublicKey
from aggregation.pki.revocation import AHEAD
from edgeadapt.authority import record

RENEWABLE = 1 / 2  # share of the validity that is left; devices ask at 1/3, and clocks differ
ENROL_AGAIN = "enrol this device again, with a token"
NOT_REDEEMABLE = "the invitation is not valid, has expired, or was used: ask for a new one"


def require_new(writer: record.RecordWriter, name: str, key: PublicKey, now: datetime) -> None:
    """Check that a key may be certified under a name: neither is another device's, and neither was revoked."""
    revoked, key_id = revoked_in(writer.events), key.key_id
    for issued in issued_in(writer.events):
        if issued.purpose is not record.Purpose.IDENTITY:
            continue
        if issued.key == key_id and issued.serial in revoked:
            text = f"the key {key_id} was revoked: generate a new one on the device"
            raise ConfigError(text, about="key.revoked")
        if issued.key == key_id and issued.name != name:
            text = f"the key {key_id} is that of {issued.name}: generate a new one on {name}"
            raise ConfigError(text, about="key.name")
        if issued.name != name and same_name(issued.name) == same_name(name):
            text = f"{name} differs from {issued.name} in upper and lower case only: choose another name"
            raise ConfigError(text, about="name.case")
        if issued.name == name and issued.key != key_id and issued.serial not in revoked and now <= issued.not_after:
            text = f"{name} has a valid certificate with another key ({issued.key}): revoke it first"
            raise ConfigError(text, about="name.key")


def require_unrevoked(events: Sequence[record.Event], name: str, serial: int) -> None:
    """Check that the certificate with a serial, which a device presents, was not revoked."""
    if f"{serial:x}" in revoked_in(events):
        raise TrustError(f"a certificate of {name} was revoked: {ENROL_AGAIN}", about="renewal.revoked")


def require_redeemable(events: Sequence[record.Event], token: str, name: str, key_id: str, now: datetime) -> None:
    """Check that an invitation is for this name, and was not used for another key. The TrustError does not say whether
    such an invitation exists."""
    invited = [event for event in events if isinstance(event, record.InvitationIssued) and event.token == token]
    used = [event.key for event in events if isinstance(event, record.InvitationUsed) and event.token == token]
    if not invited or (used and used[0] != key_id) or (not used and now > invited[0].expires):
        raise TrustError(NOT_REDEEMABLE, about="invitation")
    if name != invited[0].name:
        text = f"the invitation is for {invited[0].name}, and the request for {name}"
        raise TrustError(text, about="invitation.name")


def certificate_of(events: Sequence[record.Event], key_id: str) -> bytes | None:
    """Return the certificate of a key, if it has one that is not revoked."""
    revoked = revoked_in(events)
    valid = [each for each in issued_in(events) if each.key == key_id and each.serial not in revoked]
    return base64.b64decode(valid[-1].certificate) if valid else None


def lasting_certificate_of(
    events: Sequence[record.Event], name: str, key_id: str, now: datetime, end: datetime
) -> bytes | None:
    """Return the certificate of a device's key, DER, if it does not end soon, or no sooner than a new one, at ``end``.
    So an answer that did not arrive is given once more, and the record does not grow, however often a device asks."""
    revoked = revoked_in(events)
    for certificate in issued_in(events):
        if (certificate.name, certificate.key) != (name, key_id) or certificate.serial in revoked:
            continue
        left, whole = certificate.not_after - now, certificate.not_after - certificate.not_before
        if certificate.not_after >= end or left >= RENEWABLE * whole:
            return base64.b64decode(certificate.certificate)
    return None


def issued_in(events: Sequence[record.Event]) -> list[record.CertificateIssued]:
    return [event for event in events if isinstance(event, record.CertificateIssued)]


def revoked_in(events: Sequence[record.Event]) -> dict[str, record.CertificateRevoked]:
    return {event.serial: event for event in events if isinstance(event, record.CertificateRevoked)}


def listed_revocations(events: Sequence[record.Event], now: datetime) -> dict[str, record.CertificateRevoked]:
    """Return the revocations that a list signed now has, by serial number.

    The revocation of an expired certificate is on one more list, which was signed after that, and then on none (RFC
    5280, section 3.3): lists stay as short as the fleet is large. That list is signed a day later at least. By the
    clock of who accepts a list (``RevocationList.require_fresh``), what it lacks has expired as well. A list with a
    later time than ``now`` was signed by a clock that ran ahead, and shows nothing.
    """
    ends = {each.serial: each.not_after for each in issued_in(events)}
    listed = dict[str, record.CertificateRevoked]()
    for event in events:
        if isinstance(event, record.CertificateRevoked):
            listed[event.serial] = event
        elif isinstance(event, record.ListSigned) and event.at <= now:
            until = event.at - AHEAD
            listed = {serial: each for serial, each in listed.items() if serial not in ends or until <= ends[serial]}
    return listed


def count_lists(events: Sequence[record.Event]) -> int:
    return sum(isinstance(event, record.ListSigned) for event in events)
