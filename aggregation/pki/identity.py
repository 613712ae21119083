"""Ed25519 identities: who signed a body, and for what purpose.

Every signature covers a tag with the body, so bytes signed for one purpose are not valid for another. RFC 8032 defines
the signature; the framing below is this project's. Which keys are trusted is not decided here, only that a key can be
one: under a point of small order a single signature is valid for any number of messages, and without knowing a secret.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Annotated

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from aggregation import wire
from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, TrustError

SIGNATURE = 64  # bytes
KEY = 32  # bytes, public or private
_FRAME = b"edgeadapt/1\x00"
_FIELD = 2**255 - 19  # coordinates are integers modulo this (RFC 8032, section 5.1)
_ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7  # y of two points of order 8
# The y-coordinates of all eight points whose order divides 8 (Chalkias et al. 2020, "Taming the many EdDSAs", table 1).
_SMALL_ORDER = frozenset({0, 1, _FIELD - 1, _ORDER_8, _FIELD - _ORDER_8})


def _framed(tag: str, body: bytes) -> bytes:
    raw = tag.encode("ascii")
    if not 0 < len(raw) < 256:
        raise ConfigError(f"signature tag {tag[:40]!r} must have 1 to 255 characters", about="signature.tag")
    return _FRAME + bytes([len(raw)]) + raw + body


@dataclass(frozen=True, slots=True)
class PublicKey:
    """The public half of an identity: 32 raw bytes (RFC 8032, section 5.1.5). Every public key of the project is read
    through this class: of certificates, requests, pinned files and trust lists. Raises TrustError: another length, a
    point of small order, or a second encoding of a point: two readers of one key must not see two."""

    raw: Annotated[bytes, wire.fixed(KEY)]

    def __post_init__(self) -> None:
        if len(self.raw) != KEY:
            text = f"an Ed25519 public key has {KEY} bytes, not {len(self.raw)}"
            raise TrustError(text, about="key.length")
        y = int.from_bytes(self.raw, "little") % 2**255  # without the sign of x
        if y >= _FIELD:
            text = "an Ed25519 key in an encoding that RFC 8032 does not allow: generate another one"
            raise TrustError(text, about="key.encoding")
        if y in _SMALL_ORDER:
            text = "a point of small order is not an Ed25519 key, since anyone can sign for it: generate another one"
            raise TrustError(text, about="key.small-order")

    @property
    def key_id(self) -> str:
        """Sixteen hex characters for logs and file names: a name, not a proof."""
        return hashlib.sha256(self.raw).hexdigest()[:16]

    def verify(self, tag: str, body: bytes, signature: bytes) -> None:
        """Check that this key signed ``body`` for ``tag``. Raises TrustError."""
        try:
            Ed25519PublicKey.from_public_bytes(self.raw).verify(signature, _framed(tag, body))
        except (InvalidSignature, ValueError):
            raise TrustError(f"signature of {self.key_id} on {tag!r} is not valid", about="signature") from None

    def to_pem(self) -> bytes:
        return Ed25519PublicKey.from_public_bytes(self.raw).public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @classmethod
    def from_pem(cls, pem: bytes) -> "PublicKey":
        """Raises TrustError: not the PEM of an Ed25519 public key."""
        try:
            key = serialization.load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            raise TrustError("not a public key in PEM form", about="key.pem") from None
        if not isinstance(key, Ed25519PublicKey):
            kind = type(key).__name__
            raise TrustError(f"expected an Ed25519 public key, got {kind}", about="key.type")
        return cls(key.public_bytes_raw())


@dataclass(frozen=True, slots=True)
class IdentityKey:
    """The private half of an identity. Its bytes appear in no ``repr``, and so in no log and no traceback."""

    raw: bytes = field(repr=False)
    _key: Ed25519PrivateKey = field(init=False, repr=False, compare=False)  # loading it costs as much as signing

    def __post_init__(self) -> None:
        if len(self.raw) != KEY:
            raise TrustError(f"an Ed25519 private key has {KEY} bytes, not {len(self.raw)}", about="key.length")
        object.__setattr__(self, "_key", Ed25519PrivateKey.from_private_bytes(self.raw))

    @classmethod
    def generate(cls, entropy: Entropy) -> "IdentityKey":
        return cls(entropy.bytes(KEY))

    @property
    def public(self) -> PublicKey:
        return PublicKey(self._key.public_key().public_bytes_raw())

    def sign(self, tag: str, body: bytes) -> bytes:
        """Sign ``body`` for the purpose ``tag``: 64 bytes, the same for the same input (RFC 8032, section 5.1.6)."""
        return self._key.sign(_framed(tag, body))

    def to_pem(self, passphrase: bytes | None = None) -> bytes:
        """PKCS #8 in PEM. Without a passphrase it is not encrypted: write it only where nobody else can read it."""
        encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
        return self._key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)

    @classmethod
    def from_pem(cls, pem: bytes, passphrase: bytes | None = None) -> "IdentityKey":
        """Read what ``to_pem`` wrote. Raises TrustError: not the PEM of an Ed25519 private key, or encrypted under
        another passphrase."""
        try:
            key = serialization.load_pem_private_key(pem, password=passphrase)
        except (ValueError, TypeError, UnsupportedAlgorithm, InternalError):  # the last for an X448 key of 32 bytes
            if passphrase is not None:
                text = "the passphrase is wrong, or this is not a private key in PEM form"
                raise TrustError(text, about="key.passphrase") from None
            raise TrustError("not an unencrypted private key in PEM form", about="key.pem") from None
        if not isinstance(key, Ed25519PrivateKey):
            kind = type(key).__name__
            raise TrustError(f"expected an Ed25519 private key, got {kind}", about="key.type")
        return cls(key.private_bytes_raw())
