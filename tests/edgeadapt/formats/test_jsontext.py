"""JSON is written one way, and read only if every reader reads the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import DataError
from edgeadapt.formats import jsontext
from edgeadapt.formats.phrases import encode_phrases, parse_phrases
from tests.support import refused

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), children, max_size=3)
    ),
    max_leaves=8,
)


@given(values)
def test_what_is_written_reads_back(value: Any) -> None:
    assert jsontext.decode(jsontext.encode(value)) == value


def test_equal_objects_have_the_same_bytes_whatever_the_order_of_their_keys() -> None:
    assert jsontext.encode({"b": 1, "a": {"d": 2, "c": 3}}) == jsontext.encode({"a": {"c": 3, "d": 2}, "b": 1})


@given(values)
def test_another_spelling_of_a_value_is_the_same_value(value: Any) -> None:
    assert jsontext.decode(json.dumps(value, indent=2).encode()) == value


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b'{"a": 1} x',
        b'{"a": 1, "a": 1}',
        b'{"a": 1, "\\u0061": 1}',
        b'[{"b": {"a": 1, "a": 2}}]',
        b"NaN",
        b"-Infinity",
        b"[1e999]",
        b'"\xff"',
        '{"a": 1}'.encode("utf-16"),
        b"\xef\xbb\xbf{}",
        b'["\\ud800"]',
        b'{"\\uDC00\\ud800": 1}',
        b"[" * 17 + b"]" * 17,
        b'{"a":' * 17 + b"1" + b"}" * 17,
        b"[" * 200_000,
    ],
)
def test_what_two_readers_could_read_differently_is_refused(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"\S"):
        jsontext.decode(raw)


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert jsontext.decode(b'"\\ud83d\\ude00"') == "\U0001f600"


def test_sixteen_levels_are_read() -> None:
    assert jsontext.decode(b"[" * 16 + b"]" * 16)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), b"bytes", {1, 2}, "\ud800"], ids=repr)
def test_what_json_has_no_form_for_is_not_written(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        jsontext.encode({"value": value})


# Phrases


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
