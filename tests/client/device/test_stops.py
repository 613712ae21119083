"""A stop string is found wherever the pieces are cut, and none of it gets out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.inference.stops import Stops


def streamed(text: str, strings: tuple[str, ...], cuts: list[int]) -> tuple[str, str | None]:
    stops, out, at = Stops(strings), [], 0
    for cut in [*sorted(cuts), len(text)]:
        out.append(stops.feed(text[at:cut]))
        at = cut
    return "".join([*out, stops.rest()]), stops.hit


@given(
    text=st.text("ab", max_size=30),
    strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    data=st.data(),
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


def test_what_may_begin_a_stop_string_is_held_back_until_it_is_clear() -> None:
    stops = Stops(("STOP",))
    assert [stops.feed(piece) for piece in ("a S", "T", "x", "ST")] == ["a ", "", "STx", ""]
    assert stops.rest() == "ST"


def test_nothing_comes_after_a_hit() -> None:
    stops = Stops(("\n",))
    assert stops.feed("one\ntwo") == "one"
    assert (stops.feed("three"), stops.rest(), stops.hit) == ("", "", "\n")


@pytest.mark.parametrize("pieces", [["abc"], ["a", "b", "c"]])
def test_without_stop_strings_every_piece_passes_at_once(pieces: list[str]) -> None:
    stops = Stops(())
    assert [stops.feed(piece) for piece in pieces] == pieces
