"""A device learns a correction from then on, forgets it on demand, and keeps the adapter in use whatever fails."""

import errno
import itertools
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from peft import PeftModel

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.cli import device
from client.inference.session import ClassificationSession
from client.learning import Correction, Learned, Learner
from client.learning.learner import HISTORY, LEARNED, LOCK
from edgeadapt.bases.base import Base
from edgeadapt.formats import storage
from edgeadapt.formats.bundle import BASE, PHRASES, TRAINING, WEIGHTS, adapter_names
from edgeadapt.formats.manifest import Card, PrivacyBound
from edgeadapt.formats.peftconfig import PeftConfig
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from tests.support import refused
from tests.support.bundles import flip, resign_base, stated
from tests.support.models import LABELS, draw, slotted_of

__all__ = ["drawn", "phone", "trainable"]  # fixtures

CONFIG = PeftConfig.lora(rank=4, alpha=8)
BOUND = PrivacyBound(3.0, 1e-6)
CARD = Card(owner="Zoë", purpose="Lights", data="Volunteers", license="MIT", languages=("de", "en"))
TAUGHT = "turn on the kitchen lights"
OTHERS = ("lock the door", "play music", "set a timer for ten minutes", "is the door open")


@pytest.fixture(scope="module")
def trainable(model: PeftModel, tiny_base: Base) -> ExportedBase:
    return export_classifier(slotted_of(model), tiny_base, Profile.FP32, training=True)


@pytest.fixture(scope="module")
def drawn(model: PeftModel) -> AdapterSource:
    values = {name: value * np.float32(0.02 if "classifier" in name else 1) for name, value in draw(model, 0).items()}
    return AdapterSource("global", values, LABELS, 3, "c" * 64, None, CONFIG, privacy=BOUND, card=CARD)


