"""The fuzz target: it runs on the frozen messages and on junk, and finds a second spelling where there is one."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.messages import ConsistencySignature
from aggregation.wire import Codec


@pytest.fixture(scope="module")
def target() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).with_name("fuzz_messages.py")))


def test_the_corpus_is_read_to_the_end(target: dict[str, Any], tmp_path: Path) -> None:
    target["seed"](tmp_path / "corpus")
    files = sorted((tmp_path / "corpus").iterdir())
    assert len(files) > 90
    for file in files:
        data = file.read_bytes()
        target["read"](data[0], data[1:])  # whole: nothing is refused
        target["one_input"](data[:-1])


@given(data=st.binary(max_size=200))
def test_junk_is_refused_quietly(target: dict[str, Any], data: bytes) -> None:
    target["one_input"](data)


def test_a_second_spelling_is_a_finding(target: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    body = ConsistencySignature(bytes(32), "unit").encode()
    index = list(target["READ"]).index(ConsistencySignature.TAG)
    other = Codec(lambda out, value: out.extend(b"other"), ConsistencySignature.codec().read)
    monkeypatch.setitem(target["READ"], ConsistencySignature.TAG, other)
    with pytest.raises(AssertionError, match="second spelling"):
        target["one_input"](bytes([index]) + body)
