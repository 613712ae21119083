"""Optimizers in NumPy, and training with them: what the training of an adapter needs besides gradients. Every engine
(``trainer.Engine``) brings its own gradients. So what a task demands, and what the owner of a device limits, is kept in
one place, and all engines make the same adapter of the same gradients."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import DataError
from client.training.control import UNLIMITED, Doubles, TrainingControl, TrainingState
from edgeadapt.formats.layout import Tensors
from edgeadapt.methods.parts import part_of
from edgeadapt.rounds.task import OptimizerName, RateSchedule, Task

log = logging.getLogger("edgeadapt.device")

BETAS, EPSILON = (0.9, 0.999), 1e-8  # torch's defaults, and those of the paper
DISTANCE = np.float32(1000.0)  # in weight units: the farthest that training takes a number from its start
GradientsOf = Callable[[Tensors, list[int]], tuple[float, Tensors]]


@dataclass(slots=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2, as torch has it). Its buffers are in
    double precision, in which squares of small gradients are not denormal."""

    learning_rate: float
    weight_decay: float
    steps: int = 0
    buffers: dict[str, Doubles] = field(default_factory=dict, repr=False)

    def step(self, parameters: Tensors, gradients: Tensors, factor: float = 1.0) -> None:
        """Replace each parameter that has a gradient (the same ones in each step); their arrays stay as they are.
        ``factor``: of the learning rate."""
        self.steps += 1
        first_bias, second_bias = (1 - beta**self.steps for beta in BETAS)
        rate = factor * self.learning_rate
        for name, raw in gradients.items():
            gradient = raw.astype(np.float64)
            first, second = (self.buffers.get(f"{name}.{n}", np.zeros(gradient.shape)) for n in ("first", "second"))
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            self.buffers |= {f"{name}.first": first, f"{name}.second": second}
            change = first / first_bias / (np.sqrt(second / second_bias) + EPSILON)
            decayed = parameters[name] * (1 - rate * self.weight_decay)
            parameters[name] = (decayed - rate * change).astype(np.float32)


@dataclass(slots=True)
class SGD:
    """Stochastic gradient descent with momentum (Polyak 1964), as torch has it without weight decay."""

    learning_rate: float
    momentum: float
    steps: int = 0
    buffers: dict[str, Doubles] = field(default_factory=dict, repr=False)

    def step(self, parameters: Tensors, gradients: Tensors, factor: float = 1.0) -> None:
        self.steps += 1
        for name, raw in gradients.items():
            change = raw.astype(np.float64)
            if self.momentum:
                change += self.momentum * self.buffers.get(name, np.zeros(change.shape))
                self.buffers[name] = change
            parameters[name] = (parameters[name] - factor * self.learning_rate * change).astype(np.float32)


