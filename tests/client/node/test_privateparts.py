"""Private parts: sealed, of one task and base, the same again for the same plan, and private for good."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregation.errors import ProtocolError, TrustError
from client.node.privateparts import PrivateParts, check_unshared, ever_private, private_on
from client.training.private import private_of, subject_of, with_private
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS, Part, part_of
from edgeadapt.rounds.task import Task
from tests.support import refused

TASK = Task(PeftConfig("LORA", 2, 4, ("q",)), ("off", "on"), 1, 16, 0.01, 0.0, 0.0, PARTS, (Part.A, Part.B))
KEY, FIRST, SECOND = b"k" * 32, b"1" * 32, b"2" * 32
BASE, OTHER = "b" * 64, "c" * 64


def adapter(value: float) -> Tensors:
    names = ("q.lora_A.weight", "q.lora_B.weight", "score.weight")
    return {name: np.full((2, 2), value, np.float32) for name in names}


SUBJECT = subject_of(BASE, TASK, Layout.of(adapter(0)))


def kept(
    start: float = 0, trained: float = 1, known: PrivateParts | None = None, base: str = BASE, task: Task = TASK
) -> PrivateParts:
    before, after = (private_of(adapter(value), task) for value in (start, trained))
    ever = ever_private(known, base, map(part_of, before))
    return PrivateParts(SUBJECT, FIRST, files.encode(before), files.encode(after), ever)


def test_they_open_as_they_were_sealed_and_with_no_other_key() -> None:
    parts = kept()
    assert PrivateParts.open(parts.seal(KEY), KEY) == parts
    for raw, key in ((parts.seal(KEY), b"x" * 32), (parts.seal(KEY)[:-1], KEY), (b"", KEY)):
        with refused(TrustError, "sealed.ciphertext"):
            PrivateParts.open(raw, key)


def test_the_same_plan_starts_again_where_it_started_and_the_next_one_goes_on() -> None:
    again = with_private(adapter(5), kept().start(SUBJECT, FIRST), TASK)
    following = with_private(adapter(5), kept().start(SUBJECT, SECOND), TASK)
    assert {name: value[0, 0] for name, value in again.items()} == {**dict.fromkeys(adapter(0), 5), "score.weight": 0}
    assert following["score.weight"][0, 0] == 1
    assert following["q.lora_A.weight"][0, 0] == 5


@pytest.mark.parametrize(
    "other",
    [
        subject_of(OTHER, TASK, Layout.of(adapter(0))),
        subject_of(BASE, replace(TASK, labels=("on", "off")), Layout.of(adapter(0))),
        subject_of(BASE, replace(TASK, peft_config=PeftConfig("LORA", 2, 8, ("q",))), Layout.of(adapter(0))),
        subject_of(BASE, TASK, Layout.of({"score.weight": np.zeros((3, 2), np.float32)})),
    ],
)
def test_those_of_another_base_or_task_are_not_used(other: bytes) -> None:
    assert kept().start(other) is None
    assert with_private(adapter(5), None, TASK)["score.weight"][0, 0] == 5


def test_settings_of_the_training_change_nothing() -> None:
    assert subject_of(BASE, replace(TASK, epochs=3, learning_rate=0.5), Layout.of(adapter(0))) == SUBJECT


@pytest.mark.parametrize(
    "changes",
    [
        {"shared": PARTS},  # the head too
        {"trained": (Part.A, Part.B), "shared": PARTS},  # shared, and not trained
        {"trained": (Part.A, Part.B)},  # neither
        {"trained": (Part.HEAD,), "shared": (Part.HEAD,)},
    ],
)
def test_a_task_in_which_a_part_is_not_private_gets_no_number_of_it(changes: dict[str, Any]) -> None:
    own = kept().start(SUBJECT, SECOND)
    assert with_private(adapter(5), own, replace(TASK, **changes))["score.weight"][0, 0] == 5


def test_a_task_that_shares_all_it_trains_keeps_nothing() -> None:
    assert not private_of(adapter(0), replace(TASK, shared=PARTS))
    assert not private_of(adapter(0), replace(TASK, trained=(Part.A,)))


def test_only_what_is_private_is_kept() -> None:
    assert set(private_of(adapter(0), TASK)) == {"score.weight"}


# Private for good.


def sharing(*parts: Part, **changes: Any) -> Task:
    return replace(TASK, **{"trained": parts, "shared": parts, **changes})


def test_a_part_that_was_private_stays_private_when_others_are() -> None:
    first = kept()
    second = kept(known=first, task=replace(TASK, shared=(Part.A, Part.HEAD)))
    assert private_on(second, BASE) == {Part.HEAD, Part.B}
    assert set(files.decode(second.after)) == {"q.lora_B.weight"}
    assert PrivateParts.open(second.seal(KEY), KEY) == second
    elsewhere = kept(known=second, base=OTHER)
    assert private_on(elsewhere, BASE) == {Part.HEAD, Part.B}
    assert private_on(elsewhere, OTHER) == {Part.HEAD}


@pytest.mark.parametrize(
    ("private", "plan", "part"),
    [
        (Part.HEAD, sharing(Part.HEAD), Part.HEAD),
        (Part.HEAD, sharing(*PARTS), Part.HEAD),
        (Part.HEAD, sharing(*PARTS, trained=(Part.A,)), Part.HEAD),  # that is not trained
        (Part.HEAD, sharing(Part.HEAD, labels=("a", "b", "c")), Part.HEAD),  # of another adapter of the base
        (Part.HEAD, sharing(Part.HEAD, peft_config=PeftConfig("LORA", 4, 4, ("k",))), Part.HEAD),
        (Part.HEAD, sharing(Part.R, Part.HEAD), Part.HEAD),
        (Part.A, sharing(Part.A), Part.A),
        (Part.B, sharing(*PARTS), Part.B),
        (Part.B, sharing(Part.R), Part.B),  # R is added to B
    ],
)
def test_a_plan_that_shares_a_part_which_was_private_is_refused_by_name(private: Part, plan: Task, part: Part) -> None:
    known = kept(task=replace(TASK, shared=tuple({*PARTS} - {private})))
    with refused(ProtocolError, "task.shared", value=part):
        check_unshared(known, BASE, plan)
    check_unshared(known, OTHER, plan)
    check_unshared(None, BASE, plan)


def test_a_plan_that_keeps_it_private_or_leaves_it_alone_is_accepted() -> None:
    check_unshared(kept(), BASE, TASK)
    check_unshared(kept(), BASE, sharing(Part.A, Part.B))
    check_unshared(kept(), BASE, sharing(Part.R))
    without_a = replace(TASK, shared=(Part.B, Part.HEAD))
    check_unshared(kept(task=without_a), BASE, sharing(Part.R))  # which leaves A as it is
