"""The fuzz target of bases and adapter files runs on sound files and on junk, and reports what it must."""

import random
from typing import Any

import pytest

from aggregation.errors import DataError
from tests.fuzz import fuzz_bases

TIMES = 150


def test_the_seeds_are_read_and_what_is_made_of_them_is_read_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    known, rng = fuzz_bases.seeds(), random.Random(0)  # noqa: S311  # not a secret
    for data in known:
        fuzz_bases.READ[data[0]](data[1:])
    for data in [b"", *(fuzz_bases.some_input(rng, known) for _ in range(TIMES))]:
        fuzz_bases.one_input(data)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [DataError("two\nlines"), DataError("x" * 1001), ValueError("another")])
def test_another_error_and_a_long_refusal_are_findings(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def read(raw: bytes) -> Any:
        raise error

    monkeypatch.setattr(fuzz_bases, "READ", (read,))
    with pytest.raises((AssertionError, ValueError)):
        fuzz_bases.one_input(b"\0")
