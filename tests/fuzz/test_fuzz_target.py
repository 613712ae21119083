"""The fuzz target runs on the frozen messages and on junk, and reports a second encoding."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.messages import ConsistencySignature
from aggregation.wire import Codec
from tests.fuzz import fuzz_messages


def test_every_message_of_the_corpus_is_accepted(tmp_path: Path) -> None:
    fuzz_messages.seed(tmp_path / "corpus")
    files = sorted((tmp_path / "corpus").iterdir())
    assert len(files) > 98
    for file in files:
        data = file.read_bytes()
        fuzz_messages.read(data[0], data[1:])  # complete: nothing is refused
        fuzz_messages.one_input(data[:-1])


@given(data=st.sampled_from([*fuzz_messages.of_gateway()]), at=st.integers(0, 400), bits=st.integers(1, 255))
def test_damaged_messages_of_the_gateway_are_refused_quietly_or_are_others(data: bytes, at: int, bits: int) -> None:
    damaged = bytearray(data)
    damaged[at % len(data)] ^= bits
    fuzz_messages.one_input(bytes(damaged))


@given(data=st.binary(max_size=200))
def test_junk_is_refused_quietly(data: bytes) -> None:
    fuzz_messages.one_input(data)


def test_a_second_encoding_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    body = ConsistencySignature(bytes(32), "unit").encode()
    index = list(fuzz_messages.READ).index(ConsistencySignature.TAG)
    other = Codec(lambda out, value: out.extend(b"other"), ConsistencySignature.codec().read)
    monkeypatch.setitem(fuzz_messages.READ, ConsistencySignature.TAG, other)
    with pytest.raises(AssertionError, match="second encoding"):
        fuzz_messages.one_input(bytes([index]) + body)
