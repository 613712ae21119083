"""Certificates: what is read from one, and the authority as devices and coordinator pin it."""

import hashlib
import re
from dataclasses import dataclass, replace
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import PublicKey
from aggregation.pki.revocation import RevocationList

DEVICE_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}"  # X.520 allows a common name 64 characters
_DEVICE_ID = re.compile(DEVICE_ID, re.ASCII)
_PEM = b"-----BEGIN CERTIFICATE-----"
MAX_CERTIFICATE = 2048  # bytes of DER; ours have about 350


def is_device_id(name: str) -> bool:
    """Whether a device can have this name."""
    return _DEVICE_ID.fullmatch(name) is not None


def require_device_id(name: str) -> str:
    """``name``, if a device can be called that.

    Raises:
        ConfigError: It is not 1 to 64 letters, digits, dots, colons, dashes, underscores, from a letter or digit on.
    """
    if not is_device_id(name):
        raise ConfigError(f"device name {name[:64]!r} is not of the form {DEVICE_ID}")
    return name


def load(der: bytes) -> x509.Certificate:
    """A certificate, whoever issued it.

    Raises:
        TrustError: Not one, or too large.
    """
    if len(der) > MAX_CERTIFICATE:
        raise TrustError(f"certificate of {len(der)} bytes is over the limit of {MAX_CERTIFICATE}")
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("not a certificate in DER form") from None


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate may issue others.

    Raises:
        TrustError: It does not say, or says it twice.
    """
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        raise TrustError("certificate has no readable basic constraints") from None


def subject(certificate: x509.Certificate) -> str:
    """Whom a certificate names.

    Raises:
        TrustError: Nobody, or several.
    """
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise TrustError("certificate must have exactly one common name")
    return names[0].value


def identity(certificate: x509.Certificate) -> PublicKey:
    """The key that a certificate is for.

    Raises:
        TrustError: No Ed25519 key.
    """
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise TrustError("certificate holds no readable key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError(f"certificate holds a {type(key).__name__} where Ed25519 belongs")
    return PublicKey(key.public_bytes_raw())


def to_pem(der: bytes) -> bytes:
    """A certificate as it is handed over."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def to_der(raw: bytes) -> bytes:
    """A certificate in PEM or DER as DER. Who issued it is not checked: ``Root.verify`` does that.

    Raises:
        TrustError: Not a certificate.
    """
    try:
        pem = raw.lstrip().startswith(_PEM)
        found = x509.load_pem_x509_certificate(raw) if pem else x509.load_der_x509_certificate(raw)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("not a certificate in PEM or DER form") from None
    return found.public_bytes(serialization.Encoding.DER)


def not_after(der: bytes) -> datetime:
    """When a certificate ends."""
    return x509.load_der_x509_certificate(der).not_valid_after_utc


@dataclass(frozen=True, slots=True)
class Root:
    """The authority as devices and coordinator pin it.

    Args:
        der: Its self-signed certificate.
        revoked: Its newest revocation list, where one is at hand.
    """

    der: bytes
    revoked: RevocationList | None = None

    def verify(self, der: bytes, at: datetime | None = None) -> tuple[str, PublicKey]:
        """Return the device id and identity key that this authority certified in ``der``.

        Args:
            der: A device certificate.
            at: Also demand that the certificate, and the authority's, is valid at this time.

        Raises:
            TrustError: Not a certificate of this authority for a device, revoked, or not valid at ``at``.
        """
        certificate, authority = load(der), load(self.der)
        try:
            certificate.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            raise TrustError("certificate was not issued by the pinned authority") from None
        if is_authority(certificate):
            raise TrustError("an authority's certificate is no device certificate")
        device_id, key = subject(certificate), identity(certificate)
        if not is_device_id(device_id):
            raise TrustError(f"certified name {device_id[:64]!r} is no device id")
        if self.revoked is not None and certificate.serial_number in self.revoked.revoked:
            raise TrustError(f"certificate of {device_id} is revoked")
        for holder, each in ((device_id, certificate), ("the authority", authority)):
            if at is not None and not each.not_valid_before_utc <= at <= each.not_valid_after_utc:
                raise TrustError(f"certificate of {holder} is not valid at {at:%Y-%m-%d %H:%M}")
        return device_id, key

    @property
    def key(self) -> PublicKey:
        """The authority's own."""
        return identity(load(self.der))

    @property
    def not_after(self) -> datetime:
        """When the authority's certificate ends, and with it every one that it issued."""
        return load(self.der).not_valid_after_utc

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in hex, to be compared by people."""
        return hashlib.sha256(self.der).hexdigest()

    def revocations(self, raw: bytes) -> RevocationList:
        """The revocation list in ``raw``, DER or PEM, if this authority signed it.

        Raises:
            TrustError: It did not, or this is no such list.
        """
        return RevocationList.read(raw, load(self.der))

    def with_revocations(self, raw: bytes) -> "Root":
        """This root going by the list in ``raw`` from now on.

        Raises:
            TrustError: As ``revocations``, or the list is older than the one at hand.
        """
        return replace(self, revoked=self.revocations(raw).newer_than(self.revoked))

    def to_pem(self) -> bytes:
        """The authority's certificate in PEM; the revocation list is not part of it."""
        return load(self.der).public_bytes(serialization.Encoding.PEM)

    @classmethod
    def from_pem(cls, pem: bytes) -> "Root":
        """Pin the authority whose certificate is in ``pem``.

        Raises:
            TrustError: Not a self-signed certificate of an authority with an Ed25519 key.
        """
        try:
            certificate = x509.load_pem_x509_certificate(pem)
            certificate.verify_directly_issued_by(certificate)
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion):
            raise TrustError("not a self-signed certificate in PEM form") from None
        if not is_authority(certificate):
            raise TrustError("the certificate is not an authority's")
        identity(certificate)
        return cls(certificate.public_bytes(serialization.Encoding.DER))
