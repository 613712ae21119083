"""The authority with its signing key. It issues its own, device and TLS certificates, and revocation lists."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki.certificates import Root, identity, load, require_device_id, subject
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.revocation import Revocation, RevocationList, sign_list
from aggregation.pki.tls import TlsPublicKey, extensions

MAX_NAME = 64  # bytes of a common name (X.520)


@dataclass(frozen=True, slots=True)
class Authority:
    """The authority with its signing key. Keep it offline."""

    key: IdentityKey
    der: bytes

    @classmethod
    def create(cls, name: str, entropy: Entropy, not_before: datetime, not_after: datetime) -> "Authority":
        """A new authority called ``name`` with a key from ``entropy``. Raises ConfigError: the name is empty or too
        long for a certificate, or ``not_after`` is not after ``not_before``."""
        if not 0 < len(name.encode(errors="replace")) <= MAX_NAME:
            raise ConfigError(
                f"an authority's name has 1 to {MAX_NAME} bytes: choose another one than {name[:MAX_NAME]!r}",
                about="authority.name",
            )
        key = IdentityKey.generate(entropy)
        serial = _serial(name, name, key.public, not_before, not_after)
        builder = _builder(name, name, _certified_key(key.public), not_before, not_after, serial=serial)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        return cls(key, _sign(builder, key))

    @property
    def root(self) -> Root:
        return Root(self.der)

    def issue(
        self, device_id: str, public: PublicKey, *, not_before: datetime, not_after: datetime, serial: int | None = None
    ) -> bytes:
        """Certify that ``public`` is the identity of ``device_id``; returns DER. ``serial``: a random number (RFC 5280,
        4.1.2.2); derived from the other fields by default. Raises ConfigError: ``device_id`` is not a device id, or
        ``not_after`` is not after ``not_before``."""
        require_device_id(device_id)
        issuer = subject(load(self.der))
        serial = _serial(issuer, device_id, public, not_before, not_after) if serial is None else serial
        builder = _builder(device_id, issuer, _certified_key(public), not_before, not_after, serial=serial)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        return _sign(builder, self.key)

    def issue_tls(
        self,
        name: str,
        public: TlsPublicKey,
        hosts: Sequence[str],
        *,
        not_before: datetime,
        not_after: datetime,
        serial: int,
    ) -> bytes:
        """Certify that the P-256 key ``public`` is the TLS key of the gateway ``name`` at ``hosts``; returns DER.
        Raises ConfigError as ``issue`` and ``tls.extensions``."""
        require_device_id(name)
        key = serialization.load_der_public_key(public.der)
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ConfigError("a key for TLS must be of the curve P-256", about="key.type")
        builder = _builder(name, subject(load(self.der)), key, not_before, not_after, serial=serial)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        for extension in extensions(hosts):
            builder = builder.add_extension(extension, critical=False)
        return _sign(builder, self.key)

    def revocations(
        self, number: int, revoked: Mapping[int, Revocation], this_update: datetime, next_update: datetime
    ) -> RevocationList:
        """Sign a revocation list, valid from ``this_update``, now, to ``next_update``. ``number``: above that of every
        earlier list. ``revoked``: by serial, all that a reader could still rely on, not only new ones. Raises
        ConfigError: ``next_update`` is not after ``this_update``."""
        private = Ed25519PrivateKey.from_private_bytes(self.key.raw)
        der = sign_list(load(self.der).subject, private, number, revoked, (this_update, next_update))
        return self.root.revocations(der)

    def to_pem(self) -> bytes:
        """Private key, then certificate. Write it only where nobody else can read it."""
        return self.key.to_pem() + self.root.to_pem()

    @classmethod
    def from_pem(cls, pem: bytes) -> "Authority":
        """Read what ``to_pem`` wrote. Raises TrustError: key or certificate is missing or damaged, or they do not
        match."""
        key, root = IdentityKey.from_pem(pem), Root.from_pem(pem)
        if identity(load(root.der)) != key.public:
            raise TrustError("the authority's key and certificate do not match", about="authority.key")
        return cls(key, root.der)


def _builder(
    subject: str,
    issuer: str,
    public: Ed25519PublicKey | ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
    *,
    serial: int,
) -> x509.CertificateBuilder:
    if not not_before < not_after:
        raise ConfigError(f"certificate of {subject} would end before it begins", about="certificate.validity")
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(not_before)
        .not_valid_after(not_after)
    )


def _certified_key(public: PublicKey) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public.raw)


def new_serial(entropy: Entropy) -> int:
    """A serial of 158 random bits (RFC 5280, 4.1.2.2), of 20 bytes in DER whatever it is. So certificates, and the
    answers that carry them, have one length for each length of a name."""
    return int.from_bytes(entropy.bytes(20), "big") % 2**158 | 2**158


def _serial(issuer: str, subject: str, public: PublicKey, not_before: datetime, not_after: datetime) -> int:
    """From the certified fields: different certificates have different serials."""
    stamp = f"{issuer}\x00{subject}\x00{not_before.isoformat()}\x00{not_after.isoformat()}\x00".encode()
    return int.from_bytes(hashlib.sha256(stamp + public.raw).digest()[:19], "big") + 1


def _sign(builder: x509.CertificateBuilder, key: IdentityKey) -> bytes:
    private = Ed25519PrivateKey.from_private_bytes(key.raw)
    return builder.sign(private, algorithm=None).public_bytes(serialization.Encoding.DER)
