"""Certificates for TLS: P-256 keys of the fleet's devices and gateways, certified by the same authority.

TLS libraries, gRPC's among them, refuse Ed25519 leaf certificates. So a device has two keys under one name: its Ed25519
identity, which signs what the protocol says, and a P-256 key, which protects its connection. A *binding* is the
identity's signature on the TLS certificate: the two belong to one device, not only to one name. A certificate is for
one side of TLS only (extended key usage, RFC 5280, section 4.2.1.12): no device can pose as a gateway.
"""

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki.certificates import Root, is_authority, is_device_id, load, require_device_id, subject
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.requests import parsed

BINDING = "tls-binding"  # the tag of the identity's signature
CHALLENGE = "websocket-challenge"  # the same where a browser answers a gateway's challenge
RENEWAL = "renewal"  # the same on the request for the next TLS key; of a page, which has none, on its certificate
_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256 (SEC 2, section 2.4.2)


class TlsRole(Enum):
    """Which side of TLS a certificate is for."""

    DEVICE = "device"  # the client
    GATEWAY = "gateway"  # the server

    @property
    def usage(self) -> x509.ObjectIdentifier:
        return ExtendedKeyUsageOID.CLIENT_AUTH if self is TlsRole.DEVICE else ExtendedKeyUsageOID.SERVER_AUTH


@dataclass(frozen=True, slots=True)
class TlsKey:
    """A P-256 private key. ``pem``: PKCS #8, not encrypted; write it only where nobody else can read it.

    Raises:
        TrustError: Not the PEM of a P-256 private key.
    """

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
        """A request (PKCS #10) for a TLS certificate for ``name``, in PEM.

        Raises:
            ConfigError: Neither a device nor a gateway can have this name.
        """
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
    """Name and key in a request, PEM or DER, that was signed with that key.

    Raises:
        TrustError: Not such a request, or one for a certificate that the authority does not issue.
    """
    name, key = parsed(raw)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        kind = type(key).__name__
        raise TrustError(f"the request is for a {kind}, not a P-256 key", about="request.key", value=kind)
    return name, _public(key)


def extensions(role: TlsRole, hosts: Sequence[str]) -> tuple[x509.ExtensionType, ...]:
    """What a TLS certificate has besides the basic constraints.

    Args:
        role: Which side it is for.
        hosts: Names and IP addresses of a gateway, at which devices reach it; none for a device.

    Raises:
        ConfigError: A gateway without hosts, a device with hosts, or a host that is no name.
    """
    if bool(hosts) != (role is TlsRole.GATEWAY):
        text = "a gateway's certificate names its hosts, and a device's names none"
        raise ConfigError(text, about="tls.hosts", value=list(hosts))
    usage = x509.ExtendedKeyUsage([role.usage])
    return (usage, x509.SubjectAlternativeName([_host(host) for host in hosts])) if hosts else (usage,)


