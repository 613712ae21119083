"""Optimizers, schedules and clipping are torch's; limits are kept; what was killed goes on to the same end."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from adapters.layout import Tensors
from adapters.parts import PARTS
from adapters.peftconfig import PeftConfig
from adapters.task import OptimizerName, RateSchedule, Task
from aggregation.errors import DataError
from client.training.control import TrainingCheckpoint, TrainingControl, TrainingState
from client.training.descent import clipped, descend, finite
from tests.support.errors import refused

ADAMW = Task(PeftConfig.lora(2, 4), ("off", "on"), 1, 1, 0.05, 0.1, 0.0, PARTS, PARTS)
SGD = replace(ADAMW, optimizer=OptimizerName.SGD)
NAMES = ("x.lora_A.weight", "x.lora_B.weight", "classifier.weight")
START = {name: np.random.default_rng(n).normal(size=(3, 4)).astype(np.float32) for n, name in enumerate(NAMES)}
TARGETS = np.random.default_rng(9).normal(size=(5, 3, 4)).astype(np.float32)  # of five examples
ORDER = [[n % 5] for n in range(20)]  # four epochs


def loss_of(values: dict[str, Any], batch: list[int], library: Any) -> Any:
    """A loss with gradients of different sizes, which the tensors share."""
    target = torch.from_numpy(TARGETS[batch[0]]) if library is torch else TARGETS[batch[0]]
    total = sum((n + 1) * values[name] for n, name in enumerate(NAMES))
    return ((total - target) ** 2).sum()


def gradients_of(values: Tensors, batch: list[int]) -> tuple[float, Tensors]:
    total = sum((n + 1) * values[name] for n, name in enumerate(NAMES))
    slope = 2 * (total - TARGETS[batch[0]])
    found = {name: ((n + 1) * slope).astype(np.float32) for n, name in enumerate(NAMES)}
    return float(loss_of(values, batch, np)), found


def in_torch(task: Task) -> Tensors:
    """The same training with torch's optimizers, transformers' schedules and torch's clipping."""
    values = {name: torch.from_numpy(value.copy()).requires_grad_() for name, value in START.items()}
    settings = {"lr": task.learning_rate, "weight_decay": task.weight_decay}
    made: Any
    if task.optimizer is OptimizerName.SGD:
        made = torch.optim.SGD(list(values.values()), momentum=task.momentum, **settings)
    else:
        made = torch.optim.AdamW(list(values.values()), **settings)
    rates = get_scheduler(task.schedule.value, made, num_warmup_steps=0, num_training_steps=len(ORDER))
    for batch in ORDER:
        made.zero_grad()
        loss = loss_of(values, batch, torch)
        if task.proximal:
            away = sum(((values[name] - torch.from_numpy(START[name])) ** 2).sum() for name in NAMES)
            loss = loss + task.proximal / 2 * away
        loss.backward()
        if task.gradient_norm:
            torch.nn.utils.clip_grad_norm_(values.values(), task.gradient_norm)
        made.step()
        rates.step()
    return {name: value.detach().numpy() for name, value in values.items()}


def distance(left: Tensors, right: Tensors) -> float:
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


@pytest.mark.parametrize("schedule", list(RateSchedule))
@pytest.mark.parametrize(
    "task",
    [
        ADAMW,
        replace(ADAMW, proximal=2.0),
        replace(ADAMW, gradient_norm=0.01),
        replace(SGD, learning_rate=0.01),
        replace(SGD, learning_rate=0.01, momentum=0.8, proximal=2.0),
        replace(SGD, learning_rate=0.3, momentum=0.8, gradient_norm=1.0),
    ],
    ids=["AdamW", "AdamW, proximal", "AdamW, clipped", "SGD", "SGD, momentum, proximal", "SGD, momentum, clipped"],
)
def test_a_training_is_that_of_torchs_optimizer_schedule_and_clipping(task: Task, schedule: RateSchedule) -> None:
    task = replace(task, schedule=schedule)
    found, expected = descend(START, ORDER, gradients_of, task, epochs=4), in_torch(task)
    assert distance(found, expected) < 2e-5
    assert distance(START, expected) > 0.05
    other = replace(task, schedule=RateSchedule.COSINE if schedule is RateSchedule.LINEAR else RateSchedule.LINEAR)
    assert distance(descend(START, ORDER, gradients_of, other, epochs=4), expected) > 1e-4


def test_clipping_leaves_a_small_gradient_and_shortens_a_large_one() -> None:
    gradients = {"a": np.float32([3.0, 0.0]), "b": np.float32([4.0])}
    assert distance(clipped(gradients, 6.0), gradients) == 0
    norm = math.sqrt(sum(float((value**2).sum()) for value in clipped(gradients, 1.0).values()))
    assert norm == pytest.approx(1.0, rel=1e-5)


class Clock:
    """A clock that a step, and a pause, puts forward."""

    def __init__(self, each: float) -> None:
        self.now, self.each, self.pauses, self.steps = 0.0, each, list[float](), 0

    def gradients(self, values: Tensors, batch: list[int]) -> tuple[float, Tensors]:
        self.now += self.each
        self.steps += 1
        return gradients_of(values, batch)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses.append(seconds)

    def control(self, **settings: Any) -> TrainingControl:
        return TrainingControl(**settings, clock=lambda: self.now, sleep=self.sleep)


