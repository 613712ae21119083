"""The fuzz target of bases and adapter files runs on sound files and on junk, and reports what it must."""

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import fuzz_bases, fuzz_messages

TIMES = 150


def test_the_seeds_are_read_and_what_is_made_of_them_is_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    known, rng = fuzz_bases.seeds(), random.Random(0)  # noqa: S311  # not a secret
    for data in known:
        fuzz_bases.READ[data[0]](data[1:])
    for data in [b"", *(fuzz_bases.some_input(rng, known) for _ in range(TIMES))]:
        fuzz_bases.one_input(data)
    assert capsys.readouterr().out == ""


# The fuzz target of messages


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
