"""The canonical encoding: one byte string for each value, limits before allocation, and no error but ProtocolError."""

import math
import tracemalloc
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import wire
from aggregation.errors import ConfigError, ProtocolError, TrustError, of_file
from aggregation.messages import MESSAGES
from tests.support import refused


class Color(Enum):
    RED = "red"
    DARK_BLUE = "dark-blue"


@dataclass(frozen=True)
class Point:
    x: int
    y: int

    def __post_init__(self) -> None:
        if self.x > self.y:
            raise ConfigError("x is above y", about="point.x")


POINT = wire.record(Point, {"x": wire.uint(8), "y": wire.uint(16)})
NAMES = wire.text(r"[a-z]+")
CASES: list[tuple[wire.Codec[Any], st.SearchStrategy[Any]]] = [
    (wire.uint(8), st.integers(0, 255)),
    (wire.uint(64), st.integers(0, 2**64 - 1)),
    (wire.fixed(3), st.binary(min_size=3, max_size=3)),
    (wire.blob(20), st.binary(max_size=20)),
    (NAMES, st.text("abcxyz", min_size=1, max_size=200)),
    (wire.real, st.floats(allow_nan=False, allow_infinity=False)),
    (wire.choice(Color), st.sampled_from(Color)),
    (wire.optional(wire.uint(8)), st.none() | st.integers(0, 255)),
    (wire.sequence(wire.uint(16), 9), st.lists(st.integers(0, 65535), max_size=9).map(tuple)),
    (
        wire.mapping(NAMES, wire.uint(8), 5),
        st.dictionaries(st.text("abc", min_size=1), st.integers(0, 255), max_size=5),
    ),
    (POINT, st.integers(0, 255).map(lambda x: Point(x, x + 1))),
]


@given(data=st.data())
def test_values_round_trip(data: st.DataObject) -> None:
    codec, values = data.draw(st.sampled_from(CASES))
    value = data.draw(values)
    assert codec.decode(codec.encode(value)) == value


@given(raw=st.binary(max_size=60), case=st.sampled_from(CASES))
def test_any_bytes_are_the_one_encoding_of_a_value_or_refused(raw: bytes, case: tuple[wire.Codec[Any], Any]) -> None:
    codec, _ = case
    try:
        value = codec.decode(raw)
    except ProtocolError:
        return
    assert codec.encode(value) == raw


@given(raw=st.binary(max_size=200), message=st.sampled_from(MESSAGES))
def test_any_bytes_are_the_one_encoding_of_a_message_or_refused(raw: bytes, message: Any) -> None:
    try:
        value = message.decode(raw)
    except ProtocolError:
        return
    assert value.encode() == raw


@pytest.mark.parametrize(
    ("codec", "raw", "about"),
    [
        (wire.uint(16), b"\x01", "encoding.length"),
        (wire.uint(16), b"\x01\x02\x03", "encoding.trailing"),
        (wire.blob(4), b"\x00\x00\x00\x05abcde", "encoding.limit"),
        (wire.blob(4), b"\x00\x00\x00\x04abc", "encoding.length"),
        (wire.sequence(wire.uint(8), 9), b"\x00\x00\x00\x09abc", "encoding.length"),
        (wire.sequence(wire.uint(8), 2), b"\x00\x00\x00\x03abc", "encoding.limit"),
        (NAMES, b"\x03aB\xff", "encoding.text"),
        (wire.text(".+"), b"\x01\xe9", "encoding.text"),
        (NAMES, b"\x04abc\n", "encoding.text"),
        (wire.real, b"\x80" + bytes(7), "encoding.real"),
        (wire.real, b"\x7f\xf0" + bytes(6), "encoding.real"),
        (wire.real, b"\x7f\xf8" + bytes(6), "encoding.real"),
        (wire.choice(Color), b"\x05green", "encoding.choice"),
        (wire.optional(wire.uint(8)), b"\x02\x01", "encoding.flag"),
        (wire.mapping(NAMES, wire.uint(8), 5), b"\x00\x00\x00\x02\x01b\x01\x01a\x02", "encoding.order"),
        (wire.mapping(NAMES, wire.uint(8), 5), b"\x00\x00\x00\x02\x01a\x01\x01a\x02", "encoding.order"),
        (POINT, b"\x05\x00\x04", "point.x"),
    ],
)
def test_bytes_that_are_not_canonical_are_refused(codec: wire.Codec[Any], raw: bytes, about: str) -> None:
    with refused(ProtocolError, about):
        codec.decode(raw)


@pytest.mark.parametrize(
    ("codec", "value"),
    [
        (wire.uint(8), 256),
        (wire.uint(8), -1),
        (wire.fixed(3), b"ab"),
        (wire.blob(2), b"abc"),
        (NAMES, "not a name"),
        (NAMES, "a" * 256),
        (wire.text(".+"), "é"),
        (wire.real, math.nan),
        (wire.sequence(wire.uint(8), 1), (1, 2)),
    ],
)
def test_a_value_that_no_reader_would_accept_is_not_written(codec: wire.Codec[Any], value: Any) -> None:
    with pytest.raises(ConfigError):
        codec.encode(value)


def test_a_text_of_the_greatest_length_is_written_and_read() -> None:
    assert NAMES.decode(NAMES.encode("a" * 255)) == "a" * 255


def test_a_length_that_the_message_cannot_hold_allocates_nothing() -> None:
    codec = wire.sequence(wire.blob(2**30), 2**30)
    tracemalloc.start()
    with refused(ProtocolError, "encoding.length", value=1073741824):
        codec.decode((2**30).to_bytes(4, "big") + bytes(100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000


def test_zero_and_negative_zero_have_one_encoding() -> None:
    assert wire.real.encode(-0.0) == wire.real.encode(0.0)


# The lines that users see


def test_a_protocol_error_begins_with_the_peer_and_keeps_the_subject() -> None:
    error = ProtocolError.of(ConfigError("rounds 0 is not between 1 and 9", about="spec.rounds", value=0), "kitchen")
    assert str(error) == "kitchen: rounds 0 is not between 1 and 9"
    assert (error.peer, error.about, error.value) == ("kitchen", "spec.rounds", 0)


def test_an_error_about_a_files_content_begins_with_the_file() -> None:
    with pytest.raises(TrustError) as caught, of_file("base.onnx"):
        raise TrustError("not a base", about="base.digest", value="ab")
    assert (str(caught.value), caught.value.about, caught.value.value) == ("base.onnx: not a base", "base.digest", "ab")
