"""What every contender can do, and what is asked of it: read a prompt, go on, and say how likely a text is."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from adapters.layout import Floats


class Engine(Protocol):
    """A loaded model with at most one adapter switched on; none at first."""

    def use(self, adapter: int | None) -> None:
        """Switch to an adapter by its place in the list that the engine was loaded with, or to none."""

    def prefill(self, tokens: Sequence[int]) -> None:
        """Forget everything and read a prompt, up to the likeliest next token."""

    def step(self) -> int:
        """Read the likeliest next token, up to the one after it; returns the one that was read."""

    def logits(self, tokens: Sequence[int]) -> Floats:
        """Shape ``(len(tokens), vocabulary)``, from an empty context."""


def loss(engine: Engine, rows: Sequence[Sequence[int]]) -> tuple[float, int]:
    """Cross-entropy in nats, summed over every token of ``rows`` but the first of each; and how many those are."""
    total = 0.0
    for row in rows:
        scores = engine.logits(row)[:-1].astype(np.float64)
        scores -= scores.max(axis=1, keepdims=True)
        likely = scores[np.arange(len(row) - 1), row[1:]] - np.log(np.exp(scores).sum(axis=1))
        total -= float(likely.sum())
    return total, sum(len(row) - 1 for row in rows)
