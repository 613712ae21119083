"""The few steps of training that learn corrections: from the adapter in use, until they are answered as taught.

Half of the loss is that of the corrections and half that of phrases to rehearse, so that these are not unlearned
(Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal"). Training stops early: each further step would
cost time and move what the adapter answers otherwise.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from adapters.layout import Floats, Tensors
from aggregation.errors import DataError
from client.training.descent import AdamW, finite
from client.training.examples import Example
from client.training.graphtrainer import GraphTrainer

LEARNING_RATE = 0.002
SURE = 0.8  # probability of a correction's label at which it counts as learned
MAX_STEPS = 30
MAX_SECONDS = 60.0  # after which no further step begins


class HasGradients(Protocol):
    def gradients(
        self, adapter: Tensors, examples: Sequence[Example], shares: Sequence[float]
    ) -> tuple[float, Tensors]:
        """The loss of examples with their shares, and its gradient by each tensor."""
        ...


@dataclass(frozen=True, slots=True)
class Tuned:
    """A tuned adapter, and the steps that it took."""

    adapter: Tensors
    steps: int


def tune(
    trainer: GraphTrainer,
    start: Tensors,
    taught: Sequence[Example],
    rehearsed: Sequence[Example],
    clock: Callable[[], float] = time.monotonic,
) -> Tuned:
    """Train on all examples at once, until each correction has its label with probability ``SURE``.

    Args:
        trainer: Of the frozen base.
        start: The adapter in use.
        taught: The corrections, at least one.
        rehearsed: Phrases that the adapter shall still answer.
        clock: Seconds.

    Returns:
        After at most ``MAX_STEPS``, and ``MAX_SECONDS`` and a step; without a step, if it answers as taught already.

    Raises:
        DataError: The loss or the adapter is not finite, or the training graph does not run.
    """

    def learned(adapter: Tensors) -> bool:
        return _learned(trainer, adapter, taught)

    return descend_until(learned, trainer, start, taught, rehearsed, LEARNING_RATE, clock)


def descend_until(
    learned: Callable[[Tensors], bool],
    trainer: HasGradients,
    start: Tensors,
    taught: Sequence[Example],
    rehearsed: Sequence[Example],
    rate: float,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[int], object] = lambda _: None,
) -> Tuned:
    """As ``tune`` at a learning ``rate``, until an adapter has ``learned``.

    ``report`` gets the number of each step before it, from 1.
    """
    examples = [*taught, *rehearsed]
    half = 0.5 if rehearsed else 1.0
    shares = [half / len(group) for group in (taught, rehearsed) for _ in group]
    values, optimizer, end = dict(start), AdamW(rate, 0.0), clock() + MAX_SECONDS
    for step in range(MAX_STEPS):
        if clock() >= end or learned(values):
            return Tuned(finite(values), step)
        report(step + 1)
        loss, gradients = trainer.gradients(values, examples, shares)
        if not np.isfinite(loss):
            reason = "the training loss is not finite: the base or the adapter in use is damaged; copy the bundle again"
            raise DataError(reason, about="training.loss")
        optimizer.step(values, gradients)
    return Tuned(finite(values), MAX_STEPS)


def probabilities(logits: Floats, temperature: float) -> Floats:
    """The softmax of each row of logits that are divided by ``temperature``."""
    exponentials = np.exp((logits - logits.max(axis=1, keepdims=True)) / temperature)
    result: Floats = exponentials / exponentials.sum(axis=1, keepdims=True)
    return result


def _learned(trainer: GraphTrainer, adapter: Tensors, taught: Sequence[Example]) -> bool:
    found = probabilities(trainer.logits(adapter, [one.text for one in taught]), 1.0)
    return bool((found[np.arange(len(taught)), [one.label for one in taught]] >= SURE).all())
