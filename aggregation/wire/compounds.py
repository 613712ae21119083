"""Values made of values: optional ones, sequences, mappings, records."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from aggregation.errors import ConfigError, ProtocolError
from aggregation.wire.codec import Codec, Reader, T, count

K = TypeVar("K")
V = TypeVar("V")


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
