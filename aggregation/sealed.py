"""Bytes that a device keeps encrypted, with AES-256-GCM, and records of them in a canonical encoding."""

from functools import cache
from typing import Any, ClassVar, Self, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from aggregation import wire
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.wire import Codec

_KEY, _NONCE = 32, 12  # bytes


def encrypt(plain: bytes, key: bytes, bound: bytes) -> bytes:
    """Encrypt ``plain`` with AES-256-GCM under a sealing key; different bytes on every call. ``plain``: at most 2^31 -
    1 bytes. ``key``: 32 bytes that never leave the device. ``bound``: associated data: what the bytes are and belong
    to. Different kinds of content have different ones. Raises ConfigError: the key has another length."""
    nonce = SystemEntropy().bytes(_NONCE)
    return nonce + _cipher(key).encrypt(nonce, plain, bound)


def decrypt(blob: bytes, key: bytes, bound: bytes) -> bytes:
    """What ``encrypt`` encrypted. Raises TrustError: altered, truncated, or encrypted under another key or for another
    ``bound``; ConfigError: the key has another length."""
    try:
        return _cipher(key).decrypt(blob[:_NONCE], blob[_NONCE:], bound)
    except (InvalidTag, ValueError):
        text = "what is sealed here was altered, or is of another device or session"
        raise TrustError(text, about="sealed.ciphertext") from None


def _cipher(key: bytes) -> AESGCM:
    if len(key) != _KEY:
        raise ConfigError(f"a sealing key has {_KEY} bytes, not {len(key)}", about="sealed.key")
    return AESGCM(key)


class SealedRecord:
    """A record that a device keeps encrypted: a frozen dataclass. Law: ``open(seal(r, k), k) == r``."""

    __slots__ = ()
    MAGIC: ClassVar[bytes]  # begins the bytes of this kind of record

    def seal(self, key: bytes) -> bytes:
        """Encrypt it. ``key``: 32 bytes that never leave the device."""
        return self.MAGIC + encrypt(_codec(cast(Any, type(self))).encode(self), key, self.MAGIC)

    @classmethod
    def open(cls, raw: bytes, key: bytes) -> Self:
        """Decrypt what ``seal`` made. Raises TrustError, ConfigError as ``decrypt``."""
        record: Self = _codec(cast(Any, cls)).decode(decrypt(raw.removeprefix(cls.MAGIC), key, cls.MAGIC))
        return record


@cache
def _codec(kind: type[SealedRecord]) -> Codec[Any]:
    return wire.record(kind)
