"""The examples file: what was written comes back, what is no example is refused by its line and never quoted."""

import json
import os
import stat
import traceback
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.errors import DataError
from client.training import examples
from client.training.examples import MAX_TEXT, Example, Split, part, read_examples, write_examples

PHRASE = "the code of the safe is 4711"
TRAIN = Example("turn on the light", 0)


def line(**changes: Any) -> str:
    return json.dumps({"text": PHRASE, "label": 1, "part": "train", **changes})


def file_of(folder: Path, *lines: str) -> Path:
    path = folder / "examples.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.builds(
            Example,
            st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip),
            st.integers(0, 4),
            st.sampled_from(Split),
        ),
        max_size=8,
    )
)
def test_what_was_written_comes_back_whatever_the_characters(tmp_path: Path, written: list[Example]) -> None:
    write_examples(tmp_path / "e", [TRAIN, *written])
    assert read_examples(tmp_path / "e", 5) == (TRAIN, *written)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_a_separator_inside_a_text_ends_no_line(tmp_path: Path, separator: str) -> None:
    row = json.dumps({"text": f"a{separator}b", "label": 0}, ensure_ascii=False)
    assert read_examples(file_of(tmp_path, row), 1) == (Example(f"a{separator}b", 0),)


def test_empty_lines_and_windows_line_ends_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(f"\r\n{line()}\r\n\r\n{line(label=0)}".encode())
    assert [example.label for example in read_examples(path, 2)] == [1, 0]


def test_the_file_is_readable_by_its_owner_only_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "examples.jsonl"
    write_examples(path, [TRAIN])
    write_examples(path, [TRAIN, TRAIN])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(read_examples(path, 1)) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "examples.jsonl"
    write_examples(path, [TRAIN])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_examples(path, [Example("another", 0)])
    assert read_examples(path, 1) == (TRAIN,)
    assert list(tmp_path.iterdir()) == [path]


def test_parts_are_told_apart_and_training_is_what_is_not_named(tmp_path: Path) -> None:
    rows = [line(part="test"), json.dumps({"text": "a", "label": 0}), line(part="validation"), line(text="b")]
    found = read_examples(file_of(tmp_path, *rows), 2)
    assert [e.text for e in part(found, Split.TRAIN)] == ["a", "b"]
    assert [e.text for e in part(found, Split.VALIDATION)] == [PHRASE]
    assert [e.text for e in part(found, Split.TEST)] == [PHRASE]


@pytest.mark.parametrize("rows", [[], [""], ["", "  "], [line(part="validation"), line(part="test")]])
def test_a_household_with_no_training_example_is_refused(tmp_path: Path, rows: list[str]) -> None:
    with pytest.raises(DataError, match="no training example"):
        read_examples(file_of(tmp_path, *rows), 2)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no readable examples in .*gone\.jsonl: No such file"):
        read_examples(tmp_path / "gone.jsonl", 2)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no readable examples"):
        read_examples(tmp_path, 2)


def test_a_file_that_is_not_text_is_refused_without_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(line().encode() + b"\n\xff\xfe")
    refused(path, "not UTF-8")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (f"{PHRASE}", "is not an example"),
        (f'{{"text": "{PHRASE}", "label": 1', "is not an example"),
        (f'["{PHRASE}", 1]', "is not an example"),
        (f'"{PHRASE}"', "is not an example"),
        ("[" * 100_000, "is not an example"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "is not an example"),
        (json.dumps({"text": PHRASE}), "is not an example"),
        (json.dumps({"label": 1}), "is not an example"),
        (line(part=PHRASE), "is not an example"),
        (line(part=[PHRASE]), "is not an example"),
        (line(text=[PHRASE]), "text that is none"),
        (line(text=PHRASE + "\ud83d"), "text that is none"),
        (line(text=" \t"), "empty text"),
        (line(text=PHRASE * MAX_TEXT), "more than 2000 characters"),
        (line(label=2), "label outside 0 … 1"),
        (line(label=-1), "label outside"),
        (line(label=1.0), "label outside"),
        (line(label=True), "label outside"),
        (line(label="1"), "label outside"),
        (line(label=None), "label outside"),
    ],
)
def test_a_line_that_is_no_example_is_refused_by_number_and_never_quoted(tmp_path: Path, row: str, reason: str) -> None:
    path = file_of(tmp_path, line(), "", row)
    refused(path, f"line 3 of {path}")
    refused(path, reason)


def refused(path: Path, reason: str) -> None:
    """Refused for this reason, in one line, and with the text neither in the error nor in its traceback."""
    with pytest.raises(DataError) as caught:
        read_examples(path, 2)
    message = str(caught.value)
    assert reason in message
    assert "\n" not in message
    shown = "".join(traceback.format_exception(caught.value))
    assert PHRASE not in shown
    assert "4711" not in message


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "e"
    with path.open("wb") as file:
        file.truncate(examples.MAX_FILE + 1)  # sparse: takes no room
    with pytest.raises(DataError, match="larger than"):
        read_examples(path, 2)


def test_an_example_shown_in_a_log_does_not_show_its_text() -> None:
    assert "4711" not in repr(Example(PHRASE, 1))
    assert "4711" not in f"{[Example(PHRASE, 1)]}"
