"""What every codec is, and the cursor that it reads from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from aggregation.errors import ProtocolError

T = TypeVar("T")


class Reader:
    """A cursor over bytes that never reads past their end."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Bytes not read yet."""
        return len(self._data) - self._at

    def take(self, n: int) -> bytes:
        """Return the next ``n`` bytes.

        Raises:
            ProtocolError: Fewer than ``n`` are left.
        """
        if n > self.left:
            raise ProtocolError(f"message is truncated: {n} bytes expected, {self.left} left")
        self._at += n
        return self._data[self._at - n : self._at]


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How one type is written and read. ``write`` appends to a buffer; ``read`` consumes from a ``Reader``."""

    write: Callable[[bytearray, T], None]
    read: Callable[[Reader], T]

    def encode(self, value: T) -> bytes:
        """The canonical bytes of ``value``.

        Raises:
            ConfigError: A field is over its limit, so no reader would accept it.
        """
        out = bytearray()
        self.write(out, value)
        return bytes(out)

    def decode(self, raw: bytes) -> T:
        """The value of ``raw``. Law: ``encode(decode(raw)) == raw``.

        Raises:
            ProtocolError: Anything but the canonical bytes of one value.
        """
        source = Reader(raw)
        value = self.read(source)
        if source.left:
            raise ProtocolError(f"{source.left} bytes left over after the message")
        return value


def count(source: Reader, limit: int) -> int:
    """Read how many bytes or items follow.

    Raises:
        ProtocolError: More than ``limit``, or more than there can be in what is left.
    """
    announced = int.from_bytes(source.take(4), "big")
    if announced > limit:
        raise ProtocolError(f"length {announced} is over the limit of {limit}")
    if announced > source.left:  # every item is a byte or more: refuse before a list is built
        raise ProtocolError(f"message is truncated: {announced} items announced, {source.left} bytes left")
    return announced
