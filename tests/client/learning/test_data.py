"""``edgeadapt device data``: what is set aside, and imported, and that no personal step learns the former."""

import json
from pathlib import Path

import pytest

from aggregation.errors import DataError, EdgeAdaptError
from client.node.eligibility import conditions
from client.node.readings import SYSTEM
from client.node.statedir import DeviceStateDir
from client.training.examples import parse_examples
from edgeadapt.formats import storage
from tests.client.learning.test_learner import drawn, phone, run, trainable
from tests.client.learning.test_personal_step import MINE, examples, personalized, weights
from tests.client.node.test_eligibility import NIGHT
from tests.support import refused
from tests.support.models import LABELS

__all__ = ["drawn", "phone", "trainable"]  # fixtures

MAIL, HELD_OUT = "write to anna@home.example", "turn the kitchen lights on"


@pytest.fixture
def kitchen(phone: Path) -> Path:
    """A state directory with examples, of a device with the bundle."""
    folder = phone.parent / "kitchen"
    folder.mkdir()
    (folder / "device.toml").write_text(f"base = {json.dumps(str(phone))}\n[data]\n")
    (folder / "sealing.key").write_bytes(bytes(32))
    examples(folder, held_out=HELD_OUT)
    return folder


def append(folder: Path, *rows: dict[str, object]) -> None:
    with (folder / "examples.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_the_lines_that_are_set_aside_are_named_and_not_quoted(kitchen: Path) -> None:
    append(kitchen, {"text": MAIL, "label": 1}, {"text": "PLAY music", "label": 1, "time": 0})
    done = run("data", "check", "--state", kitchen)
    found = ["line 5: duplicate", "line 7: email", "line 8: duplicate"]
    assert done.output.splitlines()[:3] == found, done.output
    assert done.output.splitlines()[3] == "3 of 8 examples are set aside: 2 duplicate, 1 email; 7 have no time"
    row = json.loads(run("data", "check", "--state", kitchen, "--json").output)
    assert row["aside"][1] == {"line": 7, "reason": "email"}
    assert (row["applied"], row["examples"], row["untimed"]) == (True, 8, 7)
    (kitchen / "device.toml").write_text('base = "b"\n')
    assert json.loads(run("data", "check", "--state", kitchen, "--json").output) == row | {"applied": False}
    assert "[data]" in run("data", "check", "--state", kitchen).output


@pytest.mark.parametrize(
    "raw", [b"", b"\n", b'{"text": 3}\n', b"\xff\n"], ids=["empty", "blank", "no text", "no UTF-8"]
)
def test_a_file_without_valid_examples_is_refused_by_the_check(kitchen: Path, raw: bytes) -> None:
    (kitchen / "examples.jsonl").write_bytes(raw)
    with pytest.raises(DataError):
        raise run("data", "check", "--state", kitchen).exception or AssertionError


def test_a_personal_step_and_the_least_number_of_examples_leave_out_what_is_set_aside(
    phone: Path, kitchen: Path
) -> None:
    clean = examples(phone.parent, list(dict.fromkeys(MINE)), HELD_OUT)
    assert personalized(phone, clean).exit_code == 0
    expected = weights(phone)
    assert run("learn", "--bundle", phone, "--undo").exit_code == 0
    append(kitchen, {"text": MAIL, "label": 1})
    assert personalized(phone, kitchen / "examples.jsonl").exit_code == 0
    assert weights(phone) == expected
    with (kitchen / "device.toml").open("a") as file:
        file.write("[eligibility]\nminimum_examples = 6\n")
    (found,) = conditions(DeviceStateDir.open(kitchen), SYSTEM, NIGHT)
    assert (found.met, found.reading) == (False, "5 examples, and at least 6 are demanded")


def test_an_import_appends_what_is_clean_and_new(kitchen: Path) -> None:
    path = kitchen / "examples.jsonl"
    path.write_bytes(path.read_bytes().rstrip(b"\n"))  # as an editor may leave it
    before = path.read_bytes()
    rows = [{"text": "PLAY MUSIC!", "label": 1}, {"text": MAIL, "label": 1}, {"text": "open", "label": 0, "time": 5}]
    more = kitchen / "more.jsonl"
    more.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in rows))
    done = run("data", "import", "--state", kitchen, "--json", more)
    assert done.exit_code == 0, done.output
    aside = [{"line": 1, "reason": "duplicate"}, {"line": 2, "reason": "email"}]
    assert json.loads(done.output) == {"imported": 1, "examples": 3, "aside": aside}
    assert path.read_bytes() == before + b"\n" + json.dumps(rows[2]).encode() + b"\n"
    assert path.stat().st_mode & 0o077 == 0
    assert json.loads(run("data", "import", "--state", kitchen, "--json", more).output)["imported"] == 0


def test_labels_of_a_table_are_numbers_or_names_of_the_bundle(kitchen: Path) -> None:
    (kitchen / "more.tsv").write_text(f"{LABELS[3]}\tlock up\n2\tlight please\n")
    assert run("data", "import", "--state", kitchen, kitchen / "more.tsv").exit_code == 0
    found = parse_examples((kitchen / "examples.jsonl").read_bytes(), kitchen, len(LABELS))
    assert [(one.text, one.label) for one in found[-2:]] == [("lock up", 3), ("light please", 2)]


@pytest.mark.parametrize(
    ("name", "content", "about"),
    [
        ("more.tsv", "unknown\tlock up\n", "example.label"),
        ("more.tsv", "99\tlock up\n", "example.label"),
        ("more.tsv", "no tab\n", "more.tsv"),
        ("more.jsonl", '{"text": "lock up"}\n', "example"),
        ("more.jsonl", '{"text": "lock', "example"),
        ("more.jsonl", "\udcff", "examples"),
    ],
)
def test_an_import_that_is_not_valid_changes_nothing(kitchen: Path, name: str, content: str, about: str) -> None:
    before = (kitchen / "examples.jsonl").read_bytes()
    (kitchen / name).write_bytes(content.encode(errors="surrogateescape"))
    error = run("data", "import", "--state", kitchen, kitchen / name).exception
    assert isinstance(error, EdgeAdaptError)
    assert error.about == about
    assert (kitchen / "examples.jsonl").read_bytes() == before


def test_an_import_beyond_the_limit_of_the_file_changes_nothing(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (kitchen / "examples.jsonl").read_bytes()
    (kitchen / "more.tsv").write_text("0\tlock up\n")
    monkeypatch.setattr("client.cli.data.MAX_FILE", len(before) + 10)
    with refused(DataError, "examples"):
        raise run("data", "import", "--state", kitchen, kitchen / "more.tsv").exception or AssertionError
    assert storage.read(kitchen / "examples.jsonl") == before
