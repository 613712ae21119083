"""The canonical encoding: each value has exactly one byte string, and each accepted byte string exactly one value.

A ``Codec`` writes and reads one type. A record is declared once, field by field, and the declaration serves both
directions. Integers are big-endian. Every length is checked against its limit *and* against the bytes present before
anything is allocated. Decoding arbitrary bytes returns a value or raises ``ProtocolError``, never another error, and
trailing bytes are refused.

``messages`` decides what the fields mean, ``envelope`` who signed them."""

import itertools
import math
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Annotated, Any, Generic, TypeAlias, TypeVar, get_origin, get_type_hints

from aggregation.errors import ConfigError, ProtocolError

KNOWN_TEXTS = 2**14  # that a codec need not match again: the same device ids occur in every message of a cohort
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
        return len(self._data) - self._at

    def take(self, n: int) -> bytes:
        """Return the next ``n`` bytes. Raises ProtocolError: fewer than ``n`` are left."""
        start, end = self._at, self._at + n
        if end > len(self._data):
            raise ProtocolError(f"message is truncated: {n} bytes expected, {self.left} left", about="encoding.length")
        self._at = end
        return self._data[start:end]


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How one type is written and read. ``write`` appends to a buffer; ``read`` consumes from a ``Reader``."""

    write: Callable[[bytearray, T], None]
    read: Callable[[Reader], T]

    def encode(self, value: T) -> bytes:
        """The canonical bytes of ``value``. Raises ConfigError: a field is over its limit, so no reader would accept
        it."""
        out = bytearray()
        self.write(out, value)
        return bytes(out)

    def decode(self, raw: bytes) -> T:
        """The value that ``raw`` encodes. Law: ``encode(decode(raw)) == raw``. Raises ProtocolError: ``raw`` is not the
        canonical encoding of one value."""
        source = Reader(raw)
        value = self.read(source)
        if source.left:
            raise ProtocolError(f"{source.left} bytes left over after the message", about="encoding.trailing")
        return value


def _count(source: Reader, limit: int) -> int:
    """Read how many bytes or items follow; at most ``limit``, and no more than the bytes left can hold."""
    announced = int.from_bytes(source.take(4), "big")
    if announced > limit:
        raise ProtocolError(f"length {announced} is over the limit of {limit}", about="encoding.limit")
    if announced > source.left:  # every item takes a byte or more: refuse before a list is built
        raise ProtocolError(
            f"message is truncated: {announced} items announced, {source.left} bytes left", about="encoding.length"
        )
    return announced


def uint(bits: int) -> Codec[int]:
    """An unsigned integer of exactly ``bits`` bits (a multiple of 8), big-endian.

    >>> uint(16).encode(258).hex()
    '0102'
    """
    size = bits // 8

    def write(out: bytearray, value: int) -> None:
        if not 0 <= value < 1 << bits:
            raise ConfigError(f"{value} does not fit an unsigned field of {bits} bits", about="encoding.uint")
        out += value.to_bytes(size, "big")

    return Codec(write, lambda source: int.from_bytes(source.take(size), "big"))


def fixed(size: int) -> Codec[bytes]:
    """Exactly ``size`` bytes, without a length."""

    def write(out: bytearray, value: bytes) -> None:
        if len(value) != size:
            raise ConfigError(f"{len(value)} bytes in a field of exactly {size}", about="encoding.fixed")
        out += value

    return Codec(write, lambda source: source.take(size))


def blob(limit: int) -> Codec[bytes]:
    """At most ``limit`` bytes after their length in 4 bytes.

    >>> blob(9).encode(b"ab").hex()
    '000000026162'
    """

    def write(out: bytearray, value: bytes) -> None:
        _write_count(out, len(value), limit, "bytes")
        out += value

    return Codec(write, lambda source: source.take(_count(source, limit)))


def _write_count(out: bytearray, count: int, limit: int, unit: str) -> None:
    if count > limit:
        raise ConfigError(f"{count} {unit} are over the limit of {limit}", about="encoding.limit")
    out += count.to_bytes(4, "big")


def text(pattern: str) -> Codec[str]:
    """ASCII text of at most 255 characters that matches ``pattern`` in full, after its length in 1 byte.

    >>> text("[a-z]+").encode("ab").hex()
    '026162'
    """
    compiled = re.compile(pattern, re.ASCII)

    def checked(value: str, error: type[ConfigError] | type[ProtocolError]) -> str:
        if len(value) > 255 or not value.isascii() or not compiled.fullmatch(value):
            raise error(f"{value[:80]!r} does not match {pattern}", about="encoding.text")
        return value

    def write(out: bytearray, value: str) -> None:
        raw = checked(value, ConfigError).encode("ascii")
        out.append(len(raw))
        out += raw

    @lru_cache(KNOWN_TEXTS)
    def parse(raw: bytes) -> str:
        return checked(raw.decode("latin-1"), ProtocolError)

    return Codec(write, lambda source: parse(source.take(source.take(1)[0])))


def _write_real(out: bytearray, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"{value} is not a finite number", about="encoding.real")
    out += struct.pack(">d", value + 0.0)  # -0.0 + 0.0 is 0.0: one byte string for one value


def _read_real(source: Reader) -> float:
    raw = source.take(8)
    value = float(struct.unpack(">d", raw)[0])
    if not math.isfinite(value) or raw == b"\x80" + bytes(7):
        raise ProtocolError("a real number is not finite, or is a negative zero", about="encoding.real")
    return value


real: Codec[float] = Codec(_write_real, _read_real)
"""A finite IEEE 754 double, big-endian; zero has one encoding."""
Real: TypeAlias = Annotated[float, real]
Uint32: TypeAlias = Annotated[int, uint(32)]
Uint64: TypeAlias = Annotated[int, uint(64)]
HexDigest: TypeAlias = Annotated[str, text(r"[0-9a-f]{64}")]  # SHA-256


def choice(kind: type[E]) -> Codec[E]:
    """A member of a closed enum, written as the text of its value."""
    names = text(r"[a-z-]+")

    def read(source: Reader) -> E:
        name = names.read(source)
        try:
            return kind(name)
        except ValueError:
            raise ProtocolError(f"{name!r} is not a {kind.__name__}", about="encoding.choice") from None

    return Codec(lambda out, value: names.write(out, value.value), read)


def optional(item: Codec[T]) -> Codec[T | None]:
    """A value that may be absent: a flag in 1 byte, then the value if there is one."""

    def write(out: bytearray, value: T | None) -> None:
        out.append(value is not None)
        if value is not None:
            item.write(out, value)

    def read(source: Reader) -> T | None:
        flag = source.take(1)[0]
        if flag > 1:
            raise ProtocolError(f"flag {flag} is neither 0 nor 1", about="encoding.flag")
        return item.read(source) if flag else None

    return Codec(write, read)


def last(item: Codec[T]) -> Codec[T | None]:
    """A last field of a message that earlier versions did not have: absent if no bytes are left.

    >>> [last(uint(16)).decode(raw) for raw in (b"", bytes([0, 7]))]
    [None, 7]
    """

    def write(out: bytearray, value: T | None) -> None:
        if value is not None:
            item.write(out, value)

    return Codec(write, lambda source: item.read(source) if source.left else None)


def sequence(item: Codec[T], limit: int) -> Codec[tuple[T, ...]]:
    """At most ``limit`` items in the given order, after their count in 4 bytes."""

    def write(out: bytearray, values: tuple[T, ...]) -> None:
        _write_count(out, len(values), limit, "items")
        for value in values:
            item.write(out, value)

    return Codec(write, lambda source: tuple(item.read(source) for _ in range(_count(source, limit))))


def mapping(key: Codec[Any], value: Codec[V], limit: int) -> Codec[Mapping[Any, V]]:
    """At most ``limit`` entries in strictly ascending order of key: no repeated key, one order.

    >>> mapping(text("[a-z]+"), uint(8), 9).encode({"b": 2, "a": 1}).hex()
    '00000002016101016202'
    """
    entries = sequence(Codec(_pair_write(key, value), lambda source: (key.read(source), value.read(source))), limit)

    def read(source: Reader) -> Mapping[Any, V]:
        pairs = entries.read(source)
        for left, right in itertools.pairwise(pairs):
            if left[0] >= right[0]:
                raise ProtocolError("entries are repeated or out of order", about="encoding.order")
        return dict(pairs)

    return Codec(lambda out, values: entries.write(out, tuple(sorted(values.items()))), read)


def _pair_write(key: Codec[K], value: Codec[V]) -> Callable[[bytearray, tuple[K, V]], None]:
    def write(out: bytearray, pair: tuple[K, V]) -> None:
        key.write(out, pair[0])
        value.write(out, pair[1])

    return write


def record(kind: type[T], fields: Mapping[str, Codec[Any]] | None = None) -> Codec[T]:
    """A dataclass, field by field in order. A value that its constructor refuses is refused on reading. ``kind``: the
    dataclass. ``fields``: field → codec; by default the codec with which each field is annotated
    (``typing.Annotated``)."""
    codecs = annotated(kind) if fields is None else fields

    def write(out: bytearray, value: T) -> None:
        for name, codec in codecs.items():
            codec.write(out, getattr(value, name))

    def read(source: Reader) -> T:
        values = {name: codec.read(source) for name, codec in codecs.items()}
        try:
            return kind(**values)
        except ConfigError as error:
            raise ProtocolError.of(error) from None

    return Codec(write, read)


def annotated(kind: type) -> dict[str, Codec[Any]]:
    """Field → the codec with which it is annotated."""
    hints = get_type_hints(kind, include_extras=True)
    return {name: hint.__metadata__[0] for name, hint in hints.items() if get_origin(hint) is Annotated}
