"""Single values: numbers, bytes, text, members of an enum."""

import math
import re
import struct
from enum import Enum
from typing import TypeVar

from aggregation.errors import ConfigError, ProtocolError
from aggregation.wire.codec import Codec, Reader, count

E = TypeVar("E", bound=Enum)


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
