"""A device's session state as encrypted bytes, so that a session survives a restart of the device.

Vectors are not part of it, nor is a round that was
planned but not answered: sealing ``Planned`` keeps only the rounds after it, so the restarted device counts as dropped
out of that one. A device that seals the new state before it sends the answer never answers a step twice."""

from dataclasses import replace
from typing import Any, TypeAlias

from aggregation import wire
from aggregation.client import Advertised, Confirmed, Masked, Planned, Ready
from aggregation.errors import ProtocolError, TrustError
from aggregation.sealed import decrypt, encrypt
from aggregation.singleuse import SingleUse
from aggregation.wire import Codec

ClientState: TypeAlias = Advertised | Ready | Planned | Masked | Confirmed
_MAGIC = b"edgeadapt/state/1\x00"
_CODECS: dict[type, Codec[Any]] = {kind: wire.record(kind) for kind in (Advertised, Ready, Masked, Confirmed)}
_KINDS = tuple(_CODECS)


def seal(state: ClientState, key: bytes) -> bytes:
    """Encrypt ``state`` under ``key``, 32 bytes that never leave the device; different bytes on every call. ``Planned``
    is stored as the ``Ready`` after its round. Law: ``unseal(seal(s, k), k) == s`` for every other state. Raises
    ConfigError: the key has another length."""
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
