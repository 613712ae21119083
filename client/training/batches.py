"""The order of a device's examples in training, the same for every engine."""

from collections.abc import Iterator, Sequence

import numpy as np


def batches(lengths: Sequence[int], size: int, epochs: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Batches of texts of similar length, which need little padding, in random order.

    Args:
        lengths: Tokens of each text.
        size: Texts in a batch; the last batch of the longest texts may be smaller.
        epochs: Passes over the texts.
        rng: Draws the order of the batches, and that of texts of equal length.

    Yields:
        The indices of a batch. Guarantee: an epoch contains every index exactly once.

    >>> list(batches([7, 2, 9], 2, 1, np.random.default_rng(0)))
    [[2], [1, 0]]
    """
    for _ in range(epochs):
        shuffled = rng.permutation(len(lengths))
        grouped = shuffled[np.argsort(np.asarray(lengths)[shuffled], kind="stable")]
        epoch = [grouped[start : start + size].tolist() for start in range(0, len(lengths), size)]
        yield from (epoch[i] for i in rng.permutation(len(epoch)))


def parts(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """The texts of a batch in runs of at most ``tokens`` tokens with padding, each of one text or more.

    >>> list(parts([2, 3, 9], 6))
    [[0, 1], [2]]

    Args:
        lengths: Tokens of each text.
        tokens: Of a run.

    Yields:
        The places of a run's texts in the batch. Guarantee: in order, each exactly once.
    """
    part: list[int] = []
    longest = 0
    for place, length in enumerate(lengths):
        longest = max(longest, length)
        if part and longest * (len(part) + 1) > tokens:
            yield part
            part, longest = [], length
        part.append(place)
    if part:
        yield part
