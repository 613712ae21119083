"""The randomness of a population: named streams, and a uniform choice."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def stream(*key: int) -> np.random.Generator:
    """The generator named ``key``: the same on any machine, and independent of generators with other names.

    >>> bool(stream(1, 2).integers(100) == stream(1, 2).integers(100))
    True
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    """One of ``items`` (at least one), each with the same probability."""
    return items[int(rng.integers(len(items)))]
