"""Signed messages: tag, version, body, signature. What every step begins by opening.

A body counts only for the tag that its signer gave it. Opening is bounded: a message over its type's limit is
refused before a byte of it is copied.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import TypeVar

from aggregation import wire
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import MaskedInput, Message
from aggregation.pki.identity import SIGNATURE, IdentityKey, PublicKey
from aggregation.wire import Codec

M = TypeVar("M", bound=Message)
VERSION = 1
OVERHEAD = 128  # bytes: more than magic, version, tag, lengths and signature take
MAX_MESSAGE = 2**29  # bytes of a body
_MAGIC = b"EA"
_LENGTH = 4  # bytes that say how long a header is


@dataclass(frozen=True, slots=True)
class Envelope:
    """A message as it travels."""

    magic: bytes
    version: int
    tag: str
    body: bytes
    signature: bytes


ENVELOPE: Codec[Envelope] = wire.record(
    Envelope,
    {
        "magic": wire.fixed(len(_MAGIC)),
        "version": wire.uint(8),
        "tag": wire.text(r"[a-z-]{1,32}"),
        "body": wire.blob(MAX_MESSAGE),
        "signature": wire.fixed(SIGNATURE),
    },
)


def sign(key: IdentityKey, message: Message) -> bytes:
    """Sign ``message`` and write it as it travels."""
    body = message.encode()
    return ENVELOPE.encode(Envelope(_MAGIC, VERSION, message.TAG, body, key.sign(message.TAG, body)))


def open_verified(kind: type[M], raw: bytes, signer: PublicKey, peer: str) -> M:
    """Return the message of type ``kind`` that ``signer`` signed.

    Args:
        kind: What is expected at this step.
        raw: As received.
        signer: Whose signature must be on it.
        peer: Name of the signer in errors.

    Raises:
        ProtocolError: Too large, not canonical, of another type or version, or not signed by ``signer``.
    """
    try:
        if len(raw) > kind.LIMIT + OVERHEAD:
            raise ProtocolError(f"{kind.TAG} of {len(raw)} bytes is over the limit of {kind.LIMIT}")
        envelope = ENVELOPE.decode(raw)
        if (envelope.magic, envelope.version) != (_MAGIC, VERSION):
            raise ProtocolError(f"not a message of protocol version {VERSION}")
        if envelope.tag != kind.TAG:
            raise ProtocolError(f"{envelope.tag} came where {kind.TAG} belongs")
        verify(signer, kind.TAG, envelope.body, envelope.signature)
        return kind.decode(envelope.body)
    except ProtocolError as error:
        raise error if error.peer else ProtocolError(str(error), peer) from None


def unverified_body(raw: bytes) -> bytes:
    """The body of a message whose signer is not known yet. Only to find out whom to verify it with.

    Raises:
        ProtocolError: Not a message.
    """
    return ENVELOPE.decode(raw).body


def signature(raw: bytes) -> bytes:
    """The signature on a message that was opened before."""
    return raw[-SIGNATURE:]


def with_body(raw: bytes, body: bytes) -> bytes:
    """The message with another body under the same signature: with none, for a reader who knows it already.

    Raises:
        ProtocolError: Not a message.
    """
    return ENVELOPE.encode(replace(ENVELOPE.decode(raw), body=body))


def verify(signer: PublicKey, tag: str, body: bytes, signature: bytes) -> None:
    """Return if ``signer`` signed ``body`` under ``tag``.

    Raises:
        ProtocolError: It did not.
    """
    try:
        signer.verify(tag, body, signature)
    except TrustError as error:
        raise ProtocolError(str(error)) from None


def sign_vector(key: IdentityKey, header: MaskedInput, packed: bytes | memoryview) -> bytes:
    """A masked input as it travels: vector, signed header, length of the header.

    The vector comes first, because numbers are added at twice the speed where they begin on a multiple of their size.
    """
    signed = sign(key, header)
    return b"".join((packed, signed, len(signed).to_bytes(_LENGTH, "big")))


def open_vector(raw: bytes, size: int, signer: PublicKey, peer: str) -> tuple[MaskedInput, memoryview]:
    """Return header and packed vector of ``size`` bytes, the one bound to the other; the vector is not copied.

    Raises:
        ProtocolError: As in ``open_verified``, another size, or a vector that is not the one signed.
    """
    packed, signed = split_vector(raw)
    if len(packed) != size or len(signed) > MaskedInput.LIMIT + OVERHEAD:
        raise ProtocolError(f"masked input of {len(raw)} bytes does not hold a header and {size} bytes", peer)
    header = open_verified(MaskedInput, bytes(signed), signer, peer)
    if hashlib.sha256(packed).digest() != header.vector:
        raise ProtocolError("vector is not the one that was signed", peer)
    return header, packed


def split_vector(raw: bytes) -> tuple[memoryview, memoryview]:
    """The packed vector and the signed header of a masked input, neither of them checked; nothing is copied."""
    view = memoryview(raw)
    end = max(len(raw) - _LENGTH, 0)
    start = max(end - int.from_bytes(view[end:], "big"), 0)
    return view[:start], view[start:end]