def test_after_its_time_a_training_ends_with_what_it_has() -> None:
    clock = Clock(2.0)
    found = descend(START, ORDER, clock.gradients, ADAMW, epochs=4, control=clock.control(seconds=7.0))
    assert clock.steps == 4
    assert distance(found, descend(START, ORDER[:4], gradients_of, ADAMW, epochs=1)) == 0


def test_pauses_keep_the_share_of_time_that_it_computes() -> None:
    clock = Clock(2.0)
    descend(START, ORDER, clock.gradients, ADAMW, epochs=4, control=clock.control(duty_cycle=0.25))
    assert clock.pauses == [pytest.approx(6.0)] * 20
    clock = Clock(1000.0)
    descend(START, ORDER, clock.gradients, ADAMW, epochs=4, control=clock.control(duty_cycle=0.25))
    assert set(clock.pauses) == {60.0}


def test_training_stops_early_with_the_best_adapter() -> None:
    losses, clock = iter([3.0, 2.0, 2.5, 2.0]), Clock(1.0)
    seen: list[Tensors] = []

    def held_out(values: Tensors) -> float:
        seen.append(dict(values))
        return next(losses)

    control = clock.control(patience=2, held_out=held_out)
    found = descend(START, [[0]] * 20, clock.gradients, ADAMW, epochs=10, control=control)
    assert (len(seen), clock.steps) == (4, 8)  # two epochs that were not better than the second
    assert distance(found, seen[1]) == 0 < distance(found, seen[3])


# A kill at any step.


class Killed(BaseException):
    pass


def checkpoint(folder: Path, **changes: Any) -> TrainingCheckpoint:
    settings: dict[str, Any] = {"path": folder / "training.sealed", "key": bytes(32), "subject": b"mine", "every": 0.0}
    return TrainingCheckpoint(**(settings | changes))


def interrupted(
    folder: Path, task: Task, at: int, held_out: Callable[[Tensors], float] | None = None, patience: int = 0
) -> None:
    left = iter(range(at))

    def step() -> None:
        if next(left, None) is None:
            raise Killed

    control = TrainingControl(checkpoint=checkpoint(folder), patience=patience, held_out=held_out)
    with pytest.raises(Killed):
        descend(START, ORDER, gradients_of, task, step, epochs=4, control=control)


@pytest.mark.parametrize("at", [0, 1, 5, 12, 19])
@pytest.mark.parametrize("task", [replace(ADAMW, schedule=RateSchedule.COSINE), replace(SGD, momentum=0.8)])
def test_a_training_that_was_killed_goes_on_to_the_same_adapter(tmp_path: Path, task: Task, at: int) -> None:
    task = replace(task, learning_rate=0.01)
    whole = descend(START, ORDER, gradients_of, task, epochs=4)
    interrupted(tmp_path, task, at)
    clock = Clock(1.0)
    control = clock.control(checkpoint=checkpoint(tmp_path))
    assert distance(descend(START, ORDER, clock.gradients, task, epochs=4, control=control), whole) == 0
    assert clock.steps == 20 - at


def test_early_stopping_goes_on_too(tmp_path: Path) -> None:
    def held_out(values: Tensors) -> float:
        return float(np.abs(values[NAMES[0]] - START[NAMES[0]]).max())  # the first epoch is the best

    interrupted(tmp_path, ADAMW, 12, held_out, patience=3)
    seen = []
    control = TrainingControl(
        patience=3, held_out=lambda values: (seen.append(1), held_out(values))[1], checkpoint=checkpoint(tmp_path)
    )
    found = descend(START, ORDER, gradients_of, ADAMW, epochs=4, control=control)
    assert distance(found, descend(START, ORDER[:5], gradients_of, ADAMW, epochs=1)) == 0
    assert len(seen) == 2  # of the third and the fourth epoch


@pytest.mark.parametrize(
    "changes", [{"subject": b"another"}, {"key": bytes(31) + b"1"}], ids=["another training", "another key"]
)
def test_the_state_of_another_training_is_not_continued(tmp_path: Path, changes: dict[str, Any]) -> None:
    interrupted(tmp_path, ADAMW, 5)
    assert checkpoint(tmp_path).read() is not None
    assert checkpoint(tmp_path, **changes).read() is None


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:40] + b"!" + raw[41:]])
def test_a_damaged_state_is_left_out_and_the_training_begins_anew(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    interrupted(tmp_path, ADAMW, 5)
    path = tmp_path / "training.sealed"
    path.write_bytes(damage(path.read_bytes()))
    clock = Clock(1.0)
    found = descend(
        START, ORDER, clock.gradients, ADAMW, epochs=4, control=clock.control(checkpoint=checkpoint(tmp_path))
    )
    assert clock.steps == 20
    assert distance(found, descend(START, ORDER, gradients_of, ADAMW, epochs=4)) == 0


def test_a_state_shows_nothing_of_the_adapter_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    interrupted(tmp_path, ADAMW, 5)
    path = tmp_path / "training.sealed"
    raw, state = path.read_bytes(), checkpoint(tmp_path).read()
    assert state is not None
    assert state.steps == 5
    assert b"lora_A" in state.encode()
    assert b"lora_A" not in raw
    assert path.stat().st_mode & 0o077 == 0
    assert TrainingState.decode(state.encode()).buffers.keys() == state.buffers.keys()


# Bad input.


def test_a_tensor_that_is_not_finite_is_refused() -> None:
    with refused(DataError, "training.adapter"):
        finite({"a": np.float32([1, np.nan])})


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with refused(DataError, "training.loss"):
        descend(START, ORDER, lambda values, batch: (math.nan, {}), ADAMW, epochs=4)
