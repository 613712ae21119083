"""A device's session state as encrypted bytes, so that a session survives a restart of the device; and other bytes.

The state is encoded canonically and encrypted with AES-256-GCM. Vectors are not part of it, nor is a round that was
planned but not answered: sealing ``Planned`` keeps only the rounds after it, so the restarted device counts as dropped
out of that one. A device that seals the new state before it sends the answer never answers a step twice.
"""

from dataclasses import replace
from functools import cache
from typing import Any, ClassVar, Self, TypeAlias, cast

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from aggregation import wire
from aggregation.client import Advertised, Confirmed, Masked, Planned, Ready
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.singleuse import SingleUse
from aggregation.wire import Codec

ClientState: TypeAlias = Advertised | Ready | Planned | Masked | Confirmed
_MAGIC = b"edgeadapt/state/1\x00"
_KEY, _NONCE = 32, 12  # bytes
_CODECS: dict[type, Codec[Any]] = {kind: wire.record(kind) for kind in (Advertised, Ready, Masked, Confirmed)}
_KINDS = tuple(_CODECS)


def seal(state: ClientState, key: bytes) -> bytes:
    """Encrypt ``state`` under ``key``, 32 bytes that never leave the device; different bytes on every call.

    ``Planned`` is stored as the ``Ready`` after its round. Law: ``unseal(seal(s, k), k) == s`` for every other state.
    Raises ConfigError: the key has another length.
    """
    kept = _kept(state)
    plain = bytes([_KINDS.index(type(kept))]) + _CODECS[type(kept)].encode(kept)
    return _MAGIC + encrypt(plain, key, _MAGIC)


def unseal(blob: bytes, key: bytes) -> ClientState:
    """Decrypt a state. Raises TrustError: altered, truncated, sealed under another key, or not a sealed state;
    ConfigError: the key has another length."""
    if blob[: len(_MAGIC)] != _MAGIC:
        raise TrustError("not a sealed session state of this version", about="sealed.version")
    plain = decrypt(blob[len(_MAGIC) :], key, _MAGIC)
    try:
        state: ClientState = _CODECS[_KINDS[plain[0]]].decode(plain[1:])
    except (ValueError, IndexError, ProtocolError, TrustError):
        raise TrustError("this is sealed, but it is not a session state", about="sealed.ciphertext") from None
    return state


def reopened(state: ClientState) -> ClientState:
    """A state that is kept in memory, as a message finds it. Law: it equals ``unseal(seal(state, k), k)``."""
    kept = _kept(state)
    if isinstance(kept, Masked | Confirmed):
        kept = replace(kept, ready=replace(kept.ready, single_use=SingleUse()))
    return replace(kept, single_use=SingleUse())


def _kept(state: ClientState) -> Advertised | Ready | Masked | Confirmed:
    return state.ready if isinstance(state, Planned) else state


def encrypt(plain: bytes, key: bytes, bound: bytes) -> bytes:
    """Encrypt ``plain`` with AES-256-GCM under a sealing key; different bytes on every call.

    Args:
        plain: At most 2^31 - 1 bytes.
        key: 32 bytes that never leave the device.
        bound: Associated data: what the bytes are and belong to. Different kinds of content have different ones.

    Raises ConfigError: the key has another length.
    """
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
