"""How a device's key gets to the authority and the certificate back: requests (PKCS #10, RFC 2986), and PEM or DER.

A request is signed with the key that it holds, so nobody can have another's key certified in their own name. It does
not say who sent it: whoever runs the authority compares the key's id with the one that the device shows.
"""

import re
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import NameOID

from aggregation.errors import ConfigError, TrustError
from aggregation.pki import DEVICE_ID
from aggregation.pki.identity import IdentityKey, PublicKey

MAX_REQUEST = 8192  # bytes; ours have about 350 in PEM
_PEM = b"-----BEGIN CERTIFICATE REQUEST-----"
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_DEVICE_ID = re.compile(DEVICE_ID, re.ASCII)


def require_name(name: str) -> str:
    """``name``, if a device can be called that.

    Raises:
        ConfigError: It is not 1 to 64 letters, digits, dots, colons, dashes, underscores, from a letter or digit on.
    """
    if not _DEVICE_ID.fullmatch(name):
        raise ConfigError(f"device name {name[:64]!r} is not of the form {DEVICE_ID}")
    return name


def request(key: IdentityKey, name: str) -> bytes:
    """Ask for a certificate for the device ``name``; PEM.

    Raises:
        ConfigError: A device cannot be called that.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, require_name(name))])
    builder = x509.CertificateSigningRequestBuilder(subject)
    signed = builder.sign(Ed25519PrivateKey.from_private_bytes(key.raw), algorithm=None)
    return signed.public_bytes(serialization.Encoding.PEM)


def read_request(raw: bytes) -> tuple[str, PublicKey]:
    """Name and key in a request, PEM or DER, that was signed with that key.

    Raises:
        TrustError: Not such a request.
    """
    try:
        if len(raw) > MAX_REQUEST:
            raise ValueError
        pem = raw.lstrip().startswith(_PEM)
        asked = x509.load_pem_x509_csr(raw) if pem else x509.load_der_x509_csr(raw)
        key, signed = asked.public_key(), asked.is_signature_valid
        names = [str(each.value) for each in asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion):
        raise TrustError("not a certificate request (PKCS #10) in PEM or DER form") from None
    if not isinstance(key, Ed25519PublicKey):
        raise TrustError(f"the request is for a {type(key).__name__} where Ed25519 belongs")
    if not signed:
        raise TrustError("the request was not signed with the key that it is for")
    if len(names) != 1 or not _DEVICE_ID.fullmatch(names[0]):
        raise TrustError("the request does not name one device in its common name")
    return names[0], PublicKey(key.public_bytes_raw())


def to_pem(der: bytes) -> bytes:
    """A certificate as it is handed over."""
    return x509.load_der_x509_certificate(der).public_bytes(serialization.Encoding.PEM)


def to_der(raw: bytes) -> bytes:
    """A certificate in PEM or DER as DER. Who issued it is not checked: ``Root.verify`` does that.

    Raises:
        TrustError: Not a certificate.
    """
    try:
        pem = raw.lstrip().startswith(_CERTIFICATE)
        found = x509.load_pem_x509_certificate(raw) if pem else x509.load_der_x509_certificate(raw)
    except (ValueError, x509.InvalidVersion):
        raise TrustError("not a certificate in PEM or DER form") from None
    return found.public_bytes(serialization.Encoding.DER)


def ends(der: bytes) -> datetime:
    """When a certificate ends."""
    return x509.load_der_x509_certificate(der).not_valid_after_utc
