"""Certificates: their fields in the one accepted form, PEM and DER, and the authority as devices pin it."""

import hashlib
import re
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import PublicKey
from aggregation.pki.revocation import RevocationList, require_whole_bytes

DEVICE_ID = r"[A-Za-z0-9]([A-Za-z0-9._:-]{0,62}[A-Za-z0-9])?"  # X.520 allows a common name 64 characters
MAX_CERTIFICATE = 2048  # bytes of DER; ours have about 350
KNOWN_CERTIFICATES = 4096  # that a process does not parse and verify again: about 10 MB
_DEVICE_ID = re.compile(DEVICE_ID, re.ASCII)
_PEM = b"-----BEGIN CERTIFICATE-----"


def is_device_id(name: str) -> bool:
    return _DEVICE_ID.fullmatch(name) is not None


def same_name(name: str) -> str:
    """``name`` without the difference of upper and lower case: people and many file systems take both for one name.

    >>> same_name("Phone-1") == same_name("phone-1")
    True
    """
    return name.lower()


def require_device_id(name: str) -> str:
    """Return ``name`` if a device can have it. Raises ConfigError: it is not 1 to 64 letters, digits, dots, colons,
    dashes, underscores, beginning and ending with a letter or digit: some file systems drop a dot at the end."""
    if not is_device_id(name):
        raise ConfigError(f"device id {name[:64]!r} does not match {DEVICE_ID}", about="device.id")
    return name


