"""The gateway's fuzz target runs on a message of each kind, damaged ones and junk, and reports a second meaning."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.wire import Codec
from tests.fuzz import fuzz_gateway
from tests.fuzz.fuzz_gateway import SEEDS


def test_a_message_of_each_kind_is_accepted() -> None:
    assert {data[0] for data in SEEDS} == {*range(len(fuzz_gateway.CODECS) + 1)}
    for data in SEEDS:
        fuzz_gateway.read(data[0], data[1:])


@given(data=st.binary(max_size=200))
def test_junk_is_refused_quietly(data: bytes) -> None:
    fuzz_gateway.one_input(data)


@given(data=st.sampled_from(SEEDS), at=st.integers(0, 400), bits=st.integers(1, 255), cut=st.integers(0, 400))
def test_damaged_messages_are_refused_quietly_or_are_others(data: bytes, at: int, bits: int, cut: int) -> None:
    damaged = bytearray(data)
    damaged[at % len(data)] ^= bits
    fuzz_gateway.one_input(bytes(damaged))
    fuzz_gateway.one_input(data[: cut % len(data)])


def test_a_message_that_is_written_as_other_bytes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    lenient = Codec(lambda out, value: None, lambda source: source.take(source.left))
    monkeypatch.setattr(fuzz_gateway, "CODECS", (lenient,))
    with pytest.raises(AssertionError, match="other bytes"):
        fuzz_gateway.one_input(b"\x00more")