def descend(
    start: Tensors,
    order: Sequence[list[int]],
    gradients_of: GradientsOf,
    task: Task,
    *,
    epochs: int,
    control: TrainingControl = UNLIMITED,
) -> Tensors:
    """Minimize a loss over the parts of an adapter that a task trains.

    Guarantee: with ``control.unfailing`` it ends for every task, adapter and example, and a trained number is finite
    and at most ``DISTANCE`` from its start. If training could fail for some examples, a coordinator would choose a task
    with which the updates of all devices but one are missing in the sum. The proximal term and SGD's weight decay are
    added to a gradient before it is clipped. So a step of SGD has at most the length rate · norm / (1 - momentum), with
    the norm of ``control``, and one of AdamW moves a number by some three times the rate.

    Args:
        start: All tensors of the adapter, finite, and R of Fed-SB if the task trains it.
        gradients_of: Tensors and batch → its mean loss, and the gradients by at least the trained tensors.
        control: Limits of this device; what it keeps of a training that was interrupted is continued.

    Returns:
        All tensors, finite: the last ones, or with ``control.patience`` those with the least loss on held-out examples.

    Raises DataError: the adapter has none of the parts, or a loss, gradient or trained tensor is not finite."""
    trained = [name for name in start if part_of(name) in task.trained]
    if not trained:
        raise DataError("the adapter has none of the parts that the task trains", about="task.trained")
    optimizer = optimizer_of(task)
    checkpoint = control.checkpoint
    kept = checkpoint.read() if checkpoint else None
    fits = kept is not None and kept.values.keys() == set(trained)
    state = kept if kept and fits else TrainingState(0, {name: start[name] for name in trained}, {})
    optimizer.steps, optimizer.buffers, values = state.steps, dict(state.buffers), start | state.values
    begun, best, per_epoch = control.clock(), state.best, len(order) // max(epochs, 1)
    limit, odd = min(task.gradient_norm or math.inf, control.gradient_norm), 0
    for number in range(state.steps, len(order)):
        if control.ends(begun, best, values):
            break
        control.step()
        with control.paced():
            loss, raw = gradients_of(values, order[number])
            if not (np.isfinite(loss) and all(np.isfinite(raw[name]).all() for name in trained)):
                if not control.unfailing:
                    raise DataError("the training loss is not finite; lower the learning rate", about="training.loss")
                raw, odd = {name: np.zeros_like(start[name]) for name in trained}, odd + 1
            gradients = regularized({name: raw[name] for name in trained}, values, start, task)
            with np.errstate(over="ignore"):
                optimizer.step(values, clipped(gradients, limit), schedule(task.schedule, number, len(order)))
            if control.unfailing:
                values |= {n: np.clip(values[n], start[n] - DISTANCE, start[n] + DISTANCE) for n in trained}
        if control.patience and (number + 1) % per_epoch == 0:
            best = control.judged(best, {name: values[name] for name in trained}, values)
        if checkpoint and checkpoint.due():
            now = {name: values[name] for name in trained}
            checkpoint.write(TrainingState(number + 1, now, optimizer.buffers, best))
    if odd:
        log.warning("%d of %d gradients were not finite and count as zero: lower the learning rate", odd, len(order))
    return finite(values | best.values if best else values)


def regularized(gradients: Tensors, values: Tensors, start: Tensors, task: Task) -> Tensors:
    """Add the gradients of the task's proximal term and, with SGD, of its weight decay. The proximal term is FedProx's
    (Li et al. 2020); Ditto's personal objective is the same (Li et al. 2021)."""
    if not task.proximal and not task.weight_decay:
        return gradients
    pull = np.float32(task.proximal)
    decay = np.float32(task.weight_decay if task.optimizer is OptimizerName.SGD else 0.0)
    return {
        name: value + pull * (values[name] - start[name]) + decay * values[name] for name, value in gradients.items()
    }


def optimizer_of(task: Task) -> AdamW | SGD:
    if task.optimizer is OptimizerName.SGD:
        return SGD(task.learning_rate, task.momentum)
    return AdamW(task.learning_rate, task.weight_decay)


def schedule(kind: RateSchedule, number: int, steps: int) -> float:
    """Compute the factor of the learning rate at step ``number``, from 0 on; transformers' schedules without warm-up.

    ``kind``: ``CONSTANT``, ``LINEAR`` to 0, or half a period of a ``COSINE`` to 0 (Loshchilov and Hutter 2017).

    >>> [round(schedule(RateSchedule.LINEAR, n, 4), 2) for n in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    match kind:
        case RateSchedule.CONSTANT:
            return 1.0
        case RateSchedule.LINEAR:
            return 1 - number / steps
        case RateSchedule.COSINE:
            return 0.5 * (1 + math.cos(math.pi * number / steps))


def clipped(gradients: Mapping[str, NDArray[np.float32]], limit: float) -> Tensors:
    """Scale gradients to an L2 norm over all of at most ``limit`` (Pascanu et al. 2013); torch's, to its 1e-6."""
    if limit == math.inf:
        return dict(gradients)
    norm = math.sqrt(sum(float(np.square(value, dtype=np.float64).sum()) for value in gradients.values()))
    factor = np.float32(min(limit / (norm + 1e-6), 1.0))
    return {name: value * factor for name, value in gradients.items()}


def finite(trained: Tensors) -> Tensors:
    """Check that trained tensors are finite, and return them. After the last step, no loss shows it. Raises
    DataError."""
    if not all(np.isfinite(tensor).all() for tensor in trained.values()):
        raise DataError("the trained adapter is not finite; lower the learning rate", about="training.adapter")
    return trained
