"""Certificates for the TLS of a gateway: a P-256 key, certified by the fleet's authority for the names of its hosts.

TLS libraries, gRPC's among them, refuse Ed25519 leaf certificates, so a gateway's TLS key is of another kind than the
identities. Its certificate is for the server's side only (extended key usage, RFC 5280, section 4.2.1.12), and no
device has one: no device can pose as a gateway. A device proves who it is by its identity's signature, after TLS."""

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki.certificates import Root, is_authority, is_device_id, load, require_device_id, subject
from aggregation.pki.requests import parsed

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (SEC 2, section 2.4.2)


@dataclass(frozen=True, slots=True)
class TlsKey:
    """A P-256 private key. ``pem``: PKCS #8, not encrypted; write it only where nobody else can read it. Raises
    TrustError: not the PEM of a P-256 private key."""

    pem: bytes = field(repr=False)

    def __post_init__(self) -> None:
        self._private()

    @classmethod
    def generate(cls, entropy: Entropy) -> "TlsKey":
        """A new key from 48 bytes of ``entropy`` (FIPS 186-5, A.2.1: the bias is below 2^-128)."""
        scalar = int.from_bytes(entropy.bytes(48), "big") % (_ORDER - 1) + 1
        key = ec.derive_private_key(scalar, ec.SECP256R1())
        plain = serialization.NoEncryption()
        return cls(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))

    def request(self, name: str) -> bytes:
        """A request (PKCS #10) for a TLS certificate for ``name``, in PEM. Raises ConfigError: neither a device nor a
        gateway can have this name."""
        named = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, require_device_id(name))])
        signed = x509.CertificateSigningRequestBuilder(named).sign(self._private(), hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM)

    def public(self) -> ec.EllipticCurvePublicKey:
        return self._private().public_key()

    def _private(self) -> ec.EllipticCurvePrivateKey:
        try:
            key = serialization.load_pem_private_key(self.pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            raise TrustError("not an unencrypted private key in PEM form", about="key.pem") from None
        if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
            raise TrustError("a key for TLS must be of the curve P-256", about="key.type")
        return key


@dataclass(frozen=True, slots=True)
class TlsPublicKey:
    """The public half, as its SubjectPublicKeyInfo in DER (RFC 5480)."""

    der: bytes

    @property
    def key_id(self) -> str:
        """Sixteen hex characters: a name, not a proof."""
        return hashlib.sha256(self.der).hexdigest()[:16]


def read_tls_request(raw: bytes) -> tuple[str, TlsPublicKey]:
    """Name and key in a request, PEM or DER, that was signed with that key. Raises TrustError: not such a request, or
    one for a certificate that the authority does not issue."""
    name, key = parsed(raw)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        kind = type(key).__name__
        raise TrustError(f"the request is for a {kind}, not a P-256 key", about="request.key")
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return name, TlsPublicKey(key.public_bytes(serialization.Encoding.DER, info))


def extensions(hosts: Sequence[str]) -> tuple[x509.ExtensionType, ...]:
    """What a TLS certificate has besides the basic constraints. ``hosts``: names and IP addresses of the gateway.
    Raises ConfigError: there are none, or one is neither a name nor an address."""
    if not hosts:
        raise ConfigError("a gateway's certificate names its hosts", about="tls.hosts")
    names = x509.SubjectAlternativeName([_host(host) for host in hosts])
    return x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), names


def verify_tls(root: Root, der: bytes, at: datetime) -> str:
    """Return the name of the gateway for which the authority certified the TLS key in ``der``. ``root``: the pinned
    authority, with its newest revocation list. Raises TrustError: not a gateway's TLS certificate of this authority,
    revoked, or not valid at ``at``."""
    certificate, authority = load(der), load(root.der)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise TrustError("TLS certificate was not issued by the pinned authority", about="tls.issuer") from None
    if is_authority(certificate):
        raise TrustError("the TLS certificate is an authority's", about="tls.basic-constraints")
    name = subject(certificate)
    if not is_device_id(name):
        raise TrustError(f"certified name {name[:64]!r} is not a device id", about="tls.common-name")
    try:
        usages = tuple(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        raise TrustError(f"certificate of {name} is not for TLS", about="tls.usage") from None
    if usages != (ExtendedKeyUsageOID.SERVER_AUTH,):
        raise TrustError(f"TLS certificate of {name} is not for a gateway", about="tls.usage")
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TrustError(f"TLS certificate of {name} has no P-256 key", about="tls.key")
    if root.revoked is not None and certificate.serial_number in root.revoked.revoked:
        raise TrustError(f"TLS certificate of {name} is revoked", about="tls.revoked")
    if not certificate.not_valid_before_utc <= at <= min(certificate.not_valid_after_utc, root.not_after):
        raise TrustError(f"TLS certificate of {name} is not valid at {at:%Y-%m-%d %H:%M}", about="tls.validity")
    return name


def hosts_of(der: bytes) -> tuple[str, ...]:
    """The names and IP addresses in a gateway's certificate, as ``extensions`` took them. Raises TrustError: not a
    certificate, or its names cannot be read."""
    try:
        names = load(der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    except ValueError:
        raise TrustError("the names in the TLS certificate cannot be read", about="tls.hosts") from None
    return tuple(str(name.value) for name in names)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(require_device_id(host))
    except (ConfigError, ValueError):
        text = f"{host[:64]!r} is neither the name of a host nor an IP address"
        raise ConfigError(text, about="tls.hosts") from None
