"""A classifier that a package adds, with its training loop, as a trainer (``edgeadapt.bases.base.MODELS``).

Its parameters are the adapter: a round sums the changes of all of them, and nothing is exported.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError
from client.training.control import UNLIMITED, TrainingControl
from client.training.examples import Example
from client.training.trainer import ClassifierTrainer, FrozenBase
from edgeadapt.bases.base import OwnModel
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import OWN, PeftConfig
from edgeadapt.methods.parts import part_of
from edgeadapt.rounds.task import Task


class OwnTrainer(ClassifierTrainer):
    """Raises DataError as ``OwnModel.first``."""

    states = None  # as of an engine

    def __init__(self, base: OwnModel, labels: int) -> None:
        self.base, self.labels, self.model = base, labels, base.make(labels)
        self.layout = Layout.of(base.first(labels))
        self.engine: Any = self  # has base and layout
        self.objective = base.task

    def train(
        self,
        start: Tensors,
        examples: Sequence[Example],
        task: Task,
        *,
        epochs: int,
        rng: np.random.Generator,
        control: TrainingControl = UNLIMITED,
    ) -> Tensors:
        """Call the model's loop for each epoch. The limits of ``control`` hold between two calls. Raises DataError:
        there are no examples, or the loop returned other arrays than it got."""
        if not examples:
            raise DataError("there are no examples to train on; add some", about="examples")
        values, begun, best = self.layout.select(start), control.clock(), None
        trained = {name for name in values if part_of(name) in task.trained}
        for _ in range(epochs):
            if control.ends(begun, best, values):
                break
            control.step()
            with control.paced():
                copies = {name: value.copy() for name, value in values.items()}
                after = self.model.train(copies, list(examples), task, rng)
            self.layout.check(after)
            values = {name: (after if name in trained else values)[name] for name in values}
            if control.patience:
                best = control.judged(best, values, values)
        return best.values if best else values

    def logits(self, adapter: Tensors, texts: Sequence[str]) -> NDArray[np.float32]:
        if not texts:
            return np.zeros((0, 0), np.float32)
        logits = np.asarray(self.model.logits(adapter, list(texts)), np.float32)
        if logits.shape != (len(texts), self.labels):
            reason = f"model {self.base.folder} gave logits of shape {logits.shape}, not {(len(texts), self.labels)}"
            raise DataError(reason, about="logits")
        return logits

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Number the words, for what compares texts."""
        return [[zlib.crc32(word.encode()) for word in text.split()] for text in texts]

    def embed(self, texts: Sequence[str], adapter: Tensors | None = None) -> NDArray[np.float32]:
        reason = f"model {self.base.folder} has no embeddings, which heads and ridge need: leave them out"
        raise ConfigError(reason, about="base.model")


def classifier(base: FrozenBase, labels: int, config: PeftConfig) -> OwnTrainer:
    """Open the trainer of a model with a loop of its own. Raises ConfigError: the base is not one, there are no
    labels, or the adapter is one of PEFT."""
    if not isinstance(base, OwnModel) or config.peft_type != OWN or not labels:
        raise ConfigError("a model with its own training loop has labels and no PEFT adapter", about="task.peft_config")
    return OwnTrainer(base, labels)
