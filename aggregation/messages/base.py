"""What every message has: an encoding that follows from its fields, and a digest under its own tag."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from aggregation import wire
from aggregation.pki import DEVICE_ID
from aggregation.wire import Codec

DIGEST = 32  # bytes of SHA-256
MAX_COHORT = 10_000
MIB = 2**20  # bytes

DIGESTS: Codec[bytes] = wire.fixed(DIGEST)
DEVICES: Codec[str] = wire.text(DEVICE_ID)
HEX: Codec[str] = wire.text(r"[0-9a-f]{64}")
U32: Codec[int] = wire.uint(32)


@dataclass(frozen=True, slots=True)
class Message:
    """Base of all messages: an encoding that follows from ``FIELDS``, and a digest under the message's own tag."""

    TAG: ClassVar[str]
    LIMIT: ClassVar[int]
    FIELDS: ClassVar[Mapping[str, Codec[Any]]]

    @classmethod
    def codec(cls) -> Codec[Self]:
        """Both directions of the encoding."""
        return wire.record(cls, cls.FIELDS)

    def encode(self) -> bytes:
        """The canonical bytes.

        Raises:
            ConfigError: A field is over its limit.
        """
        return self.codec().encode(self)

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """The message of ``raw``. Law: ``decode(raw).encode() == raw``.

        Raises:
            ProtocolError: Anything but the canonical bytes of one such message.
        """
        return cls.codec().decode(raw)

    def digest(self) -> bytes:
        """SHA-256 of tag and canonical bytes."""
        return hashlib.sha256(self.TAG.encode() + b"\x00" + self.encode()).digest()
