"""Canonical bytes: one byte string for one value, and one value for one byte string.

A ``Codec`` writes and reads one type; a record is declared once, field by field, and that declaration serves
both directions. Integers are big-endian. Sizes are checked against the limit *and* against the bytes that are
there before anything is allocated. Reading arbitrary bytes ends in a value or in ``ProtocolError``, never in
another error; bytes left over are refused.

What the fields mean is decided in ``messages``; who signed them, in ``envelope``.
"""

import itertools
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from aggregation.errors import ConfigError, ProtocolError

T = TypeVar("T")
E = TypeVar("E", bound=Enum)
K = TypeVar("K")
V = TypeVar("V")


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


def uint(bits: int) -> Codec[int]:
    """An unsigned integer of exactly ``bits`` bits (a multiple of 8)."""
    size = bits // 8

    def write(out: bytearray, value: int) -> None:
        if not 0 <= value < 1 << bits:
            raise ConfigError(f"{value} does not fit an unsigned field of {bits} bits")
        out += value.to_bytes(size, "big")

    return Codec(write, lambda source: int.from_bytes(source.take(size), "big"))


def fixed(size: int) -> Codec[bytes]:
    """Exactly ``size`` bytes, with no length before them."""

    def write(out: bytearray, value: bytes) -> None:
        if len(value) != size:
            raise ConfigError(f"{len(value)} bytes where exactly {size} belong")
        out += value

    return Codec(write, lambda source: source.take(size))


def blob(limit: int) -> Codec[bytes]:
    """At most ``limit`` bytes after their length."""

    def write(out: bytearray, value: bytes) -> None:
        if len(value) > limit:
            raise ConfigError(f"{len(value)} bytes are over the limit of {limit}")
        out += len(value).to_bytes(4, "big")
        out += value

    return Codec(write, lambda source: source.take(count(source, limit)))


def text(pattern: str) -> Codec[str]:
    """ASCII text of at most 255 characters that matches ``pattern`` in full."""
    compiled = re.compile(pattern, re.ASCII)

    def checked(value: str, error: type[ConfigError] | type[ProtocolError]) -> str:
        if len(value) > 255 or not value.isascii() or not compiled.fullmatch(value):
            raise error(f"{value[:80]!r} is not of the form {pattern}")
        return value

    def write(out: bytearray, value: str) -> None:
        raw = checked(value, ConfigError).encode("ascii")
        out.append(len(raw))
        out += raw

    def read(source: Reader) -> str:
        raw = source.take(source.take(1)[0])
        return checked(raw.decode("latin-1"), ProtocolError)

    return Codec(write, read)


def _write_real(out: bytearray, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{value} is not a finite number")
    out += struct.pack(">d", value + 0.0)  # -0.0 + 0.0 is 0.0: one byte string for one value


def _read_real(source: Reader) -> float:
    raw = source.take(8)
    value = float(struct.unpack(">d", raw)[0])
    if not math.isfinite(value) or raw == b"\x80" + bytes(7):
        raise ProtocolError("a number is not finite, or a negative zero")
    return value


real: Codec[float] = Codec(_write_real, _read_real)


def choice(kind: type[E]) -> Codec[E]:
    """A member of a closed enum, by its value."""
    names = text(r"[a-z-]+")

    def read(source: Reader) -> E:
        name = names.read(source)
        try:
            return kind(name)
        except ValueError:
            raise ProtocolError(f"{name!r} is no {kind.__name__}") from None

    return Codec(lambda out, value: names.write(out, value.value), read)


def optional(item: Codec[T]) -> Codec[T | None]:
    """A value that may be absent."""

    def write(out: bytearray, value: T | None) -> None:
        out.append(value is not None)
        if value is not None:
            item.write(out, value)

    def read(source: Reader) -> T | None:
        flag = source.take(1)[0]
        if flag > 1:
            raise ProtocolError(f"flag {flag} is neither 0 nor 1")
        return item.read(source) if flag else None

    return Codec(write, read)


def sequence(item: Codec[T], limit: int) -> Codec[tuple[T, ...]]:
    """At most ``limit`` items in the order that they were given."""

    def write(out: bytearray, values: tuple[T, ...]) -> None:
        if len(values) > limit:
            raise ConfigError(f"{len(values)} items are over the limit of {limit}")
        out += len(values).to_bytes(4, "big")
        for value in values:
            item.write(out, value)

    return Codec(write, lambda source: tuple(item.read(source) for _ in range(count(source, limit))))


def mapping(key: Codec[Any], value: Codec[V], limit: int) -> Codec[Mapping[Any, V]]:
    """At most ``limit`` entries in strictly ascending order of key: no repeats, one order."""
    entries = sequence(Codec(_pair_write(key, value), lambda source: (key.read(source), value.read(source))), limit)

    def read(source: Reader) -> Mapping[Any, V]:
        pairs = entries.read(source)
        if any(left[0] >= right[0] for left, right in itertools.pairwise(pairs)):
            raise ProtocolError("entries are repeated or out of order")
        return dict(pairs)

    return Codec(lambda out, values: entries.write(out, tuple(sorted(values.items()))), read)


def _pair_write(key: Codec[K], value: Codec[V]) -> Callable[[bytearray, tuple[K, V]], None]:
    def write(out: bytearray, pair: tuple[K, V]) -> None:
        key.write(out, pair[0])
        value.write(out, pair[1])

    return write


def record(kind: type[T], fields: Mapping[str, Codec[Any]]) -> Codec[T]:
    """A dataclass, field by field in the order given. What its constructor refuses, reading refuses."""

    def write(out: bytearray, value: T) -> None:
        for name, codec in fields.items():
            codec.write(out, getattr(value, name))

    def read(source: Reader) -> T:
        values = {name: codec.read(source) for name, codec in fields.items()}
        try:
            return kind(**values)
        except ConfigError as error:
            raise ProtocolError(str(error)) from None

    return Codec(write, read)
