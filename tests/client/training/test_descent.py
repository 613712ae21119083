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

from aggregation.errors import DataError
from client.training.control import TrainingCheckpoint, TrainingControl, TrainingState
from client.training.descent import DISTANCE, clipped, descend, finite
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds.task import OptimizerName, RateSchedule, Task, is_stable
from tests.support import refused

ADAMW = Task(PeftConfig.lora(2, 4), ("off", "on"), 1, 1, 0.05, 0.1, 0.0, PARTS, PARTS)
SGD = replace(ADAMW, optimizer=OptimizerName.SGD)
NAMES = ("x.lora_A.weight", "x.lora_B.weight", "classifier.weight")
START = {name: np.random.default_rng(n).normal(size=(3, 4)).astype(np.float32) for n, name in enumerate(NAMES)}
TARGETS = np.random.default_rng(9).normal(size=(5, 3, 4)).astype(np.float32)  # of five examples
ORDER = [[n % 5] for n in range(20)]  # four epochs
UNFAILING = TrainingControl(unfailing=True)  # as in a round


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
    made: Any
    if task.optimizer is OptimizerName.SGD:
        made = torch.optim.SGD(list(values.values()), lr=task.learning_rate, momentum=task.momentum)
    else:
        made = torch.optim.AdamW(list(values.values()), lr=task.learning_rate, weight_decay=task.weight_decay)
    rates = get_scheduler(task.schedule.value, made, num_warmup_steps=0, num_training_steps=len(ORDER))
    for batch in ORDER:
        made.zero_grad()
        loss = loss_of(values, batch, torch)
        if task.proximal:
            away = sum(((values[name] - torch.from_numpy(START[name])) ** 2).sum() for name in NAMES)
            loss = loss + task.proximal / 2 * away
        if task.optimizer is OptimizerName.SGD:  # so that the clipped gradient has it
            loss = loss + task.weight_decay / 2 * sum((value**2).sum() for value in values.values())
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


def test_the_devices_limit_clips_a_gradient_that_the_task_does_not() -> None:
    task = replace(SGD, learning_rate=0.05, weight_decay=0.0)
    own = descend(START, ORDER, gradients_of, task, epochs=4, control=TrainingControl(gradient_norm=1.0))
    assert distance(own, descend(START, ORDER, gradients_of, replace(task, gradient_norm=1.0), epochs=4)) == 0
    assert distance(own, descend(START, ORDER, gradients_of, task, epochs=4)) > 0.1


def test_weight_decay_is_in_the_gradient_that_is_clipped() -> None:
    """Else a tiny limit leaves nothing of the examples, and a number decays by what it is."""
    task = replace(SGD, learning_rate=1.0, weight_decay=0.5, gradient_norm=1e-9)
    assert distance(descend(START, ORDER, gradients_of, task, epochs=4), START) < 1e-6


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

    control = TrainingControl(checkpoint=checkpoint(folder), patience=patience, held_out=held_out, step=step)
    with pytest.raises(Killed):
        descend(START, ORDER, gradients_of, task, epochs=4, control=control)


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


def test_a_loss_that_is_not_finite_is_refused_outside_of_a_round() -> None:
    with refused(DataError, "training.loss"):
        descend(START, ORDER, lambda values, batch: (math.nan, {}), ADAMW, epochs=4)


# In a round training cannot fail (tests/attacks/test_40_training_that_fails.py).


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("task", [ADAMW, replace(SGD, learning_rate=1.0, momentum=0.9)], ids=["AdamW", "SGD"])
def test_whatever_the_gradients_a_trained_adapter_is_finite_and_near_its_start(task: Task, odd: float) -> None:
    found = descend(
        START,
        ORDER,
        lambda values, batch: (odd, {n: np.full_like(START[n], odd) for n in NAMES}),
        task,
        epochs=4,
        control=UNFAILING,
    )
    assert all(np.isfinite(value).all() for value in found.values())
    assert distance(found, START) <= 1.01 * DISTANCE


def test_a_gradient_that_is_not_finite_counts_as_zero(caplog: pytest.LogCaptureFixture) -> None:
    def sometimes(values: Tensors, batch: list[int]) -> tuple[float, Tensors]:
        loss, found = gradients_of(values, batch)
        return (math.nan, {**found, NAMES[0]: found[NAMES[0]] * np.float32("nan")}) if batch == [3] else (loss, found)

    def zero(values: Tensors, batch: list[int]) -> tuple[float, Tensors]:
        loss, found = gradients_of(values, batch)
        return loss, {name: np.zeros_like(value) if batch == [3] else value for name, value in found.items()}

    found = descend(START, ORDER, sometimes, SGD, epochs=4, control=UNFAILING)
    assert distance(found, descend(START, ORDER, zero, SGD, epochs=4)) == 0
    assert "4 of 20 gradients were not finite" in caplog.text


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_stable_task_shrinks_the_distance_and_an_unstable_one_grows_with_the_steps(momentum: float) -> None:
    """The gradient is that of the proximal term alone, and the start of the training is off by one."""

    def moved(proximal: float, steps: int) -> float:
        task = replace(SGD, learning_rate=0.1, weight_decay=0.0, momentum=momentum, proximal=proximal)
        first = iter([np.float32(1.0)])

        def gradients(values: Tensors, batch: list[int]) -> tuple[float, Tensors]:
            push = next(first, np.float32(0))
            return 0.0, {name: np.full_like(value, push) for name, value in values.items()}

        return distance(descend(START, [[0]] * steps, gradients, task, epochs=1), START)

    assert is_stable(0.1, 9.9, 0.0)
    assert moved(9.9, 200) < 0.11
    assert not is_stable(0.1, 60.0, 0.0)
    assert moved(60.0, 5) > 10 * moved(60.0, 2)
