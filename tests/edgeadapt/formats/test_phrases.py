"""The file of phrases with their labels: what is written is read."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import DataError
from edgeadapt.formats.phrases import encode_phrases, parse_phrases
from tests.support.errors import refused

TEXT = st.text(min_size=1).filter(lambda text: text.split() and text.isprintable())


@given(st.lists(st.tuples(TEXT, TEXT)))
def test_phrases_are_read_as_they_were_written_apart_from_white_space(pairs: list[tuple[str, str]]) -> None:
    written = [(" ".join(label.split()), " ".join(phrase.split())) for label, phrase in pairs]
    assert parse_phrases(encode_phrases(pairs), Path("phrases.tsv")) == written


def test_a_text_of_several_lines_becomes_one() -> None:
    text = "Subject: a\tb\r\n\r\n c\u2028d\x1ce"
    assert encode_phrases([("alt.atheism", text)]) == b"alt.atheism\tSubject: a b c d e\n"


def test_content_above_the_limit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeadapt.formats.phrases.LONGEST_LIST", 9)
    assert parse_phrases(b"on\tlights", Path("phrases.tsv")) == [("on", "lights")]
    with refused(DataError, "phrases.tsv", value=10):
        parse_phrases(b"on\tlights!", Path("phrases.tsv"))
