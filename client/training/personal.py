"""The private adapter: fine-tuned on the device from the shared one, and kept only where it is the better one.

The device judges by its own held-out examples. What it keeps never leaves it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from adapters.layout import Tensors
from adapters.task import Task
from client.training.examples import Example, Split, part
from client.training.trainer import Score, Trainer


class Choice(Enum):
    """Which adapter a device keeps."""

    BASE = "base"
    GLOBAL = "global"
    PERSONAL = "personal"


@dataclass(frozen=True, slots=True)
class Personal:
    """The adapter that a device keeps, which of the candidates it is, and how each did on the held-out part."""

    choice: Choice
    adapter: Tensors
    scores: Mapping[Choice, Score]


def personalize(
    trainer: Trainer,
    shared: Mapping[Choice, Tensors],
    examples: Sequence[Example],
    task: Task,
    *,
    epochs: int,
    salt: str,
) -> Personal:
    """Fine-tune from the global adapter on the training part; keep the candidate that does best on the validation part.

    Args:
        trainer: Of the frozen base.
        shared: The base and the global adapter.
        examples: The device's own, all parts.
        task: How to train.
        epochs: Passes over the training part; none leaves base and global to choose from.
        salt: As for ``Trainer.train``.

    Returns:
        Best means most correct; then least loss; without held-out examples, the most personal candidate there is.
    """
    candidates = dict(shared)
    if epochs:
        train = part(examples, Split.TRAIN)
        candidates[Choice.PERSONAL] = trainer.train(shared[Choice.GLOBAL], train, task, epochs=epochs, salt=salt)
    held_out = part(examples, Split.VALIDATION)
    scores = {choice: trainer.score(adapter, held_out) for choice, adapter in candidates.items()}
    order = list(Choice)
    choice = max(scores, key=lambda c: (scores[c].correct, -scores[c].loss, order.index(c)))
    return Personal(choice, candidates[choice], scores)
