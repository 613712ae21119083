"""The personal step of a device makes its private adapter of its own examples, or the adapter in use stays."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from click.testing import Result

from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import IdentityKey
from client.learning import Learner
from client.learning.learner import LEARNED
from client.training.control import TrainingCheckpoint
from client.training.graphengine import GraphEngine
from client.training.personal import PersonalStep
from edgeadapt.formats import storage
from edgeadapt.formats.bundle import BASE, PHRASES, adapter_names, adapter_path
from export.onnx.exported import ExportedBase
from tests.client.learning.test_learner import OTHERS, TAUGHT, answer, drawn, phone, run, teach, trainable
from tests.support import refused
from tests.support.bundles import resign_base, stated
from tests.support.models import LABELS

__all__ = ["drawn", "phone", "trainable"]  # fixtures

MINE = [(text, 1) for text in ("play music", "stop the music", "play a song in the kitchen")] + [(TAUGHT, 2)] * 2


def examples(folder: Path, rows: list[tuple[str, int]] = MINE, held_out: str = TAUGHT, label: int = 2) -> Path:
    lines = [{"text": text, "label": number} for text, number in rows]
    lines.append({"text": held_out, "label": label, "split": "validation"})
    path = folder / "examples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def personalized(phone: Path, path: Path, *options: str) -> Result:
    steps = ("--epochs", "30", "--learning-rate", "0.02")
    return run("personalize", "--bundle", phone, *steps, *options, "--json", path)


@pytest.mark.parametrize("method", ["fine-tune", "ridge"])
def test_the_personal_step_makes_the_private_adapter_of_the_examples_and_is_undone(phone: Path, method: str) -> None:
    path, before = examples(phone.parent), answer(phone)
    done = personalized(phone, path, "--method", method, "--scale", "64")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["adapter"], found["version"], found["made"], found["held_out"]) == ("personal", 4, True, 1)
    assert (found["trained"], found["right"]["personal"]) == (5, 1)
    assert answer(phone) == LABELS[2] != before
    assert [one["text"] for one in found["changed"]] == [TAUGHT]
    assert stated(phone, "personal").parent == stated(phone).source
    undone = run("learn", "--bundle", phone, "--undo")
    assert undone.output == "global version 3 is in use, without the last personal step\n"
    assert (answer(phone), adapter_names(phone)) == (before, ["global"])


def test_a_personal_step_keeps_what_was_taught_and_starts_from_the_global_adapter(phone: Path) -> None:
    teach(phone, LABELS[3], OTHERS[0])
    done = personalized(phone, examples(phone.parent))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["version"], found["trained"], found["right"]["in use"]) == (5, 6, 0)
    assert (answer(phone), answer(phone, OTHERS[0])) == (LABELS[2], LABELS[3])


def test_a_ridge_head_replaces_one_that_may_know_the_held_out_examples(phone: Path) -> None:
    """In use is a head that was fitted to the held-out example: what it answers of that one says nothing."""
    method = ("--method", "ridge", "--scale", "64")
    assert json.loads(personalized(phone, examples(phone.parent), *method).stdout)["made"]
    found = json.loads(personalized(phone, examples(phone.parent), *method).stdout)
    assert (found["made"], found["version"], set(found["right"])) == (True, 5, {"global", "personal"})


def test_an_adapter_in_use_that_answers_more_stays(phone: Path) -> None:
    label = LABELS.index(answer(phone))
    before = files(phone)
    done = personalized(phone, examples(phone.parent, held_out=TAUGHT, label=label))
    found = json.loads(done.stdout)
    assert (found["adapter"], found["made"], found["right"]) == ("global", False, {"global": 1, "personal": 0})
    assert files(phone) == before


def test_a_personal_step_that_was_killed_goes_on_to_the_same_adapter(
    phone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, whole = examples(phone.parent), Path(shutil.copytree(phone.parent, tmp_path / "whole")) / "bundle"
    assert personalized(whole, path).exit_code == 0
    gradients, steps = GraphEngine.gradients, list[int]()

    def killed(self: GraphEngine, *rest: object) -> object:
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return gradients(self, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(TrainingCheckpoint, "due", lambda _: True)
    monkeypatch.setattr(GraphEngine, "gradients", killed)
    before = files(phone)
    assert personalized(phone, path).exit_code == 1
    assert files(phone) == before
    state = phone.parent / LEARNED / "training.sealed"
    assert state.stat().st_mode & 0o077 == 0
    assert personalized(phone, path).exit_code == 0
    assert len(steps) == 12 + 30 - 11
    assert not state.exists()
    assert weights(phone) == weights(whole)


def files(bundle: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(bundle.rglob("*")) if path.is_file()}


def weights(bundle: Path) -> bytes:
    return (bundle / adapter_path("personal")).read_bytes()


@pytest.mark.parametrize(
    ("lines", "about"),
    [
        ("", "examples.split"),
        ('{"text": "", "label": 1}\n', "example.text"),
        (json.dumps({"text": "x" * 20_000, "label": 1}) + "\n", "example.text"),
        (json.dumps({"text": "play music", "label": len(LABELS)}) + "\n", "example.label"),
        ('{"text": "play music"}\n', "example"),
        ("\xff", "examples"),
    ],
    ids=["empty", "empty text", "too long", "unknown label", "no label", "no UTF-8"],
)
def test_examples_that_are_not_valid_are_refused_and_the_adapter_in_use_stays(
    phone: Path, lines: str, about: str
) -> None:
    path = phone.parent / "examples.jsonl"
    path.write_bytes(lines.encode("latin-1"))
    before = files(phone)
    with Learner.open(phone) as learner, refused(DataError, about):
        learner.personalize(path, PersonalStep(1, 16.0), 0.01)
    assert files(phone) == before


@pytest.mark.parametrize(
    ("option", "number"), [("--learning-rate", "nan"), ("--seconds", "inf"), ("--duty-cycle", "-1"), ("--scale", "nan")]
)
def test_an_option_that_is_no_finite_number_of_its_range_is_refused(phone: Path, option: str, number: str) -> None:
    done = run("personalize", "--bundle", phone, option, number, examples(phone.parent))
    assert (done.exit_code, option in done.output) == (2, True), done.output
    assert adapter_names(phone) == ["global"]


def test_a_full_disk_while_a_training_is_kept_leaves_the_adapter_in_use(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = examples(phone.parent), files(phone)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TrainingCheckpoint, "due", lambda _: True)
    with Learner.open(phone) as learner:
        monkeypatch.setattr("client.training.control.storage.replace", full)
        with pytest.raises(OSError, match=r"No space"):
            learner.personalize(path, PersonalStep(30, 16.0), 0.02)
    assert files(phone) == before


def with_phrases(phone: Path, trainable: ExportedBase, vendor: IdentityKey, content: bytes) -> None:
    """Put public phrases into the bundle, signed by the vendor."""
    (phone / BASE / PHRASES).write_bytes(content)
    digest = storage.file_sha256(phone / BASE / PHRASES)
    resign_base(phone, vendor, files={**trainable.manifest.files, PHRASES: digest})


def test_a_personal_step_forgets_no_more_public_phrases_than_the_global_adapter_answers_wrong(
    phone: Path, trainable: ExportedBase, vendor: IdentityKey
) -> None:
    """Of each label two phrases are rehearsed and two counted. The device's examples give all of them one label."""
    texts = [f"{text} {number}" for text in OTHERS for number in ("now", "please", "again", "today", "soon")]
    before = {text: answer(phone, text) for text in texts}
    mine = [(text, 2) for text in OTHERS]
    with_phrases(phone, trainable, vendor, "".join(f"{label}\t{text}\n" for text, label in before.items()).encode())
    found = json.loads(personalized(phone, examples(phone.parent, mine)).stdout)
    labels = {label: [*before.values()].count(label) for label in before.values()}
    assert found["trained"] == len(mine) + sum(min(2, count) for count in labels.values())
    assert not before.keys() & {one["text"] for one in found["changed"]}


