"""Certificate requests (PKCS #10, RFC 2986): how a device's key reaches the authority. A request is signed with the key
that it holds, so nobody can have another's key certified under their own name. It does not prove who sent it: the
operator of the authority compares the key's id with the one that the device shows."""

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import NameOID

from aggregation.errors import TrustError
from aggregation.pki.certificates import constraints, is_device_id, require_device_id
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.revocation import require_whole_bytes

MAX_REQUEST = 8192  # bytes; ours have about 350 in PEM
_PEM = b"-----BEGIN CERTIFICATE REQUEST-----"


def request(key: IdentityKey, name: str) -> bytes:
    """A request for a certificate for the device ``name``, in PEM. Raises ConfigError: a device cannot have this
    name."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, require_device_id(name))])
    builder = x509.CertificateSigningRequestBuilder(subject)
    signed = builder.sign(Ed25519PrivateKey.from_private_bytes(key.raw), algorithm=None)
    return signed.public_bytes(serialization.Encoding.PEM)


def read_request(raw: bytes) -> tuple[str, PublicKey]:
    """Name and key in a request, PEM or DER, that was signed with that key. Raises TrustError: not such a request, or
    one for a certificate that the authority does not issue."""
    name, key = parsed(raw)
    if not isinstance(key, Ed25519PublicKey):
        kind = type(key).__name__
        raise TrustError(f"the request is for a {kind}, not an Ed25519 key", about="request.key")
    return name, PublicKey(key.public_bytes_raw())


def parsed(raw: bytes) -> tuple[str, CertificatePublicKeyTypes]:
    """Name and key of any kind in a request that was signed with that key. Raises as ``read_request``."""
    try:
        if len(raw) > MAX_REQUEST:
            raise ValueError
        asked = x509.load_pem_x509_csr(raw) if raw.lstrip().startswith(_PEM) else x509.load_der_x509_csr(raw)
        require_whole_bytes(asked.public_bytes(serialization.Encoding.DER), asked.signature)
        key, signed = asked.public_key(), asked.is_signature_valid
        names = [str(each.value) for each in asked.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion):
        raise TrustError("not a certificate request (PKCS #10) in PEM or DER form", about="request") from None
    if not signed:
        raise TrustError("the request was not signed with the key that it is for", about="request.signature")
    asks = constraints(asked, "request")
    if asks is not None and asks.ca:
        raise TrustError("the request is for an authority's certificate", about="request.basic-constraints")
    if len(names) != 1 or not is_device_id(names[0]):
        raise TrustError("the request does not name one device in its common name", about="request.common-name")
    return names[0], key
