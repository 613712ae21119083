"""Signed messages: tag, version, body, signature. Every step begins by verifying one. A body is valid only under the
tag for which its signer signed it. Verification is bounded: a message over the limit of its type is refused before its
content is copied."""

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated, Any, cast

from aggregation import wire
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import M, MaskedInput, Message
from aggregation.pki.identity import SIGNATURE, IdentityKey, PublicKey
from aggregation.wire import Codec

VERSION = 1
OVERHEAD = 128  # bytes: more than magic, version, tag, lengths and signature take
MAX_MESSAGE = 2**29  # bytes of a body
MAGIC = b"EA"
REPEATED = 64  # messages to all devices that a process does not verify again,
LONGEST_REPEATED = 2**20  # each of at most so many bytes
_LENGTH = 4  # bytes of a header's length


@dataclass(frozen=True, slots=True)
class Envelope:
    magic: Annotated[bytes, wire.fixed(len(MAGIC))]
    version: Annotated[int, wire.uint(8)]
    tag: Annotated[str, wire.text(r"[a-z-]{1,32}")]
    body: Annotated[bytes, wire.blob(MAX_MESSAGE)]
    signature: Annotated[bytes, wire.fixed(SIGNATURE)]


ENVELOPE: Codec[Envelope] = wire.record(Envelope)


def sign(key: IdentityKey, message: Message) -> bytes:
    body = message.encode()
    return ENVELOPE.encode(Envelope(MAGIC, VERSION, message.TAG, body, key.sign(message.TAG, body)))


def open_verified(kind: type[M], raw: bytes, signer: PublicKey, peer: str) -> M:
    """Return the message of type ``kind`` that ``signer`` signed. ``peer``: name of the signer in errors. Raises
    ProtocolError: too large, not canonical, of another type or version, or not signed by ``signer``."""
    try:
        if len(raw) > kind.LIMIT + OVERHEAD:
            message = f"{kind.TAG} of {len(raw)} bytes is over the limit of {kind.LIMIT}"
            raise ProtocolError(message, about="envelope.size")
        envelope = ENVELOPE.decode(raw)
        if (envelope.magic, envelope.version) != (MAGIC, VERSION):
            raise ProtocolError(f"not a message of protocol version {VERSION}", about="envelope.version")
        if envelope.tag != kind.TAG:
            raise ProtocolError(f"expected {kind.TAG}, got {envelope.tag}", about="envelope.tag")
        verify(signer, kind.TAG, envelope.body, envelope.signature)
        return kind.decode(envelope.body)
    except ProtocolError as error:
        raise error if error.peer else ProtocolError.of(error, peer) from None


def open_repeated(kind: type[M], raw: bytes, signer: PublicKey, peer: str) -> M:
    """As ``open_verified``, for a message that many devices receive: a process that simulates them opens it once. The
    outcome depends on the arguments alone, and only a success is kept (docs/decisions/0032-verified-once.md)."""
    if len(raw) > LONGEST_REPEATED:
        return open_verified(kind, raw, signer, peer)
    return cast(M, _opened_once(cast(Hashable, kind), raw, signer, peer))


@lru_cache(maxsize=REPEATED)
def _opened_once(kind: Any, raw: bytes, signer: PublicKey, peer: str) -> Any:
    return open_verified(kind, raw, signer, peer)


def unverified_body(raw: bytes) -> bytes:
    """The body of a message whose signer is not known yet: only to find out which key must verify it. Raises
    ProtocolError: not a message."""
    return ENVELOPE.decode(raw).body


def signature(raw: bytes) -> bytes:
    """The signature on a message that was verified before."""
    return raw[-SIGNATURE:]


def with_body(raw: bytes, body: bytes) -> bytes:
    """The message with another body under the same signature; an empty one where the reader can restore the body.
    Raises ProtocolError: not a message."""
    return ENVELOPE.encode(replace(ENVELOPE.decode(raw), body=body))


def verify(signer: PublicKey, tag: str, body: bytes, signature: bytes) -> None:
    """Check that ``signer`` signed ``body`` under ``tag``. Raises ProtocolError."""
    with ProtocolError.blaming(None, TrustError):
        signer.verify(tag, body, signature)


def sign_vector(key: IdentityKey, header: MaskedInput, packed: bytes | memoryview) -> bytes:
    """A masked input as it travels: vector, signed header, length of the header. The vector comes first, because adding
    it is twice as fast where its elements are aligned to their size."""
    signed = sign(key, header)
    return b"".join((packed, signed, len(signed).to_bytes(_LENGTH, "big")))


def open_vector(raw: bytes, size: int, signer: PublicKey, peer: str) -> tuple[MaskedInput, memoryview]:
    """Return the verified header and the packed vector of ``size`` bytes that it signs; the vector is not copied.
    Raises ProtocolError as ``open_verified``, another size, or a vector that is not the one signed."""
    packed, signed = split_vector(raw)
    if len(packed) != size or len(signed) > MaskedInput.LIMIT + OVERHEAD:
        message = f"masked input of {len(raw)} bytes does not hold a header and {size} bytes"
        raise ProtocolError(message, peer, about="masked-input.size")
    header = open_verified(MaskedInput, bytes(signed), signer, peer)
    if hashlib.sha256(packed).digest() != header.vector:
        raise ProtocolError("the vector is not the one that was signed", peer, about="masked-input.vector")
    return header, packed


def split_vector(raw: bytes) -> tuple[memoryview, memoryview]:
    """The packed vector and the signed header of a masked input, neither of them checked nor copied."""
    view = memoryview(raw)
    end = max(len(raw) - _LENGTH, 0)
    start = max(end - int.from_bytes(view[end:], "big"), 0)
    return view[:start], view[start:end]
