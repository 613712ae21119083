"""Messages and their envelope: one encoding, one purpose, one signer."""

import dataclasses
import hashlib
import math
import tracemalloc
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import envelope, wire
from aggregation.errors import ConfigError, ProtocolError, TrustError, of_file
from aggregation.messages import (
    MESSAGES,
    Advert,
    Assignment,
    Challenge,
    CheckIn,
    ConsistencySignature,
    EncryptedShares,
    MaskedInput,
    Message,
    Offer,
    Plan,
    Roster,
    Shares,
    Survivors,
    Unmask,
    UnmaskResponse,
)
from aggregation.pki.identity import IdentityKey
from tests.support import refused

D = hashlib.sha256(b"digest").digest()
KEY = IdentityKey(bytes(range(32)))
ENCRYPTED_SHARES = {"a": EncryptedShares(b"sealed", (bytes(16),)), "b": EncryptedShares(b"", ())}
PLAN = Plan(D, 3, ("a", "b"), 7, D.hex(), b"settings")
SURVIVORS = Survivors(D, {"a": D, "b": bytes(32)})


@pytest.fixture
def samples(spec_of: Any) -> list[Message]:
    return [
        Challenge(D, 2**64 - 1),
        CheckIn(D, b"der", D),
        Offer(D, spec_of(4), (b"der", b"")),
        Advert(D, "a", D, (D, D), (D,)),
        Roster(D, (b"advert",)),
        Shares(D, "a", ENCRYPTED_SHARES),
        PLAN,
        Assignment(PLAN, ENCRYPTED_SHARES),
        MaskedInput(D, "a", D),
        SURVIVORS,
        ConsistencySignature(D, "a"),
        Unmask(SURVIVORS, {"a": bytes(64)}),
        UnmaskResponse(D, "a", {"b": bytes(33)}, {}),
    ]


def test_there_is_a_sample_of_every_message(samples: list[Message]) -> None:
    assert tuple(map(type, samples)) == MESSAGES


def test_messages_come_back_from_their_bytes(samples: list[Message]) -> None:
    for message in samples:
        assert type(message).decode(message.encode()) == message


def test_every_field_of_a_message_travels(samples: list[Message]) -> None:
    for message in samples:
        assert list(wire.annotated(type(message))) == [field.name for field in dataclasses.fields(message)]


def test_signed_messages_come_back_from_their_envelope(samples: list[Message]) -> None:
    for message in samples:
        assert envelope.open_verified(type(message), envelope.sign(KEY, message), KEY.public, "peer") == message


def test_no_message_passes_for_another(samples: list[Message]) -> None:
    for message in samples:
        raw = envelope.sign(KEY, message)
        for kind in MESSAGES:
            if kind is not type(message):
                with refused(ProtocolError, "envelope.tag", peer="peer"):
                    envelope.open_verified(kind, raw, KEY.public, "peer")


def test_a_body_signed_for_one_purpose_is_not_valid_for_another() -> None:
    body = ConsistencySignature(D, "a").encode()
    moved = envelope.Envelope(b"EA", 1, "consistency-signature", body, KEY.sign("advert", body))
    with refused(ProtocolError, "signature", peer="peer", value="consistency-signature"):
        envelope.open_verified(ConsistencySignature, envelope.ENVELOPE.encode(moved), KEY.public, "peer")


@pytest.mark.parametrize(("field", "value"), [("version", 2), ("magic", b"EB")])
def test_another_version_is_refused(field: str, value: Any) -> None:
    genuine = envelope.ENVELOPE.decode(envelope.sign(KEY, ConsistencySignature(D, "a")))
    other = envelope.ENVELOPE.encode(dataclasses.replace(genuine, **{field: value}))
    with refused(ProtocolError, "envelope.version", peer="peer"):
        envelope.open_verified(ConsistencySignature, other, KEY.public, "peer")


def test_a_message_over_its_limit_is_refused_by_size() -> None:
    with refused(ProtocolError, "envelope.size", peer="peer", value=1153):
        envelope.open_verified(
            ConsistencySignature, bytes(ConsistencySignature.LIMIT + envelope.OVERHEAD + 1), KEY.public, "peer"
        )


def test_the_error_names_the_peer() -> None:
    with refused(ProtocolError, "encoding.length", peer="kitchen", value=2) as caught:
        envelope.open_verified(ConsistencySignature, b"", KEY.public, "kitchen")
    assert str(caught.value) == "kitchen: message is truncated: 2 bytes expected, 0 left"


def test_digests_of_different_messages_differ_even_where_their_bytes_agree() -> None:
    same = MaskedInput(D, "a", D)
    assert same.digest() == hashlib.sha256(b"masked-input\x00" + same.encode()).digest()
    assert same.digest() != hashlib.sha256(same.encode()).digest()


def test_a_vector_comes_back_with_its_header_and_no_copy() -> None:
    packed = bytes(range(100))
    raw = envelope.sign_vector(KEY, MaskedInput(D, "a", hashlib.sha256(packed).digest()), packed)
    header, vector = envelope.open_vector(raw, 100, KEY.public, "peer")
    long = raw[:100] + bytes(5000) + (5000).to_bytes(4, "big")
    with refused(ProtocolError, "masked-input.size", value=len(long)):  # before it is copied
        envelope.open_vector(long, 100, KEY.public, "peer")
    for size in (99, 101):
        with refused(ProtocolError, "masked-input.size", peer="peer", value=254):
            envelope.open_vector(raw, size, KEY.public, "peer")
    assert header.device == "a"
    assert vector == packed
    assert vector.obj is raw


def test_a_vector_other_than_the_signed_one_is_refused() -> None:
    raw = envelope.sign_vector(KEY, MaskedInput(D, "a", D), bytes(10))
    with refused(ProtocolError, "masked-input.vector", peer="peer"):
        envelope.open_vector(raw, 10, KEY.public, "peer")


def test_a_plan_over_its_limits_is_not_written() -> None:
    with refused(ConfigError, "encoding.limit", value=1048577):
        dataclasses.replace(PLAN, training=bytes(2**20 + 1)).encode()


def test_no_share_is_in_a_repr_of_what_holds_it() -> None:
    from aggregation.sharing import Secrets, SharePair

    assert repr(SharePair(b"s" * 33, b"k" * 33)) == "SharePair()"
    assert repr(Secrets(b"s" * 32, b"k" * 32)) == "Secrets()"


# The canonical encoding: one byte string for each value, limits before allocation, and no error but ProtocolError.
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
    error = ProtocolError.of(ConfigError("rounds 0 is not between 1 and 9", about="spec.rounds"), "kitchen")
    assert str(error) == "kitchen: rounds 0 is not between 1 and 9"
    assert (error.peer, error.about) == ("kitchen", "spec.rounds")


def test_an_error_about_a_files_content_begins_with_the_file() -> None:
    with pytest.raises(TrustError) as caught, of_file("base.onnx"):
        raise TrustError("not a base", about="base.digest")
    assert (str(caught.value), caught.value.about) == ("base.onnx: not a base", "base.digest")
