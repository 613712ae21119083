"""A stop string is found wherever the pieces are cut, and no part of it is emitted; wrong parameters are refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, DataError
from client.inference.text import MAX_STOP, MAX_TEXT, Detokenizer, SamplingParams, StopFilter, TextDecoder, checked
from tests.support import refused
from tests.support.tokenizers import WRITERS


def streamed(text: str, strings: tuple[str, ...], cuts: list[int]) -> tuple[str, str | None]:
    stops, out, at = StopFilter(strings), [], 0
    for cut in [*sorted(cuts), len(text)]:
        out.append(stops.feed(text[at:cut]))
        at = cut
    return "".join([*out, stops.rest()]), stops.hit


@given(
    text=st.text("ab", max_size=30), strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), data=st.data()
)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(
    text: str, strings: list[str], data: st.DataObject
) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=6))
    found, hit = streamed(text, tuple(strings), cuts)
    ends = [at for string in strings if (at := text.find(string)) >= 0]
    if hit is None:
        assert (found, ends) == (text, [])
    else:
        # A longer string may begin earlier and end later than the one that was complete first.
        assert text.startswith(found + hit)
        assert not any(string in found for string in strings)


def test_a_possible_beginning_of_a_stop_string_is_held_back() -> None:
    stops = StopFilter(("STOP",))
    assert [stops.feed(piece) for piece in ("a S", "T", "x", "ST")] == ["a ", "", "STx", ""]
    assert stops.rest() == "ST"


def test_nothing_is_emitted_after_a_stop_string() -> None:
    stops = StopFilter(("\n",))
    assert stops.feed("one\ntwo") == "one"
    assert (stops.feed("three"), stops.rest(), stops.hit) == ("", "", "\n")


@pytest.mark.parametrize(
    ("about", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("seed", -1),
        ("seed", 2**31),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 10.1),
        ("beams", 0),
        ("beams", 33),
    ],
)
def test_a_sampling_parameter_out_of_range_is_refused_by_name(about: str, value: Any) -> None:
    with refused(ConfigError, about, value=value):
        SamplingParams(**{about: value})


def test_a_temperature_that_is_not_a_number_is_refused() -> None:
    with refused(ConfigError, "temperature"):
        SamplingParams(temperature=float("nan"))


@pytest.mark.parametrize("stop", ["", "a" * (MAX_STOP + 1)])
def test_a_stop_string_of_a_wrong_length_is_refused(stop: str) -> None:
    with refused(ConfigError, "stop", value=stop):
        SamplingParams(stop=("fine", stop))


@pytest.mark.parametrize(
    ("text", "value"),
    [("", ""), (" \n", " \n"), ("a" * (MAX_TEXT + 1), MAX_TEXT + 1), ("a\0b", "\0"), ("lock \udcff", None)],
    ids=["empty", "white space", "too long", "NUL", "not Unicode"],
)
def test_a_text_that_no_model_can_read_is_refused(text: str, value: object) -> None:
    with refused(DataError, "text", value=value):
        checked(text)


WRITER = {name: build() for name, build in WRITERS.items()}
DECODING = {name: Detokenizer(tokenizer.to_str().encode()) for name, tokenizer in WRITER.items()}
TOKENS = st.lists(st.integers(0, 299), max_size=12)


def decoded(name: str, tokens: list[int]) -> list[str]:
    decoder = TextDecoder(DECODING[name])
    return [decoder.decode(token) for token in tokens]


@given(tokens=TOKENS)
def test_tokens_one_by_one_have_the_text_that_the_tokenizers_library_decodes_at_once(tokens: list[int]) -> None:
    assert "".join(decoded("all bytes", tokens)) == WRITER["all bytes"].decode(tokens).rstrip("\ufffd")


@pytest.mark.parametrize("name", WRITERS)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd▁")))
def test_any_text_comes_back_from_its_tokens(name: str, text: str) -> None:
    tokens = WRITER[name].encode(text).ids
    assert "".join(decoded(name, tokens)) == (text if name == "all bytes" or not text else " " + text)


@pytest.mark.parametrize("name", WRITERS)
@given(mixed=st.lists(st.one_of(st.sampled_from("abc"), st.integers(0xAE, 0xFF)), max_size=12))
def test_bytes_that_are_not_a_character_take_no_letter_away(name: str, mixed: list[str | int]) -> None:
    byte = "<0x{:02X}>" if name == "byte fallback" else "{:c}"  # GPT-2's alphabet has these bytes as they are
    pieces = [each if isinstance(each, str) else byte.format(each) for each in mixed]
    tokens = [token for piece in pieces if (token := WRITER[name].token_to_id(piece)) is not None]
    assert len(tokens) == len(mixed)
    text = "".join(decoded(name, tokens))
    assert "".join(char for char in text if char.isascii()) == "".join(each for each in mixed if isinstance(each, str))