@pytest.fixture
def phone(
    tmp_path: Path, trainable: ExportedBase, drawn: AdapterSource, vendor: IdentityKey, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A bundle that a device can train, with a global adapter; its few weights need longer steps than those of real
    bases.
    """
    monkeypatch.setattr("client.learning.learner.LEARNING_RATE", 0.02)
    write_bundle(tmp_path / "bundle", trainable, [drawn], key=vendor)
    (tmp_path / "trust.pem").write_bytes(vendor.public.to_pem())
    return tmp_path / "bundle"


def answer(bundle: Path, text: str = TAUGHT) -> str:
    """What a device answers with the adapter in use."""
    session = ClassificationSession.open(bundle)
    return session.classify([text], session.library.default())[0].label


def other(bundle: Path, text: str = TAUGHT) -> str:
    """A label that is not the answer."""
    return next(label for label in LABELS if label != answer(bundle, text))


def teach(bundle: Path, label: str, text: str = TAUGHT) -> Learned:
    with Learner.open(bundle) as learner:
        return learner.teach([Correction(text, label)])


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(device, list(map(str, arguments)))


def private_files(bundle: Path) -> Iterator[Path]:
    yield from (bundle.parent / LEARNED).iterdir()
    yield from (bundle / "adapters").glob("personal.*")


# --- learning and undoing


def test_a_correction_is_answered_from_then_on_and_undone(phone: Path) -> None:
    before, label = answer(phone), other(phone)
    learned = teach(phone, label)
    assert answer(phone) == label
    assert (learned.adapter, learned.version) == ("personal", 4)
    assert (stated(phone).privacy, stated(phone, "personal").privacy) == (BOUND, None)
    assert (stated(phone).card, stated(phone, "personal").card) == (CARD, None)
    (own,) = learned.taught
    assert (own.before.label, own.after.label) == (before, label)
    assert own.after.probability >= 0.8
    with Learner.open(phone) as learner:
        undone = learner.undo()
    assert [one.label for one in undone.corrections] == [label]
    assert (answer(phone), undone.adapter, adapter_names(phone)) == (before, "global", ["global"])


def test_each_lesson_is_undone_to_the_very_adapter_before(phone: Path) -> None:
    first = other(phone)
    teach(phone, first)
    made = stated(phone, "personal")
    teach(phone, other(phone, OTHERS[0]), OTHERS[0])
    with Learner.open(phone) as learner:
        learner.undo()
    back = stated(phone, "personal")
    assert (back.sha256, back.version) == (made.sha256, made.version + 2)
    assert answer(phone) == first


def test_only_the_last_lessons_can_be_undone_and_all_corrections_are_kept(
    phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.training.corrections.MAX_LESSONS", 2)
    for text in OTHERS[:3]:
        teach(phone, other(phone, text), text)
    for _ in range(2):
        with Learner.open(phone) as learner:
            assert learner.history.corrections[0].text == OTHERS[0]
            learner.undo()
    with refused(DataError, "--undo"), Learner.open(phone) as learner:
        learner.undo()


def test_earlier_corrections_are_rehearsed_and_not_unlearned(phone: Path) -> None:
    first = other(phone)
    teach(phone, first)
    for text in OTHERS:
        learned = teach(phone, other(phone, text), text)
        assert len(learned.others) > 0
    assert answer(phone) == first


def test_a_correction_replaces_an_earlier_one_that_the_model_reads_as_the_same_phrase(phone: Path) -> None:
    first, second, *_ = (label for label in LABELS if label != answer(phone))
    teach(phone, first)
    learned = teach(phone, second, f"  {TAUGHT.title()}")
    assert (answer(phone), len(learned.others)) == (second, 0)
    learned = teach(phone, first, OTHERS[0])
    assert (answer(phone), len(learned.others)) == (second, 1)


def test_two_labels_for_one_phrase_to_the_model_are_refused(phone: Path) -> None:
    with Learner.open(phone) as learner, refused(DataError, "corrections"):
        learner.teach([Correction(TAUGHT, LABELS[0]), Correction(TAUGHT.upper(), LABELS[1])])
    with Learner.open(phone) as learner:
        assert len(learner.teach([Correction(TAUGHT, LABELS[0]), Correction(TAUGHT.upper(), LABELS[0])]).taught) == 2


def test_public_phrases_of_the_bundle_are_rehearsed_and_those_answered_otherwise_are_shown(
    phone: Path, trainable: ExportedBase, vendor: IdentityKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.learning.learner.LEARNING_RATE", 0.2)  # so much that other answers change
    content = "".join(f"{answer(phone, text)}\t{text}\n" for text in (*OTHERS, "unlock", "play music on"))
    content += "Unknown\tsome label that this adapter lacks\n"
    (phone / BASE / PHRASES).write_text(content)
    digest = storage.file_sha256(phone / BASE / PHRASES)
    resign_base(phone, vendor, files={**trainable.manifest.files, PHRASES: digest})
    learned = teach(phone, other(phone))
    assert 0 < len(learned.others) < 6
    changed = [one for one in learned.others if one.changed]
    assert changed
    for one in changed:
        assert answer(phone, one.text) == one.after.label


def test_a_private_adapter_that_another_signed_learns_under_its_name_and_comes_back(
    phone: Path, trainable: ExportedBase, drawn: AdapterSource, vendor: IdentityKey
) -> None:
    write_bundle(phone, trainable, [drawn, replace(drawn, name="anna", parent="a" * 64)], key=vendor)
    before, label = answer(phone), other(phone)
    assert teach(phone, label).adapter == "anna"
    assert (answer(phone), stated(phone, "anna").parent) == (label, "a" * 64)
    with Learner.open(phone) as learner:
        learner.undo()
    assert answer(phone) == before


def test_what_was_learned_is_encrypted_and_readable_by_its_owner_alone(phone: Path) -> None:
    teach(phone, other(phone))
    teach(phone, other(phone, OTHERS[0]), OTHERS[0])
    for path in private_files(phone):
        assert path.name == LOCK or stat.S_IMODE(path.stat().st_mode) == 0o600, path
        assert TAUGHT.encode() not in path.read_bytes()
    assert stat.S_IMODE((phone.parent / LEARNED).stat().st_mode) == 0o700
    assert "kitchen" not in repr(Correction(TAUGHT, "Light"))


# --- the command


def test_the_commands_teach_list_and_undo(phone: Path, tmp_path: Path) -> None:
    label = other(phone)
    taught = run("infer", "--bundle", phone, "--teach", label, "--json", TAUGHT)
    assert taught.exit_code == 0, (taught.output, taught.exception)
    found = json.loads(taught.stdout)
    assert (found["adapter"], found["taught"][0]["after"]["label"]) == ("personal", label)
    (tmp_path / "more.tsv").write_text(f"{other(phone, OTHERS[0])}\t{OTHERS[0]}\n")
    shown = run("learn", "--bundle", phone, tmp_path / "more.tsv").output.splitlines()
    assert shown[0].startswith("personal version 5: 1 of 1 learned, ")
    assert shown[1].endswith(OTHERS[0])
    assert shown[2].endswith("of 1 other known phrases are answered otherwise")
    undone = json.loads(run("learn", "--bundle", phone, "--undo", "--json").stdout)
    assert (undone["adapter"], undone["version"], undone["corrections"][0]["text"]) == ("personal", 6, OTHERS[0])
    assert run("learn", "--bundle", phone, "--undo").output.splitlines() == [
        "global version 3 is in use, without what was learned last:",
        f"{label}  {TAUGHT}",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["learn"], "--undo"),
        (["learn", "--undo", "FILE"], "--undo"),
        (["learn", "--undo"], "--undo"),
        (["learn", "missing.tsv"], "missing.tsv"),
        (["learn", "FILE"], "corrections.tsv"),
        (["infer", "--teach", "Nothing", TAUGHT], "label"),
        (["infer", "--teach", "Light", " "], "text"),
        (["infer", "--teach", "Light", "😀"], "text.tokens"),
        (["infer", "--teach", "Light", "light " * 400], "text"),
        (["infer", "--teach", "Light", TAUGHT, TAUGHT], "corrections"),
        (["infer", "--teach", "Light", *map(str, range(65))], "corrections"),
        (["infer", "--teach", "Light", "--adapter", "global:0.5+personal", TAUGHT], "--teach"),
        (["infer", "--teach", "Light", "--adapter", "nobody", TAUGHT], "nobody.json"),
    ],
)
def test_wrong_input_is_refused_and_the_adapter_in_use_stays(
    phone: Path, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    (tmp_path / "corrections.tsv").write_text("Light without a tab\n")
    named = [str(tmp_path / "corrections.tsv") if word == "FILE" else word for word in arguments]
    result = run(named[0], "--bundle", phone, *named[1:])
    assert isinstance(result.exception, EdgeAdaptError), (result.output, result.exception)
    assert (result.exception.about, "\n" in str(result.exception)) == (expected, False)
    assert adapter_names(phone) == ["global"]


# --- bundles that cannot train


def test_a_bundle_without_a_training_graph_says_how_to_export_one(
    bundle: Path, exported: ExportedBase, drawn: AdapterSource, vendor: IdentityKey
) -> None:
    write_bundle(bundle, exported, [drawn], key=vendor)
    with refused(ConfigError, TRAINING) as caught:
        teach(bundle, "Light")
    assert "bundle make --training" in str(caught.value)


def test_an_adapter_without_a_peft_config_is_refused(
    phone: Path, trainable: ExportedBase, drawn: AdapterSource, vendor: IdentityKey
) -> None:
    write_bundle(phone, trainable, [replace(drawn, peft_config=None)], key=vendor)
    with refused(ConfigError, "adapter-manifest.peft_config"):
        teach(phone, "Light")


def test_a_signed_base_with_nan_weights_is_refused(phone: Path, trainable: ExportedBase, vendor: IdentityKey) -> None:
    weights = phone / BASE / WEIGHTS
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    resign_base(phone, vendor, files={**trainable.manifest.files, WEIGHTS: storage.file_sha256(weights)})
    with pytest.raises(EdgeAdaptError) as caught:
        teach(phone, "Light")
    assert caught.value.about in ("training.loss", TRAINING)
    assert adapter_names(phone) == ["global"]


@pytest.mark.parametrize("limit", ["MAX_STEPS", "MAX_SECONDS"])
def test_what_cannot_be_learned_leaves_the_adapter_in_use(
    phone: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(f"client.training.trainer.{limit}", 0)
    label = other(phone)
    with refused(DataError, "corrections"):
        teach(phone, label)
    assert adapter_names(phone) == ["global"]


# --- damage, two at once, a full disk, a kill


def test_a_history_that_was_altered_is_refused_and_the_adapter_still_answers(phone: Path) -> None:
    label = other(phone)
    teach(phone, label)
    flip(phone.parent / LEARNED / HISTORY, 0.9)
    with refused(TrustError, HISTORY):
        teach(phone, label, OTHERS[0])
    assert answer(phone) == label


def test_two_that_learn_at_once_get_one_line(phone: Path) -> None:
    with Learner.open(phone), refused(ConfigError, LOCK), Learner.open(phone):
        pass


@pytest.mark.parametrize("failing", [1, 2, 3], ids=["history", "manifest", "adapter"])
def test_a_full_disk_leaves_the_adapter_in_use(phone: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    label = other(phone)
    teach(phone, label)
    another = other(phone, OTHERS[0])
    write, flush, calls = Path.write_bytes, storage.flush, itertools.count(1)

    def full() -> None:
        if next(calls) >= failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda path, data: (full(), write(path, data))[1])
        patch.setattr(storage, "flush", lambda file: (full(), flush(file)))
        with pytest.raises(OSError, match="No space left"):
            teach(phone, another, OTHERS[0])
    assert answer(phone) == label
    with Learner.open(phone) as learner:
        assert [one.text for one in learner.history.corrections] == [TAUGHT]


KILLED = """
import os, signal, sys
from pathlib import Path
from client.learning import Correction, Learner

left = int(sys.argv[2])

def counted(real):
    def call(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)
    return call

os.replace, os.rename = counted(os.replace), counted(os.rename)
with Learner.open(Path(sys.argv[1])) as learner:
    learner.undo() if sys.argv[3] == "undo" else learner.teach([Correction(sys.argv[3], sys.argv[4])])
"""


@pytest.mark.slow
def test_a_kill_at_any_rename_leaves_the_adapter_in_use_or_the_new_one(phone: Path) -> None:
    before, label = answer(phone), other(phone)
    for number in itertools.count():
        command = [sys.executable, "-c", KILLED, str(phone), str(number), TAUGHT, label]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert answer(phone) in ((label,) if done.returncode == 0 else (before, label))
        if answer(phone) == label:
            break
    assert number >= 2  # history and pinned key at least
    for number in itertools.count():
        command = [sys.executable, "-c", KILLED, str(phone), str(number), "undo", ""]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert answer(phone) in (before, label)
        if answer(phone) == before:
            break
    with Learner.open(phone) as learner:
        assert learner.history.lessons == ()


# Several lessons of one learner, and sessions that are open meanwhile


def test_one_learner_gives_and_takes_back_several_lessons(phone: Path) -> None:
    before = answer(phone)
    first, second = other(phone), other(phone, OTHERS[0])
    with Learner.open(phone) as learner:
        learner.teach([Correction(TAUGHT, first)])
        learner.teach([Correction(OTHERS[0], second)])
        assert (answer(phone), answer(phone, OTHERS[0])) == (first, second)
        assert [one.text for one in learner.undo().corrections] == [OTHERS[0]]
        assert answer(phone) == first
        assert [one.text for one in learner.undo().corrections] == [TAUGHT]
        assert (answer(phone), adapter_names(phone)) == (before, ["global"])
        assert learner.teach([Correction(TAUGHT, first)]).version == 7
        assert answer(phone) == first


def test_a_base_that_was_altered_after_a_lesson_is_refused_by_the_next(phone: Path) -> None:
    label = other(phone)
    with Learner.open(phone) as learner:
        learner.teach([Correction(TAUGHT, label)])
        flip(phone / BASE / TRAINING, 0.5)
        with refused(TrustError, TRAINING):
            learner.teach([Correction(OTHERS[0], label)])


def test_an_open_session_answers_as_taught_and_as_before_after_undoing(phone: Path) -> None:
    session = ClassificationSession.open(phone)

    def found() -> str:
        return session.classify([TAUGHT], session.library.default())[0].label

    before = found()
    first, second, *_ = (label for label in LABELS if label != before)
    for label in (first, second):
        teach(phone, label)
        assert found() == label
    for label in (first, before):
        with Learner.open(phone) as learner:
            learner.undo()
        assert found() == label
    with refused(DataError, "personal.json"):
        session.classify([TAUGHT], "personal")


def test_the_end_of_a_phrase_that_is_not_trained_on_is_stated(phone: Path) -> None:
    text, label = "lock the door " * 100, other(phone)
    unread = ClassificationSession.open(phone).unread(text, "global")
    done = run("infer", "--bundle", phone, "--teach", label, text)
    assert (done.exit_code, done.stderr.count(f"the last {unread} tokens of 'lock the door ")) == (0, 1)
    found = json.loads(run("infer", "--bundle", phone, "--teach", other(phone, "unlock"), "--json", "unlock").stdout)
    assert found["taught"][0]["unread"] == 0


def test_a_label_is_taught_by_its_words_too(
    phone: Path, trainable: ExportedBase, drawn: AdapterSource, vendor: IdentityKey
) -> None:
    labels = ("light_on", "light on", "light_off", "Timer")
    write_bundle(phone, trainable, [replace(drawn, labels=labels, version=4)], key=vendor)
    for text, written, meant in (("unlock", "light off", "light_off"), ("play music", "light on", "light on")):
        done = run("infer", "--bundle", phone, "--teach", written, text)
        assert (done.exit_code, answer(phone, text)) == (0, meant), done.output
        assert done.output.splitlines()[0].endswith(" steps")  # and no time
        assert ("no other known phrase" in done.output) is (text == "unlock")  # of which the second lesson has one