@lru_cache(maxsize=KNOWN_CERTIFICATES)
def load(der: bytes) -> x509.Certificate:
    """Parse a certificate, whoever issued it. Raises TrustError: not a certificate, or too large."""
    if len(der) > MAX_CERTIFICATE:
        text = f"certificate of {len(der)} bytes is over the limit of {MAX_CERTIFICATE}"
        raise TrustError(text, about="certificate.size")
    try:
        certificate = x509.load_der_x509_certificate(der)
        require_whole_bytes(der, certificate.signature)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("not a certificate in DER form", about="certificate") from None
    return certificate


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate may issue others. Raises TrustError: it has no basic constraints, or as ``constraints``."""
    found = constraints(certificate, "certificate")
    if found is None:
        raise TrustError("certificate has no basic constraints", about="certificate.basic-constraints")
    return found.ca


def constraints(of: x509.Certificate | x509.CertificateSigningRequest, what: str) -> x509.BasicConstraints | None:
    """The basic constraints of a certificate or request, if it has any: the one extension that is understood here.
    Raises TrustError: an extension is unreadable or occurs twice, or another one is critical, so that nobody may go on
    without understanding it (RFC 5280, section 4.2)."""
    found = None
    try:
        for extension in of.extensions:
            if isinstance(extension.value, x509.BasicConstraints):
                found = extension.value
            elif extension.critical:
                oid = extension.oid.dotted_string
                text = f"{what} has the critical extension {oid}, which is not supported"
                raise TrustError(text, about=f"{what}.extension")
    except (ValueError, x509.DuplicateExtension):
        text = f"{what} has an extension twice, or one that is not readable"
        raise TrustError(text, about=f"{what}.extension") from None
    return found


def subject(certificate: x509.Certificate) -> str:
    """The common name of a certificate. Raises TrustError: it has none, several, or one that cannot be read."""
    try:
        names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except ValueError:
        raise TrustError("certificate has no readable name", about="certificate.common-name") from None
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise TrustError("certificate must have exactly one common name", about="certificate.common-name")
    return names[0].value


def identity(certificate: x509.Certificate) -> PublicKey:
    """The key that a certificate binds. Raises TrustError: not an Ed25519 key."""
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise TrustError("certificate has no readable key", about="certificate.key") from None
    if not isinstance(key, Ed25519PublicKey):
        kind = type(key).__name__
        raise TrustError(f"certificate has a {kind}, not an Ed25519 key", about="certificate.key")
    return PublicKey(key.public_bytes_raw())


def to_pem(der: bytes) -> bytes:
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def to_der(raw: bytes) -> bytes:
    """A certificate in PEM or DER, as DER. Its issuer is not checked; ``Root.verify`` does that. Raises TrustError: not
    a certificate, or too large."""
    if len(raw) > 2 * MAX_CERTIFICATE:  # PEM has four characters for three bytes
        text = f"certificate of {len(raw)} bytes is over the limit of {MAX_CERTIFICATE}"
        raise TrustError(text, about="certificate.size")
    try:
        pem = raw.lstrip().startswith(_PEM)
        found = x509.load_pem_x509_certificate(raw) if pem else x509.load_der_x509_certificate(raw)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("not a certificate in PEM or DER form", about="certificate") from None
    return found.public_bytes(serialization.Encoding.DER)


def serial(der: bytes) -> int:
    """The serial of a certificate, by which a revocation list names it."""
    return load(der).serial_number


def not_after(der: bytes) -> datetime:
    return load(der).not_valid_after_utc


@lru_cache(maxsize=KNOWN_CERTIFICATES)
def _certified(root: bytes, der: bytes) -> tuple[str, PublicKey]:
    """What ``Root.verify`` finds without the time and revocations, of which the outcome does not depend. A success is
    kept, so that a process that simulates many devices verifies a certificate once
    (docs/decisions/0032-verified-once.md)."""
    certificate, authority = load(der), load(root)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        text = "certificate was not issued by the pinned authority"
        raise TrustError(text, about="certificate.issuer") from None
    if is_authority(certificate):
        text = "the certificate is an authority's, not a device's"
        raise TrustError(text, about="certificate.basic-constraints")
    device_id, key = subject(certificate), identity(certificate)
    if not is_device_id(device_id):
        text = f"certified name {device_id[:64]!r} is not a device id"
        raise TrustError(text, about="certificate.common-name")
    if key == identity(authority):
        text = f"certificate of {device_id} has the authority's own key"
        raise TrustError(text, about="certificate.key")
    return device_id, key


@dataclass(frozen=True, slots=True)
class Root:
    """The authority as devices and coordinator pin it."""

    der: bytes  # its self-signed certificate
    revoked: RevocationList | None = None  # its newest revocation list, if one is known

    def verify(self, der: bytes, at: datetime | None = None) -> tuple[str, PublicKey]:
        """Return the device id and identity key that this authority certified in ``der``. ``der``: a device
        certificate. ``at``: also require that the certificate and the authority's own are valid at this time. Raises
        TrustError: not a certificate of this authority for a device, revoked, or not valid at ``at``."""
        device_id, key = _certified(self.der, der)
        certificate, authority = load(der), load(self.der)
        if self.revoked is not None and certificate.serial_number in self.revoked.revoked:
            raise TrustError(f"certificate of {device_id} is revoked", about="certificate.revoked")
        for holder, each in ((device_id, certificate), ("the authority", authority)):
            if at is not None and not each.not_valid_before_utc <= at <= each.not_valid_after_utc:
                text = f"certificate of {holder} is not valid at {at:%Y-%m-%d %H:%M}"
                raise TrustError(text, about="certificate.validity")
        return device_id, key

    @property
    def key(self) -> PublicKey:
        return identity(load(self.der))

    @property
    def not_after(self) -> datetime:
        """With it ends every certificate that the authority issued."""
        return load(self.der).not_valid_after_utc

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in hex, for people to compare."""
        return hashlib.sha256(self.der).hexdigest()

    def revocations(self, raw: bytes) -> RevocationList:
        """The revocation list in ``raw``, DER or PEM, if this authority signed it. Raises TrustError: it did not, or
        ``raw`` is not a revocation list."""
        return RevocationList.read(raw, load(self.der))

    def with_revocations(self, raw: bytes) -> "Root":
        """This root with the revocation list in ``raw``. Raises TrustError as ``revocations``, or the list is older
        than the known one."""
        return replace(self, revoked=self.revocations(raw).newer_than(self.revoked))

    def to_pem(self) -> bytes:
        """The authority's certificate in PEM, without the revocation list."""
        return load(self.der).public_bytes(serialization.Encoding.PEM)

    @classmethod
    def from_pem(cls, pem: bytes) -> "Root":
        """Pin the authority whose certificate is in ``pem``. Raises TrustError: not the self-signed certificate of an
        authority with an Ed25519 key."""
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            require_whole_bytes(certificate.public_bytes(serialization.Encoding.DER), certificate.signature)
            certificate.verify_directly_issued_by(certificate)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion):
            raise TrustError("not a self-signed certificate in PEM form", about="authority.certificate") from None
        if not is_authority(certificate):
            raise TrustError("the certificate is not an authority's", about="certificate.basic-constraints")
        identity(certificate)
        return cls(certificate.public_bytes(serialization.Encoding.DER))
