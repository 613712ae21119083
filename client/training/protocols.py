"""What trains an adapter, whatever the engine, and what it trains on. Imports no engine (``engine``)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from adapters.base import Base
from adapters.bundle import VerifiedBase
from adapters.layout import Layout, Tensors
from adapters.task import Task
from client.training.control import UNLIMITED, TrainingControl
from client.training.examples import Example, Score

FrozenBase = Base | VerifiedBase


class LocalTrainer(Protocol):
    """What trains and scores an adapter: ``trainer.Trainer``, ``language.LanguageTrainer``, or, without torch, that of
    ``graphtrainer`` or ``languagegraph``.
    """

    layout: Layout

    @property
    def base(self) -> FrozenBase: ...

    def train(
        self,
        start: Tensors,
        examples: Sequence[Example],
        task: Task,
        *,
        epochs: int,
        rng: np.random.Generator,
        step: Callable[[], object] = lambda: None,
        control: TrainingControl = UNLIMITED,
    ) -> Tensors:
        """Train for ``epochs`` passes over ``examples``."""
        ...

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """Score an adapter on held-out examples."""
        ...


class ClassifierTrainer(LocalTrainer, Protocol):
    """What trains an adapter of a classifier: ``trainer.Trainer`` or ``graphtrainer.GraphTrainer``."""

    def __hash__(self) -> int:
        """By identity: what was computed with a trainer can be kept by it."""
        ...

    def tokens(self, texts: Sequence[str]) -> list[list[int]]: ...

    def logits(self, adapter: Tensors, texts: Sequence[str]) -> NDArray[np.float32]:
        """Logits, shape ``(len(texts), labels)``."""
        ...

    def embed(self, texts: Sequence[str], adapter: Tensors | None = None) -> NDArray[np.float32]:
        """Embeddings, shape ``(len(texts), hidden)``."""
        ...