@pytest.mark.parametrize(
    ("content", "about"),
    [(b"Light\tturn on\nLight turn off\n", PHRASES), (b"Light\t\xff\n", PHRASES), (b"Light\t" + b"x" * 2**24, PHRASES)],
    ids=["no tab", "no UTF-8", "too long"],
)
def test_signed_phrases_that_cannot_be_read_are_refused_in_one_line_and_the_adapter_in_use_stays(
    phone: Path, trainable: ExportedBase, vendor: IdentityKey, content: bytes, about: str
) -> None:
    with_phrases(phone, trainable, vendor, content)
    before = adapter_names(phone)
    for done in (
        personalized(phone, examples(phone.parent)),
        run("infer", "--bundle", phone, "--teach", "Light", TAUGHT),
    ):
        assert isinstance(done.exception, DataError)
        assert (done.exception.about, "\n" in str(done.exception)) == (about, False)
    assert adapter_names(phone) == before


def test_truncated_phrases_are_refused(phone: Path, trainable: ExportedBase, vendor: IdentityKey) -> None:
    with_phrases(phone, trainable, vendor, b"Light\tturn on\nMusic\tplay music\n")
    (phone / BASE / PHRASES).write_bytes(b"Light\tturn on\nMus")
    with refused(TrustError, PHRASES), Learner.open(phone):
        pass
