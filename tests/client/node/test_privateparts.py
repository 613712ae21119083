"""Private parts: sealed, of one task and base, and the same again for the same plan."""

from dataclasses import replace

import numpy as np
import pytest

from adapters import files
from adapters.layout import Layout, Tensors
from adapters.parts import PARTS, Part
from adapters.peftconfig import PeftConfig
from adapters.task import Task
from aggregation.errors import TrustError
from client.node.privateparts import PrivateParts
from client.training.private import private_file, subject_of, with_private
from tests.support import refused

TASK = Task(PeftConfig("LORA", 2, 4, ("q",)), ("off", "on"), 1, 16, 0.01, 0.0, 0.0, PARTS, (Part.A, Part.B))
KEY, FIRST, SECOND = b"k" * 32, b"1" * 32, b"2" * 32
BASE = "b" * 64


def adapter(value: float) -> Tensors:
    names = ("q.lora_A.weight", "q.lora_B.weight", "score.weight")
    return {name: np.full((2, 2), value, np.float32) for name in names}


SUBJECT = subject_of(BASE, TASK, Layout.of(adapter(0)))


def kept(start: float = 0, trained: float = 1) -> PrivateParts:
    before, after = (private_file(adapter(value), TASK) for value in (start, trained))
    assert before is not None
    assert after is not None
    return PrivateParts(SUBJECT, FIRST, before, after)


def test_they_open_as_they_were_sealed_and_with_no_other_key() -> None:
    parts = kept()
    assert PrivateParts.open(parts.seal(KEY), KEY) == parts
    for raw, key in ((parts.seal(KEY), b"x" * 32), (parts.seal(KEY)[:-1], KEY), (b"", KEY)):
        with refused(TrustError, "sealed.ciphertext"):
            PrivateParts.open(raw, key)


def test_the_same_plan_starts_again_where_it_started_and_the_next_one_goes_on() -> None:
    again = with_private(adapter(5), kept().start(SUBJECT, FIRST))
    following = with_private(adapter(5), kept().start(SUBJECT, SECOND))
    assert {name: value[0, 0] for name, value in again.items()} == {**dict.fromkeys(adapter(0), 5), "score.weight": 0}
    assert following["score.weight"][0, 0] == 1
    assert following["q.lora_A.weight"][0, 0] == 5


@pytest.mark.parametrize(
    "other",
    [
        subject_of("c" * 64, TASK, Layout.of(adapter(0))),
        subject_of(BASE, replace(TASK, labels=("on", "off")), Layout.of(adapter(0))),
        subject_of(BASE, replace(TASK, peft_config=PeftConfig("LORA", 2, 8, ("q",))), Layout.of(adapter(0))),
        subject_of(BASE, TASK, Layout.of({"score.weight": np.zeros((3, 2), np.float32)})),
    ],
)
def test_those_of_another_base_or_task_are_not_used(other: bytes) -> None:
    assert kept().start(other) is None
    assert with_private(adapter(5), None)["score.weight"][0, 0] == 5


def test_settings_of_the_training_change_nothing() -> None:
    assert subject_of(BASE, replace(TASK, epochs=3, learning_rate=0.5), Layout.of(adapter(0))) == SUBJECT


def test_a_task_that_shares_all_it_trains_keeps_nothing() -> None:
    assert private_file(adapter(0), replace(TASK, shared=PARTS)) is None
    assert private_file(adapter(0), replace(TASK, trained=(Part.A,))) is None


def test_the_file_holds_only_what_is_private() -> None:
    assert set(files.decode(kept().after)) == {"score.weight"}
