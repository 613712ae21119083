"""What is read from a certificate, each in the one form that is accepted."""

import re

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.x509.oid import NameOID

from aggregation.errors import TrustError
from aggregation.pki.identity import PublicKey

DEVICE_ID = r"[A-Za-z0-9][A-Za-z0-9._:-]{0,63}"  # X.520 allows a common name 64 characters
NAME = re.compile(DEVICE_ID, re.ASCII)
MAX_CERTIFICATE = 2048  # bytes of DER; ours have about 350


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
