"""The enrolment authority: who is a device of this fleet (X.509 with Ed25519, RFC 5280 and RFC 8410).

One level: the authority's self-signed certificate is pinned on every device and signs device certificates. A
device certificate binds one device id (its common name) to one identity key and can sign nothing itself.
Times come from the caller; nothing here reads a clock. Every time must carry a time zone.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, TrustError
from aggregation.identity import IdentityKey, PublicKey
from aggregation.revocation import Revocation, RevocationList, sign

if TYPE_CHECKING:
    from datetime import datetime

DEVICE_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}"  # X.520 allows a common name 64 characters
MAX_CERTIFICATE = 2048  # bytes of DER; ours have about 350
_DEVICE_ID = re.compile(DEVICE_ID, re.ASCII)


@dataclass(frozen=True, slots=True)
class Root:
    """The authority as devices and coordinator pin it.

    Args:
        der: Its self-signed certificate.
        revoked: Its newest revocation list, where one is at hand.
    """

    der: bytes
    revoked: RevocationList | None = None

    def verify(self, der: bytes, at: "datetime | None" = None) -> tuple[str, PublicKey]:
        """Return the device id and identity key that this authority certified in ``der``.

        Args:
            der: A device certificate.
            at: Also demand that the certificate is valid at this time.

        Raises:
            TrustError: Not a certificate of this authority for a device, revoked, or not valid at ``at``.
        """
        certificate = _load(der)
        try:
            certificate.verify_directly_issued_by(_load(self.der))
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
            raise TrustError("certificate was not issued by the pinned authority") from None
        if _is_authority(certificate):
            raise TrustError("an authority's certificate is no device certificate")
        device_id, key = _subject(certificate), _identity(certificate)
        if not _DEVICE_ID.fullmatch(device_id):
            raise TrustError(f"certified name {device_id[:64]!r} is no device id")
        if self.revoked is not None and certificate.serial_number in self.revoked.revoked:
            raise TrustError(f"certificate of {device_id} is revoked")
        if at is not None and not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
            raise TrustError(f"certificate of {device_id} is not valid at {at:%Y-%m-%d %H:%M}")
        return device_id, key

    @property
    def key(self) -> PublicKey:
        """The authority's own."""
        return _identity(_load(self.der))

    @property
    def ends(self) -> "datetime":
        """When the authority's certificate ends, and with it every one that it issued."""
        return _load(self.der).not_valid_after_utc

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate in hex, to be compared by people."""
        return hashlib.sha256(self.der).hexdigest()

    def revocations(self, raw: bytes) -> RevocationList:
        """The revocation list in ``raw``, DER or PEM, if this authority signed it.

        Raises:
            TrustError: It did not, or this is no such list.
        """
        return RevocationList.read(raw, _load(self.der))

    def with_revocations(self, raw: bytes) -> "Root":
        """This root going by the list in ``raw`` from now on.

        Raises:
            TrustError: As ``revocations``, or the list is older than the one at hand.
        """
        return replace(self, revoked=self.revocations(raw).after(self.revoked))

    def to_pem(self) -> bytes:
        """The authority's certificate in PEM; the revocation list is not part of it."""
        return _load(self.der).public_bytes(serialization.Encoding.PEM)

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
        if not _is_authority(certificate):
            raise TrustError("the certificate is not an authority's")
        _identity(certificate)
        return cls(certificate.public_bytes(serialization.Encoding.DER))


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority itself, with its signing key. Keep it offline."""

    key: IdentityKey
    der: bytes

    @classmethod
    def create(cls, name: str, entropy: Entropy, not_before: "datetime", not_after: "datetime") -> "Authority":
        """Make a new authority called ``name`` with a key from ``entropy``."""
        key = IdentityKey.generate(entropy)
        builder = _builder(name, name, key.public, not_before, not_after)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(key, _sign(builder, key))

    @property
    def root(self) -> Root:
        """What devices and coordinator pin."""
        return Root(self.der)

    def issue(
        self,
        device_id: str,
        public: PublicKey,
        *,
        not_before: "datetime",
        not_after: "datetime",
        serial: int | None = None,
    ) -> bytes:
        """Certify that ``public`` is the identity of ``device_id``; returns DER.

        Args:
            device_id: Name of the device.
            public: Its identity key.
            not_before: Begin of validity.
            not_after: End of validity.
            serial: A random one (RFC 5280, 4.1.2.2); where none is given it follows from all the rest.

        Raises:
            ConfigError: ``device_id`` is not 1 to 64 letters, digits, dots, colons, dashes, underscores.
        """
        if not _DEVICE_ID.fullmatch(device_id):
            raise ConfigError(f"device id {device_id[:64]!r} is not of the form {DEVICE_ID}")
        issuer = _subject(_load(self.der))
        builder = _builder(device_id, issuer, public, not_before, not_after, serial=serial)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        return _sign(builder, self.key)

    def revocations(
        self, number: int, revoked: Mapping[int, Revocation], this_update: "datetime", next_update: "datetime"
    ) -> RevocationList:
        """Sign a revocation list.

        Args:
            number: Above that of every list before.
            revoked: Serial → revocation: all of them, not only new ones.
            this_update: Now.
            next_update: Until when the list is good.

        Raises:
            ConfigError: It would end before it begins.
        """
        private = Ed25519PrivateKey.from_private_bytes(self.key.raw)
        der = sign(_load(self.der).subject, private, number, revoked, (this_update, next_update))
        return self.root.revocations(der)

    def to_pem(self) -> bytes:
        """Private key, then certificate: write it only where nobody else can read."""
        return self.key.to_pem() + self.root.to_pem()

    @classmethod
    def from_pem(cls, pem: bytes) -> "Authority":
        """Read what ``to_pem`` wrote.

        Raises:
            TrustError: Key or certificate is missing or broken, or they do not belong together.
        """
        key, root = IdentityKey.from_pem(pem), Root.from_pem(pem)
        if _identity(_load(root.der)) != key.public:
            raise TrustError("the authority's key and certificate do not belong together")
        return cls(key, root.der)


def _builder(
    subject: str,
    issuer: str,
    public: PublicKey,
    not_before: "datetime",
    not_after: "datetime",
    *,
    serial: int | None = None,
) -> x509.CertificateBuilder:
    if not not_before < not_after:
        raise ConfigError(f"certificate of {subject} would end before it begins")
    # Unless it is given, the serial follows from what is certified: no two different certificates share one.
    stamp = f"{issuer}\x00{subject}\x00{not_before.isoformat()}\x00{not_after.isoformat()}\x00".encode()
    derived = int.from_bytes(hashlib.sha256(stamp + public.raw).digest()[:19], "big") + 1
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(Ed25519PublicKey.from_public_bytes(public.raw))
        .serial_number(derived if serial is None else serial)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _sign(builder: x509.CertificateBuilder, key: IdentityKey) -> bytes:
    private = Ed25519PrivateKey.from_private_bytes(key.raw)
    return builder.sign(private, algorithm=None).public_bytes(serialization.Encoding.DER)


def _load(der: bytes) -> x509.Certificate:
    if len(der) > MAX_CERTIFICATE:
        raise TrustError(f"certificate of {len(der)} bytes is over the limit of {MAX_CERTIFICATE}")
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("not a certificate in DER form") from None


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        raise TrustError("certificate has no readable basic constraints") from None


def _subject(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not isinstance(names[0].value, str):
        raise TrustError("certificate must have exactly one common name")
    return names[0].value


def _identity(certificate: x509.Certificate) -> PublicKey:
    try:
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise TrustError("certificate holds no readable key") from None
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError(f"certificate holds a {type(key).__name__} where Ed25519 belongs")
    return PublicKey(key.public_bytes_raw())
