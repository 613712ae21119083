"""Revocation lists: which certificates count no longer before they end (X.509 CRL, RFC 5280, section 5).

The authority signs a whole list each time, numbered upwards. A list names certificates by serial; it says until when
it is good, after which nobody may go by it. Whoever keeps a list takes no other one with a lower number, so that nobody
who passes lists on can bring a revoked device back. Times come from the caller and carry a time zone; no clock is read.
"""

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
AHEAD = timedelta(days=1)  # by which the authority's clock may be ahead of the reader's
_PEM = b"-----BEGIN X509 CRL-----"
_KNOWN = (x509.CRLNumber, x509.AuthorityKeyIdentifier)


class Reason(Enum):
    """Why a certificate was revoked; the values are the names of RFC 5280, section 5.3.1."""

    UNSPECIFIED = "unspecified"
    KEY_COMPROMISE = "keyCompromise"
    AFFILIATION_CHANGED = "affiliationChanged"
    SUPERSEDED = "superseded"
    CESSATION_OF_OPERATION = "cessationOfOperation"
    PRIVILEGE_WITHDRAWN = "privilegeWithdrawn"


@dataclass(frozen=True, slots=True)
class Revocation:
    """Since when a certificate counts no longer, and why."""

    at: datetime
    reason: Reason = Reason.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class RevocationList:
    """A list that the authority signed; made by ``read`` or ``sign`` only.

    Args:
        der: As signed.
        number: Counts up from list to list.
        this_update: When it was signed.
        next_update: Until when it is good.
        revoked: Serial → revocation.
    """

    der: bytes = field(repr=False)
    number: int
    this_update: datetime
    next_update: datetime
    revoked: Mapping[int, Revocation] = field(compare=False)

    @classmethod
    def read(cls, raw: bytes, issuer: x509.Certificate) -> "RevocationList":
        """The list in ``raw``, DER or PEM, that ``issuer`` signed. Use ``Root.revocations``.

        Raises:
            TrustError: Not a whole list of that authority's, with number and end, or one with an extension that would
                change what it means.
        """
        listed = _load(raw)
        key = issuer.public_key()
        if not isinstance(key, Ed25519PublicKey):
            raise TrustError("an authority has an Ed25519 key")
        try:
            signed = listed.issuer == issuer.subject and listed.is_signature_valid(key)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            signed = False
        if not signed:
            raise TrustError("revocation list was not signed by the pinned authority")
        try:
            return cls._of(listed)
        except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
            raise TrustError("revocation list has no readable number or entries") from None

    @classmethod
    def _of(cls, listed: x509.CertificateRevocationList) -> "RevocationList":
        for extension in listed.extensions:  # a delta list, or one for some certificates only, says so in another one
            if not isinstance(extension.value, _KNOWN):
                raise TrustError(f"revocation list has an extension {extension.oid.dotted_string} that is not for here")
        if listed.next_update_utc is None:
            raise TrustError("revocation list does not say until when it is good")
        return cls(
            listed.public_bytes(serialization.Encoding.DER),
            listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number,
            listed.last_update_utc,
            listed.next_update_utc,
            {entry.serial_number: _revocation(entry) for entry in listed},
        )

    def to_pem(self) -> bytes:
        """The same list in PEM."""
        return x509.load_der_x509_crl(self.der).public_bytes(serialization.Encoding.PEM)

    def newer_than(self, seen: "RevocationList | None") -> "RevocationList":
        """This list, if who saw ``seen`` before may go by it now.

        Raises:
            TrustError: It is older, or another one of the same number.
        """
        if seen is None or self.number > seen.number or self.der == seen.der:
            return self
        if self.number == seen.number:
            raise TrustError(f"there are two revocation lists with the number {self.number}")
        raise TrustError(f"revocation list {self.number} is older than {seen.number}, which was seen before")

    def require_fresh(self, at: datetime, oldest: timedelta | None = None) -> None:
        """Return if the list may be gone by at this time.

        Args:
            at: Now.
            oldest: Greatest age; nothing leaves it to the list's own end.

        Raises:
            TrustError: It is past its end, older than that, or of a day to come, on which it would still pass for new.
        """
        if self.this_update - at > AHEAD:
            raise TrustError(f"revocation list {self.number} is of {self.this_update:%Y-%m-%d}, which is yet to come")
        if at > self.next_update:
            raise TrustError(
                f"revocation list {self.number} was good until {self.next_update:%Y-%m-%d %H:%M}: get a newer one"
            )
        if oldest is not None and at - self.this_update > oldest:
            raise TrustError(f"revocation list {self.number} is older than {oldest.days} days: get a newer one")


def sign_list(
    issuer: x509.Name,
    key: Ed25519PrivateKey,
    number: int,
    revoked: Mapping[int, Revocation],
    times: tuple[datetime, datetime],
) -> bytes:
    """A signed list in DER. Use ``Authority.revocations``. ``times``: when it is signed and until when it is good.

    Raises:
        ConfigError: It would end before it begins.
    """
    this_update, next_update = times
    if not this_update < next_update:
        raise ConfigError("a revocation list cannot end before it begins")
    builder = x509.CertificateRevocationListBuilder(issuer, this_update, next_update)
    builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    for serial, revocation in sorted(revoked.items()):
        entry = x509.RevokedCertificateBuilder(serial, revocation.at)
        if revocation.reason is not Reason.UNSPECIFIED:  # which RFC 5280 wants left out
            reason = x509.CRLReason(x509.ReasonFlags(revocation.reason.value))
            entry = entry.add_extension(reason, critical=False)
        builder = builder.add_revoked_certificate(entry.build())
    return builder.sign(key, algorithm=None).public_bytes(serialization.Encoding.DER)


def _load(raw: bytes) -> x509.CertificateRevocationList:
    if len(raw) > 2 * MAX_REVOCATIONS:
        raise TrustError(f"revocation list of {len(raw)} bytes is over the limit of {MAX_REVOCATIONS}")
    try:
        return x509.load_pem_x509_crl(raw) if raw.lstrip().startswith(_PEM) else x509.load_der_x509_crl(raw)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("not a revocation list in DER or PEM form") from None


def _revocation(entry: x509.RevokedCertificate) -> Revocation:
    reason = Reason.UNSPECIFIED
    for extension in entry.extensions:
        if not isinstance(extension.value, x509.CRLReason):  # one names another authority's certificate
            raise TrustError("revocation list has an entry that is not for a certificate of this authority")
        reason = Reason(extension.value.reason.value)
    return Revocation(entry.revocation_date_utc, reason)
