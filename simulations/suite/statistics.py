"""Intervals and tests for figures over clients and seeds, by the bootstrap (Efron and Tibshirani 1993).

A seed has its own clients, and clients of a seed share one federation. So both levels are resampled: seeds with
replacement, then clients with replacement within each drawn seed. Arms are compared on the same draws, which leaves
what makes a client hard for both out of their difference. Where clients differ more than seeds do, the intervals are a
little too wide; where seeds differ more, three seeds give intervals that are too narrow. The tests measure both.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000
FEWEST = 6  # clients over all seeds: of fewer, resamples say nothing about others
LEVEL = 0.95

Values = NDArray[np.float64]
Statistic = Callable[[Values], Values]  # reduces the last axis, that of the clients

STATISTICS: dict[str, Statistic] = {
    "mean": lambda values: values.mean(axis=-1),
    "p10": lambda values: np.percentile(values, 10, axis=-1),
    "worst": lambda values: values.min(axis=-1),
}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure and its interval at ``LEVEL``; the interval is NaN where there are too few clients for one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of a figure between two arms, its interval, and the probability of so much by chance.

    Attributes:
        p: Two-sided, of the same resamples as the interval.
        adjusted: ``p`` after Holm's correction for all pairs of the report.
    """

    value: float
    low: float
    high: float
    p: float
    adjusted: float

    @property
    def is_noise(self) -> bool:
        """Whether the interval contains 0, or it is NaN."""
        return not (self.low > 0 or self.high < 0)


def figure(samples: Sequence[Values], statistic: Statistic) -> Values:
    """The mean over seeds of a statistic over clients.

    Args:
        samples: For each seed the values, shape ``(arms, clients)``; at least one client.
        statistic: Over clients.

    Returns:
        Shape ``(arms,)``.
    """
    return np.mean([statistic(values) for values in samples], axis=0)  # type: ignore[no-any-return]


def resampled(samples: Sequence[Values], statistic: Statistic, rng: np.random.Generator) -> Values:
    """``figure`` of resampled seeds and clients, shape ``(arms, RESAMPLES)``; all arms have the same draws."""
    arms, total = samples[0].shape[0], np.zeros((samples[0].shape[0], RESAMPLES))
    for _ in samples:  # one drawn seed after the other
        drawn = rng.integers(len(samples), size=RESAMPLES)
        found = np.empty((arms, RESAMPLES))
        for seed, values in enumerate(samples):
            places = np.flatnonzero(drawn == seed)
            clients = rng.integers(values.shape[1], size=(len(places), values.shape[1]))
            found[:, places] = statistic(values[:, clients])
        total += found
    return total / len(samples)


def estimate(value: float, draws: Values, clients: int) -> Estimate:
    """A figure with the percentile interval of its resamples; without one for fewer than ``FEWEST`` clients."""
    if clients < FEWEST:
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(draws, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Estimate(value, float(low), float(high))


def p_value(draws: Values, clients: int) -> float:
    """The two-sided probability of a difference as far from 0, from resamples of the difference.

    At least 2 / (resamples + 1); 1 if there are fewer than ``FEWEST`` clients.
    """
    if clients < FEWEST:
        return 1.0
    side = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (side + 1) / (len(draws) + 1))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """The values after Holm's correction (1979), in the same order.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, p_values[place] * (len(p_values) - rank)))
        adjusted[place] = largest
    return tuple(adjusted)