def verify_tls(root: Root, der: bytes, role: TlsRole, at: datetime) -> str:
    """Return the name for which the authority certified the TLS key in ``der``.

    Args:
        root: The pinned authority, with its newest revocation list.
        der: A certificate, DER.
        role: Which side of TLS presented it.
        at: The present time.

    Raises:
        TrustError: Not a TLS certificate of this authority for ``role``, revoked, or not valid at ``at``.
    """
    certificate, authority = load(der), load(root.der)
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        raise TrustError("TLS certificate was not issued by the pinned authority", about="tls.issuer") from None
    if is_authority(certificate):
        raise TrustError("the TLS certificate is an authority's", about="tls.basic-constraints")
    name = subject(certificate)
    if not is_device_id(name):
        raise TrustError(f"certified name {name[:64]!r} is not a device id", about="tls.common-name", value=name[:64])
    try:
        usages = tuple(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
        key = certificate.public_key()
    except (ValueError, UnsupportedAlgorithm, x509.ExtensionNotFound):
        raise TrustError(f"certificate of {name} is not for TLS", about="tls.usage", value=name) from None
    if usages != (role.usage,):
        raise TrustError(f"TLS certificate of {name} is not for a {role.value}", about="tls.usage", value=name)
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise TrustError(f"TLS certificate of {name} has no P-256 key", about="tls.key", value=name)
    if root.revoked is not None and certificate.serial_number in root.revoked.revoked:
        raise TrustError(f"TLS certificate of {name} is revoked", about="tls.revoked", value=name)
    if not certificate.not_valid_before_utc <= at <= min(certificate.not_valid_after_utc, root.not_after):
        raise TrustError(f"TLS certificate of {name} is not valid at {at:%Y-%m-%d %H:%M}", about="tls.validity")
    return name


def hosts_of(der: bytes) -> tuple[str, ...]:
    """The names and IP addresses in a gateway's certificate, as ``extensions`` took them; none in a device's.

    Raises:
        TrustError: Not a certificate, or its names cannot be read.
    """
    try:
        names = load(der).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    except ValueError:
        raise TrustError("the names in the TLS certificate cannot be read", about="tls.hosts") from None
    return tuple(str(name.value) for name in names)


def bind(identity: IdentityKey, certificate: bytes) -> bytes:
    """The identity's signature on a TLS certificate in DER: its owner has both keys."""
    return identity.sign(BINDING, certificate)


def verify_binding(root: Root, tls_certificate: bytes, certificate: bytes, binding: bytes, at: datetime) -> str:
    """Return the device that has both the TLS key and the identity key. All in DER.

    Args:
        root: The pinned authority, with its newest revocation list.
        tls_certificate: With which the peer proved possession of its key in the TLS handshake.
        certificate: Of the device's identity.
        binding: ``bind`` of the two.
        at: The present time.

    Raises:
        TrustError: One of the certificates is not valid, they are of two devices, or the identity did not sign.
    """
    tls_name = verify_tls(root, tls_certificate, TlsRole.DEVICE, at)
    name, key = root.verify(certificate, at)
    if name != tls_name:
        text = f"the connection is that of {tls_name}, and the identity that of {name}"
        raise TrustError(text, about="tls.binding", value=name)
    key.verify(BINDING, tls_certificate, binding)
    return name


def verify_challenge(root: Root, challenge: bytes, certificate: bytes, signature: bytes, at: datetime) -> str:
    """Return the device that signed a challenge of this gateway.

    Args:
        root: The pinned authority, with its newest revocation list.
        challenge: The gateway's nonce, and the name of its host, to which the device connected.
        certificate: Of the device's identity, in DER.
        signature: Of that identity.
        at: The present time.

    Raises:
        TrustError: The certificate is not valid, or the identity did not sign.
    """
    name, key = root.verify(certificate, at)
    key.verify(CHALLENGE, challenge, signature)
    return name


def verify_page_renewal(root: Root, certificate: bytes, signature: bytes, at: datetime) -> tuple[str, PublicKey]:
    """Return name and key of the page that wants a newer certificate for its identity.

    Args:
        root: The authority.
        certificate: Of the identity, in DER.
        signature: Of the identity, on ``certificate``.
        at: The present time.

    Raises:
        TrustError: The certificate is not valid, or the identity did not sign.
    """
    name, key = root.verify(certificate, at)
    key.verify(RENEWAL, certificate, signature)
    return name, key


def _public(key: ec.EllipticCurvePublicKey) -> TlsPublicKey:
    info = serialization.PublicFormat.SubjectPublicKeyInfo
    return TlsPublicKey(key.public_bytes(serialization.Encoding.DER, info))


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return x509.DNSName(require_device_id(host))
    except (ConfigError, ValueError):
        text = f"{host[:64]!r} is neither the name of a host nor an IP address"
        raise ConfigError(text, about="tls.hosts", value=host[:64]) from None
