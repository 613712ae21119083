"""Several lessons of one learner, sessions that are open meanwhile, and what a person reads and writes of a lesson."""

import json
from dataclasses import replace
from pathlib import Path

from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from client.learning import Correction, Learner
from edgeadapt.formats.bundle import BASE, TRAINING, adapter_names
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase
from tests.client.learning.test_learner import OTHERS, TAUGHT, answer, drawn, other, phone, run, teach, trainable
from tests.support.bundles import flip
from tests.support.errors import refused
from tests.support.models import LABELS

__all__ = ["drawn", "phone", "trainable"]  # fixtures


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
