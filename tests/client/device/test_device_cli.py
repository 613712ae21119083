import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aggregation.pki.identity import IdentityKey
from export.bundle.base import ExportedBase
from export.bundle.write import AdapterSource, add_adapter

Source = Callable[..., AdapterSource]
Done = subprocess.CompletedProcess[str]


def device(*arguments: str | Path, stdin: str | bytes = "") -> Done:
    """The command as a person runs it: a process of its own."""
    raw = stdin.encode() if isinstance(stdin, str) else stdin
    command = [sys.executable, "-m", "edgeadapt", "device", *map(str, arguments)]
    done = subprocess.run(command, input=raw, capture_output=True, check=False)
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def refused(done: Done, message: str) -> None:
    assert done.returncode != 0
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


@pytest.fixture
def with_anna(bundle: Path, exported: ExportedBase, source: Source, household: IdentityKey) -> Path:
    add_adapter(bundle, exported.plan, source("anna", seed=7, parent="a" * 64), key=household)
    return bundle


def test_a_phrase_is_answered_with_intent_and_probability(bundle: Path) -> None:
    done = device("infer", "--bundle", bundle, "lock the door")
    assert done.returncode == 0, done.stderr
    label, probability = done.stdout.split()
    assert label in ("Light", "Lock", "Music", "Timer")
    assert 25 <= float(probability.rstrip("%")) <= 100


def test_several_phrases_and_several_adapters_are_told_apart(with_anna: Path) -> None:
    done = device("infer", "--bundle", with_anna, "--adapter", "global", "--adapter", "anna", "unlock", "play music")
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[2] for row in rows] == ["global", "global", "anna", "anna"]
    assert [row[3:] for row in rows] == [["unlock"], ["play", "music"]] * 2


def test_phrases_are_read_from_standard_input(bundle: Path) -> None:
    done = device("infer", "--bundle", bundle, "--json", "--top", "2", "-", stdin="lock the door\n\nplay music\n")
    (result,) = json.loads(done.stdout)["adapters"]
    assert (result["adapter"], result["version"]) == ("global", 3)
    assert [answer["text"] for answer in result["answers"]] == ["lock the door", "play music"]
    assert all(len(answer["intents"]) == 2 for answer in result["answers"])


def test_several_adapters_answer_as_one(with_anna: Path) -> None:
    done = device("infer", "--bundle", with_anna, "--json", "--compose", "global:0.5+anna:1", "unlock")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["adapters"][0]["adapter"] == "anna+global:0.5"
    refused(device("infer", "--bundle", with_anna, "--compose", "global:x", "unlock"), "'x' is no weight")


def test_the_private_adapter_answers_when_none_is_named(with_anna: Path) -> None:
    done = device("infer", "--bundle", with_anna, "--json", "unlock")
    assert json.loads(done.stdout)["adapters"][0]["adapter"] == "anna"


def test_adapters_are_listed_with_what_was_verified(with_anna: Path) -> None:
    done = device("adapters", "--bundle", with_anna)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:4] for line in done.stdout.splitlines()] == [
        ["anna", "private", "version", "3"],
        ["global", "shared", "version", "3"],
    ]


def test_a_listing_names_what_must_not_be_used_and_fails(with_anna: Path) -> None:
    (with_anna / "adapters" / "anna.onnx_adapter").write_bytes(b"\0")
    done = device("adapters", "--bundle", with_anna)
    refused(done, "1 of 2 adapters must not be used: anna")
    assert "anna  refused:" in done.stdout
    assert "global  shared" in done.stdout


def test_help_shows_examples() -> None:
    done = device("infer", "--help")
    assert 'edgeadapt device infer --bundle runs/demo/bundle "turn on the kitchen lights"' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "../global", "unlock"], "adapter name '../global'"),
        (["--adapter", "nobody", "unlock"], "it has: global"),
        (["--compose", "", "unlock"], "adapter name ''"),
        ([""], "an empty text has no answer"),
        (["a" * 70_000], "above the limit"),
        (["-"], "standard input held no phrase"),
        (["--trust", "nowhere.pem", "unlock"], "no pinned keys"),
    ],
)
def test_bad_input_is_one_line_and_a_failure(bundle: Path, arguments: list[str], message: str) -> None:
    refused(device("infer", "--bundle", bundle, *arguments), message)


def test_bytes_that_are_no_text_are_refused(bundle: Path) -> None:
    refused(device("infer", "--bundle", bundle, "-", stdin=b"lock \xff\n"), "UTF-8")


def test_what_steers_a_terminal_is_not_printed_back(bundle: Path) -> None:
    done = device("infer", "--bundle", bundle, "\x1b[31mlock", "a\nb")
    assert [line.split()[2:] for line in done.stdout.splitlines()] == [["[31mlock"], ["a", "b"]]


def test_a_damaged_bundle_is_one_line_and_a_failure(bundle: Path, tmp_path: Path) -> None:
    refused(device("infer", "--bundle", tmp_path / "nowhere", "unlock"), "no bundle at")
    (bundle / "base" / "model.onnx").write_bytes(b"")
    refused(device("infer", "--bundle", bundle, "unlock"), "not the file that was signed")


def test_an_error_in_json_is_an_object_too(bundle: Path) -> None:
    done = device("infer", "--bundle", bundle, "--json", "--adapter", "nobody", "unlock")
    refused(done, "it has: global")
    assert "it has: global" in json.loads(done.stdout)["error"]
