"""Revocation lists: certificates that are invalid before they expire (X.509 CRL, RFC 5280, section 5).

The authority signs a complete list each time, without certificates that expired long ago, and numbers lists upwards. A
list names certificates by serial and says until when it is valid; after that nobody may rely on it. A reader accepts no
list with a lower number than the one it has, so nobody who forwards lists can reinstate a revoked device. Times come
from the caller and carry a time zone; no clock is read."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregation.errors import ConfigError, TrustError

MAX_REVOCATIONS = 2**20  # bytes of DER: about 25,000 certificates
EXPIRED = "revocations.next-update"  # what the error is about, after the end of a list
AHEAD = timedelta(days=1)  # largest lead of the authority's clock over the reader's
_PEM = b"-----BEGIN X509 CRL-----"
_KNOWN = (x509.CRLNumber, x509.AuthorityKeyIdentifier)


class Reason(Enum):
    """Why a certificate was revoked; the values are the names in RFC 5280, section 5.3.1."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "keyCompromise"
    AFFILIATION_CHANGED = "affiliationChanged"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessationOfOperation"
    PRIVILEGE_WITHDRAWN = "privilegeWithdrawn"


@dataclass(frozen=True, slots=True)
class Revocation:
    at: datetime
    reason: Reason = Reason.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A list that the authority signed; constructed by ``read`` only."""

    der: bytes = field(repr=False)  # as signed
    number: int  # counts up from list to list
    this_update: datetime  # when it was signed
    next_update: datetime  # until when it is valid
    revoked: Mapping[int, Revocation] = field(compare=False)  # serial → revocation

    @classmethod
    def read(cls, raw: bytes, issuer: x509.Certificate) -> "RevocationList":
        """The list in ``raw``, DER or PEM, that ``issuer`` signed. Use ``Root.revocations``. Raises TrustError: not a
        complete list of that authority with number and end, or one with an extension that would change its meaning."""
        listed = _load(raw)
        key = issuer.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise TrustError("the authority has no Ed25519 key", about="authority.key")
        try:
            require_whole_bytes(listed.public_bytes(serialization.Encoding.DER), listed.signature)
            signed = listed.issuer == issuer.subject and listed.is_signature_valid(key)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            signed = False
        if not signed:
            text = "revocation list was not signed by the pinned authority"
            raise TrustError(text, about="revocations.signature")
        try:
            return cls._of(listed)
        except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
            text = "revocation list has no readable number or entries"
            raise TrustError(text, about="revocations.entries") from None

    @classmethod
    def _of(cls, listed: x509.CertificateRevocationList) -> "RevocationList":
        for extension in listed.extensions:  # delta and partial lists are marked by other extensions
            if not isinstance(extension.value, _KNOWN):
                oid = extension.oid.dotted_string
                text = f"revocation list has an unsupported extension {oid}"
                raise TrustError(text, about="revocations.extension")
        if listed.next_update_utc is None:
            raise TrustError("revocation list does not say until when it is valid", about="revocations.next-update")
        return cls(
            listed.public_bytes(serialization.Encoding.DER),
            listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number,
            listed.last_update_utc,
            listed.next_update_utc,
            {entry.serial_number: _revocation(entry) for entry in listed},
        )

    def to_pem(self) -> bytes:
        return x509.load_der_x509_crl(self.der).public_bytes(serialization.Encoding.PEM)

    def newer_than(self, seen: "RevocationList | None") -> "RevocationList":
        """This list, if a reader that has ``seen`` may accept it: it is newer, or the same. Raises TrustError: it is
        older, or differs under the same number."""
        if seen is None or self.number > seen.number or self.der == seen.der:
            return self
        if self.number == seen.number:
            text = f"there are two different revocation lists with the number {self.number}"
            raise TrustError(text, about="revocations.number")
        text = f"revocation list {self.number} is older than {seen.number}, which was seen before"
        raise TrustError(text, about="revocations.number")

    def require_fresh(self, at: datetime, oldest: timedelta | None = None) -> None:
        """Return if the list is valid at the time ``at``. ``oldest``: greatest age; None for the list's own end alone.
        Raises TrustError: it is past its end, older than ``oldest``, or dated in the future, where it would pass for
        new later."""
        if self.this_update - at > AHEAD:
            text = f"revocation list {self.number} is dated {self.this_update:%Y-%m-%d}, in the future"
            raise TrustError(text, about="revocations.this-update")
        if at > self.next_update:
            text = f"revocation list {self.number} was valid until {self.next_update:%Y-%m-%d %H:%M}: get a newer one"
            raise TrustError(text, about=EXPIRED)
        if oldest is not None and at - self.this_update > oldest:
            text = f"revocation list {self.number} is older than {oldest.days} days: get a newer one"
            raise TrustError(text, about="revocations.age")


def sign_list(
    issuer: x509.Name,
    key: Ed25519PrivateKey,
    number: int,
    revoked: Mapping[int, Revocation],
    times: tuple[datetime, datetime],
) -> bytes:
    """A signed list in DER. Use ``Authority.revocations``. ``times``: when it is signed, and until when it is valid.
    Raises ConfigError: it would end before it begins."""
    this_update, next_update = times
    if not this_update < next_update:
        raise ConfigError("a revocation list cannot end before it begins", about="revocations.next-update")
    builder = x509.CertificateRevocationListBuilder(issuer, this_update, next_update)
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    for serial, revocation in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder(serial, revocation.at)
        if revocation.reason is not Reason.UNSPECIFIED:  # RFC 5280 leaves this one out
            reason = x509.CRLReason(x509.ReasonFlags(revocation.reason.value))
            entry = entry.add_extension(reason, critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, algorithm=None).public_bytes(serialization.Encoding.DER)


def require_whole_bytes(der: bytes, signature: bytes) -> None:
    """Check that a signed document in DER ends with its signature as a bit string without unused bits. Else two byte
    strings would stand for one document: the parser ignores how many bits are unused where these are zero. Raises
    ValueError."""
    if not der.endswith(b"\x00" + signature):
        raise ValueError("the signature has unused bits")


def _load(raw: bytes) -> x509.CertificateRevocationList:
    if len(raw) > 2 * MAX_REVOCATIONS:
        text = f"revocation list of {len(raw)} bytes is over the limit of {MAX_REVOCATIONS}"
        raise TrustError(text, about="revocations.size")
    try:
        return x509.load_pem_x509_crl(raw) if raw.lstrip().startswith(_PEM) else x509.load_der_x509_crl(raw)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("not a revocation list in DER or PEM form", about="revocations") from None


def _revocation(entry: x509.RevokedCertificate) -> Revocation:
    reason = Reason.UNSPECIFIED
    for extension in entry.extensions:
        if not isinstance(
            extension.value, x509.CRLReason
        ):  # such an extension may name another authority's certificate
            text = "revocation list has an entry that is not for a certificate of this authority"
            raise TrustError(text, about="revocations.issuer")
        reason = Reason(extension.value.reason.value)
    return Revocation(entry.revocation_date_utc, reason)
