"""The population's randomness: streams named by numbers, and a choice among things."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def stream(*key: int) -> np.random.Generator:
    """The generator of this name: the same on any machine, and independent of one with another name."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of ``items``, all equally likely."""
    return items[int(rng.integers(len(items)))]
