"""The personal adapter: fine-tuned on the device from the global adapter, and kept only if it is the best.

The device decides with its own held-out examples. The personal adapter never leaves it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np

from adapters.analytic import ClassifierHead, refit
from adapters.layout import Layout, Tensors
from adapters.task import Task
from client.training.examples import Example, Score, Split, in_split
from client.training.moments import own_moments

if TYPE_CHECKING:  # imports torch
    from client.training.trainer import Trainer

# Of ``with_own_head``, chosen on households of validation seeds: MiniLM and multilingual-e5-small are equally good with
# 0.3 to 1 (docs/decisions/0033-analytic-head.md).
OWN_STRENGTH = 0.5


class Candidate(Enum):
    """The adapters that a device chooses from, from the least to the most personal."""

    BASE = "base"
    GLOBAL = "global"
    PERSONAL = "personal"


@dataclass(frozen=True, slots=True)
class Personalization:
    """The adapter that a device keeps, which candidate it is, and each candidate's score on the held-out examples."""

    chosen: Candidate
    adapter: Tensors
    scores: Mapping[Candidate, Score]


def personalize(
    trainer: "Trainer",
    candidates: Mapping[Candidate, Tensors],
    examples: Sequence[Example],
    task: Task,
    *,
    epochs: int,
    rng: np.random.Generator,
    step: Callable[[], object] = lambda: None,
) -> Personalization:
    """Fine-tune the global adapter on the training examples, and keep the best candidate on the held-out examples.

    Args:
        trainer: Of the frozen base.
        candidates: The base and the global adapter.
        examples: Of the device, all splits.
        task: How to train.
        epochs: Passes over the training examples; 0 trains nothing, and leaves ``candidates`` to choose from.
        rng: As for ``Trainer.train``.
        step: As for ``Trainer.train``.

    Returns:
        The candidate with the most correct answers, among equals that with the least loss, among these the most
        personal. Without held-out examples that is the most personal candidate.

    Raises:
        DataError: As ``Trainer.train``.
    """
    adapters = dict(candidates)
    if epochs:
        train = in_split(examples, Split.TRAIN)
        start = candidates[Candidate.GLOBAL]
        adapters[Candidate.PERSONAL] = trainer.train(start, train, task, epochs=epochs, rng=rng, step=step)
    held_out = in_split(examples, Split.VALIDATION)
    scores = {candidate: trainer.score(adapter, held_out) for candidate, adapter in adapters.items()}
    order = list(Candidate)
    chosen = max(scores, key=lambda c: (scores[c].correct, -scores[c].loss, order.index(c)))
    return Personalization(chosen, adapters[chosen], scores)


def with_own_head(
    trainer: "Trainer", adapter: Tensors, examples: Sequence[Example], *, scale: float, strength: float = OWN_STRENGTH
) -> Tensors:
    """The adapter with its head fitted to the training examples as well, by one regression and no training.

    The head before stands for the examples of all others (``adapters.ridge``). After a round of the analytic head,
    this gives a device what adding its own moments once more to the sum of all would give (docs/decisions/0033), and
    needs nothing of that sum.

    Args:
        trainer: Of the frozen base.
        adapter: Of which all but the head's weights stays.
        examples: Of the device, all splits.
        scale: Logit of a score of 1, as of the federation's rounds.
        strength: As many examples as the head before counts for in each direction.

    Raises:
        DataError: The adapter has no classification head, or an embedding is not finite.
    """
    return refit(adapter, own_moments(trainer, adapter, examples), strength=strength, scale=scale)


def with_both_heads(
    trainer: "Trainer", tuned: Tensors, shared: Tensors, examples: Sequence[Example], *, scale: float
) -> Tensors:
    """A fine-tuned adapter whose head is the sum of two: its own, and the shared one fitted to the device's examples.

    The logits of two heads on one embedding add up to those of one, so the ensemble is an adapter like every other.

    Args:
        trainer: Of the frozen base.
        tuned: The fine-tuned adapter, whose embeddings both heads read.
        shared: The adapter with the shared head, after a round of the analytic head.
        examples: Of the device, all splits.
        scale: As of ``with_own_head``.

    Raises:
        DataError: As ``with_own_head``.
    """
    head = ClassifierHead.of(Layout.of(tuned))
    names = (head.weight, head.bias)
    own = with_own_head(trainer, tuned | {name: shared[name] for name in names}, examples, scale=scale)
    return tuned | {name: tuned[name] + own[name] for name in names}
