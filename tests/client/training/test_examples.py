"""The examples file is read back as it was written; a line that is not an example is refused and never quoted."""

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
from client.training.examples import (
    MAX_FILE,
    MAX_TEXT,
    Example,
    Split,
    in_split,
    parse_examples,
    read_examples,
    write_examples,
)
from tests.support import refused

PHRASE = "the code of the safe is 4711"
TRAIN = Example("turn on the light", 0)


def line(**changes: Any) -> str:
    return json.dumps({"text": PHRASE, "label": 1, "split": "train", **changes})


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
def test_examples_are_read_back_as_they_were_written(tmp_path: Path, written: list[Example]) -> None:
    write_examples(tmp_path / "e", [TRAIN, *written])
    assert read_examples(tmp_path / "e", 5) == (TRAIN, *written)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_a_separator_in_a_text_does_not_end_the_line(tmp_path: Path, separator: str) -> None:
    row = json.dumps({"text": f"a{separator}b", "label": 0}, ensure_ascii=False)
    assert read_examples(file_of(tmp_path, row), 1) == (Example(f"a{separator}b", 0),)


def test_empty_lines_and_windows_line_ends_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(f"\r\n{line()}\r\n\r\n{line(label=0)}".encode())
    assert [example.label for example in read_examples(path, 2)] == [1, 0]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(b"\xef\xbb\xbf" + line().encode())
    assert len(read_examples(path, 2)) == 1


def test_the_file_is_readable_by_its_owner_only_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "examples.jsonl"
    write_examples(path, [TRAIN])
    write_examples(path, [TRAIN, TRAIN])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(read_examples(path, 1)) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "examples.jsonl"
    write_examples(path, [TRAIN])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_examples(path, [Example("another", 0)])
    assert read_examples(path, 1) == (TRAIN,)
    assert list(tmp_path.iterdir()) == [path]


def test_an_example_without_a_split_is_for_training(tmp_path: Path) -> None:
    rows = [line(split="test"), json.dumps({"text": "a", "label": 0}), line(split="validation"), line(text="b")]
    found = read_examples(file_of(tmp_path, *rows), 2)
    assert [e.text for e in in_split(found, Split.TRAIN)] == ["a", "b"]
    assert [e.text for e in in_split(found, Split.VALIDATION)] == [PHRASE]
    assert [e.text for e in in_split(found, Split.TEST)] == [PHRASE]


@pytest.mark.parametrize("rows", [[], [""], ["", "  "], [line(split="validation"), line(split="test")]])
def test_a_file_without_a_training_example_is_refused(tmp_path: Path, rows: list[str]) -> None:
    with refused(DataError, "examples.split"):
        read_examples(file_of(tmp_path, *rows), 2)


def test_a_variant_is_no_example_and_marks_take_no_place_of_a_text(tmp_path: Path) -> None:
    medium = "data:audio/wav;base64,AAAA"
    assert read_examples(file_of(tmp_path, line(text=medium)), 2)
    with refused(DataError, "example.text", "is a variant"):
        read_examples(file_of(tmp_path, line(text=f"{medium}#3")), 2)
    longest = "a" * (MAX_TEXT - 2)
    assert read_examples(file_of(tmp_path, line(text=f"⟦{longest}⟧ b")), 2)
    with refused(DataError, "example.text"):
        read_examples(file_of(tmp_path, line(text=f"⟦{longest}⟧ bc")), 2)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with refused(DataError, "examples") as caught:
        read_examples(tmp_path / "gone.jsonl", 2)
    assert str(tmp_path / "gone.jsonl") in str(caught.value)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with refused(DataError, "examples"):
        read_examples(tmp_path, 2)


def test_a_file_that_is_not_text_is_refused_without_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "e"
    path.write_bytes(line().encode() + b"\n\xff\xfe")
    refused_unquoted(path, "examples")


@pytest.mark.parametrize(
    ("row", "about"),
    [
        (f"{PHRASE}", "example"),
        (f'{{"text": "{PHRASE}", "label": 1', "example"),
        (f'["{PHRASE}", 1]', "example"),
        (f'"{PHRASE}"', "example"),
        ("[" * 100_000, "example"),
        ('{"text": "a", "label": ' + "9" * 5000 + "}", "example"),
        (json.dumps({"text": PHRASE}), "example"),
        (json.dumps({"label": 1}), "example"),
        (line(split=PHRASE), "example"),
        (line(split=[PHRASE]), "example"),
        (line(text=[PHRASE]), "example.text"),
        (line(text=PHRASE + "\ud83d"), "example.text"),
        (line(text=" \t"), "example.text"),
        (line(text=PHRASE * MAX_TEXT), "example.text"),
        (line(label=2), "example.label"),
        (line(label=-1), "example.label"),
        (line(label=1.0), "example.label"),
        (line(label=True), "example.label"),
        (line(label="1"), "example.label"),
        (line(label=None), "example.label"),
    ],
)
def test_a_line_that_is_not_an_example_is_refused_by_number_and_never_quoted(
    tmp_path: Path, row: str, about: str
) -> None:
    path = file_of(tmp_path, line(), "", row)
    assert f"line 3 of {path}" in refused_unquoted(path, about)


def test_without_a_number_of_labels_every_label_is_accepted_that_could_be_one(tmp_path: Path) -> None:
    path = file_of(tmp_path, line(label=0), line(label=10**9))
    found = parse_examples(path.read_bytes(), path)
    assert [example.label for example in found] == [0, 10**9]
    for label in (-1, 1.0, True, None):
        with refused(DataError, "example.label"):
            parse_examples(line(label=label).encode(), tmp_path)


def refused_unquoted(path: Path, about: str) -> str:
    """Refused, with the text neither in the error nor in its traceback; the error's message."""
    with refused(DataError, about) as caught:
        read_examples(path, 2)
    assert PHRASE not in "".join(traceback.format_exception(caught.value))
    assert "4711" not in str(caught.value)
    return str(caught.value)


def test_a_huge_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "e"
    with path.open("wb") as file:
        file.truncate(MAX_FILE + 1)  # sparse: takes no room
    with refused(DataError, "examples", value=MAX_FILE + 1):
        read_examples(path, 2)


def test_an_example_shown_in_a_log_does_not_show_its_text() -> None:
    assert "4711" not in repr(Example(PHRASE, 1))
    assert "4711" not in f"{[Example(PHRASE, 1)]}"


def test_a_task_of_others_makes_targets_of_labels_and_leaves_out_what_it_refuses(tmp_path: Path) -> None:
    def target(label: str) -> tuple[float, ...]:
        return (float(label), 1.0)  # ValueError for another text

    rows = [{"text": "a", "label": "2"}, {"text": "b", "label": 4.5}, {"text": "c", "label": "secret"}]
    path = file_of(tmp_path, *map(json.dumps, rows))
    found = parse_examples(path.read_bytes(), path, 2, target)
    assert [example.target for example in found] == [(2.0, 1.0), (4.5, 1.0), ()]
    write_examples(path, found[:2])
    assert parse_examples(path.read_bytes(), path, 2, target) == found[:2]
    for odd in ([], "2", [None], [float("inf")]):
        with refused(DataError, "example.target"):
            parse_examples(json.dumps({"text": "a", "target": odd}).encode(), path, 2, target)
