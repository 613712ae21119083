"""The engines with which a device trains: torch on the base itself, a training graph on the base of a bundle, or the
loop of a model that a package adds (``edgeadapt.bases.base.MODELS``).

The first two are imported when they are needed: torch takes seconds, and a device with a bundle need not have it. Of a
model with its own loop, the parameters are the adapter: a round sums the changes of all of them, and nothing is
exported."""

import zlib
from collections.abc import Callable, Sequence
from threading import Lock
from typing import Any, cast

import numpy as np
from cachetools import LRUCache, cached
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError
from client.training.control import UNLIMITED, TrainingControl
from client.training.examples import Example
from client.training.trainer import ClassifierTrainer, FrozenBase, LanguageTrainer, Trainer
from edgeadapt.bases.base import OwnModel
from edgeadapt.bases.states import Tokens
from edgeadapt.formats.bundle import VerifiedBase
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import OWN, PeftConfig
from edgeadapt.methods.parts import part_of
from edgeadapt.rounds.task import Task

TrainerOf = Callable[[FrozenBase, int, PeftConfig], Trainer]  # base, labels, configuration → the trainer


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

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Number the words, for what compares texts."""
        return [[zlib.crc32(word.encode()) for word in text.split()] for text in texts]

    def embed(self, texts: Sequence[str], adapter: Tensors | None = None) -> NDArray[np.float32]:
        reason = f"model {self.base.folder} has no embeddings, which heads and ridge need: leave them out"
        raise ConfigError(reason, about="base.model")


def _key(base: FrozenBase, *rest: object) -> object:
    """Key of a trainer: a bundle's base is that of its folder as long as its files stay the same."""
    files = (base.folder, *sorted(base.manifest.files.items())) if isinstance(base, VerifiedBase) else base
    return files, *rest


def open_trainer(base: FrozenBase, labels: int, config: PeftConfig) -> Trainer:
    """Open a trainer of its own, of a classifier or, without labels, of a language model. Raises ConfigError: the base
    cannot be opened, has no training graph or, for a classifier, another head than one over the mean of its tokens, or
    the method cannot be trained with it; TrustError: a file of the bundle changed."""
    if config.peft_type == OWN or isinstance(base, OwnModel):
        if not isinstance(base, OwnModel) or config.peft_type != OWN or not labels:
            reason = "a model with its own training loop has labels and no PEFT adapter"
            raise ConfigError(reason, about="task.peft_config")
        return OwnTrainer(base, labels)
    if isinstance(base, VerifiedBase):
        from client.inference.session import require_mean_head
        from client.training import graphengine

        if not labels:
            return graphengine.language(base, config)
        require_mean_head(base)
        return graphengine.classifier(base, labels, config)
    from client.training import torchengine

    return torchengine.classifier(base, labels, config) if labels else torchengine.language(base, config)


@cached(LRUCache(maxsize=2), key=_key, lock=Lock())
def classifier_trainer(base: FrozenBase, labels: int, config: PeftConfig) -> ClassifierTrainer:
    """Open the trainer of a federation's classifier, which stays loaded. Raises as ``open_trainer``."""
    return cast(ClassifierTrainer, open_trainer(base, labels, config))


def language_trainer(base: FrozenBase, config: PeftConfig) -> LanguageTrainer:
    """Open the trainer of a language model, which stays loaded. Raises as ``open_trainer``."""
    return _with_graph(base, config) if isinstance(base, VerifiedBase) else _with_torch(base, config)


def _language(base: FrozenBase, config: PeftConfig) -> LanguageTrainer:
    return cast(LanguageTrainer, open_trainer(base, 0, config))


# A device has no memory for two graphs.
_with_graph = cached(LRUCache(maxsize=1), key=_key, lock=Lock())(_language)
_with_torch = cached(LRUCache(maxsize=2), key=_key, lock=Lock())(_language)


def trainer_of(base: FrozenBase, labels: int, config: PeftConfig) -> Trainer:
    """Open the trainer of a classifier or, without labels, of a language model. Raises as ``open_trainer``."""
    return classifier_trainer(base, labels, config) if labels else language_trainer(base, config)
