"""Whether a release is worse than the previous one, from an evaluation's metrics (``edgeadapt.rounds.evaluation``).

The interval is Newcombe's for the difference of two proportions (1998, "Interval Estimation for the Difference between
Independent Proportions: Comparison of Eleven Methods", method 10), which holds its level also for few examples and for
accuracies near 0 and 1. Two things widen it: the variance of the noise that devices added, and the rounding of what is
published. Examples of one device count as independent, as in any accuracy.
Of a language model each device has one number, relative nats per byte: the interval is the normal distribution's for
two means, with the pooled variance between devices at its upper limit, because noise hides it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Annotated, Self

from pydantic import Field

from aggregation.errors import DataError
from edgeadapt.formats.jsontext import Exact
from edgeadapt.formats.manifest import Count, Sha256
from edgeadapt.formats.release import NEWEST, PREVIOUS
from edgeadapt.rounds.evaluation import ACCURACY, DEVIATION, DEVICES, EXAMPLES, RELATIVE, SPREAD, SQUARE
from edgeadapt.rounds.task import DECIMALS

CONFIDENCE = 0.95
ROUNDING = 10.0**-DECIMALS  # each of the two accuracies is off by half of it at most
MOST = 2.0**63  # examples, and deviation of their number; beyond, a square could be no float
FARTHEST = 0.8  # in units of ``SPREAD``: where both releases are beyond, most devices are cut off there
TOLERANCE = 1e-9  # between two machines that compute one verdict
Figure = Annotated[float, Field(allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class Proportion:
    """Holds an accuracy, between 0 and 1, or another mean, and the number of examples that it is of, above 0."""

    value: float
    examples: float

    def wilson(self, z: float) -> tuple[float, float]:
        """Return the limits of Wilson's score interval (1927); ``z`` is the quantile of the normal distribution."""
        n, p = self.examples, self.value
        middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
        return max(0.0, low), min(1.0, high)

    def noise_variance(self, deviation: float) -> float:
        """Return the mean's variance if both counts have noise of that standard deviation (delta method)."""
        return (deviation / self.examples) ** 2 * (1 + self.value**2)


def difference_interval(
    one: Proportion, other: Proportion, *, deviation: float = 0.0, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the limits of the difference ``one.value - other.value``.

    >>> low, high = difference_interval(Proportion(56 / 70, 70), Proportion(48 / 80, 80))
    >>> round(low, 4), round(high, 4)  # Newcombe 1998, table II (a)
    (0.0524, 0.3339)

    ``deviation``: standard deviation of the noise in each of the four counts, in examples. ``confidence``: with which
    the difference is between the limits, 0 to 1."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    (low, high), (other_low, other_high) = one.wilson(z), other.wilson(z)
    noise = z * z * (one.noise_variance(deviation) + other.noise_variance(deviation))
    difference, p, q = one.value - other.value, one.value, other.value
    below = math.sqrt((p - low) ** 2 + (other_high - q) ** 2 + noise)
    above = math.sqrt((high - p) ** 2 + (q - other_low) ** 2 + noise)
    return max(-1.0, difference - below), min(1.0, difference + above)


def mean_interval(one: Proportion, other: Proportion, square: float, deviation: float) -> tuple[float, float]:
    """Return the limits, with ``CONFIDENCE``, of the difference of two means over devices of numbers from -1 to 1.
    ``square``: mean square of all; ``deviation``: of the noise in each sum, that of squares included."""
    z, n, m, a, b = NormalDist().inv_cdf((1 + CONFIDENCE) / 2), one.examples, other.examples, one.value, other.value
    pooled = max(square - (n * a**2 + m * b**2) / (n + m), 0.0)
    noise = 1 + 4 * (a**2 + b**2) + (a**2 - pooled) ** 2 + (b**2 - pooled) ** 2  # its variance, by the delta method
    variance = min(pooled + z * deviation * math.sqrt(noise) / (n + m), 1.0) * (1 / n + 1 / m)
    half = z * math.sqrt(variance + one.noise_variance(deviation) + other.noise_variance(deviation))
    return a - b - half, a - b + half


@dataclass(frozen=True, slots=True)
class Verdict(Exact):
    """Says what an evaluation finds about the newest release. ``low``, ``high``: limits of the difference, with
    ``CONFIDENCE``."""

    difference: Figure  # its accuracy less the previous release's, or the logarithm of that one's nats over its own
    low: Figure
    high: Figure
    margin: Annotated[float, Field(ge=0, le=1)]  # how far it may be below, 0 or more

    @property
    def worse(self) -> bool:
        """Check whether all of the interval is below by more than the margin."""
        return self.high < -self.margin

    def __str__(self) -> str:
        what = "worse" if self.worse else "not shown to be worse"
        limits = f"{self.low:+.4f} to {self.high:+.4f}, margin {self.margin:g}"
        return f"{what}: difference {self.difference:+.4f} ({limits})"


def verdict(metrics: Mapping[str, float], margin: float) -> Verdict | None:
    """Return the verdict on the newest release; None if either release has too few examples to be published, or both
    are too far from what they were compared with. ``margin`` is ``accuracy.margin`` of ``gates.toml``. Raises DataError
    if no evaluation can have these metrics."""
    if DEVIATION not in metrics:
        raise DataError("the round is not an evaluation", about="metrics")
    texts = any(name.startswith(RELATIVE) for name in metrics)
    figures = (RELATIVE, DEVICES) if texts else (ACCURACY, EXAMPLES)
    names = [f"{what}_{release}" for release in (NEWEST, PREVIOUS) for what in figures] + [SQUARE] * texts
    if any(name not in metrics for name in names):
        return None
    newest, examples, previous, examples_before, *squares = (metrics[name] for name in names)
    deviation = metrics[DEVIATION]
    shares = all(-texts <= each <= 1 for each in (newest, previous)) and all(0 <= each <= 1 for each in squares)
    counts = all(1 <= each < MOST for each in (examples, examples_before))
    if not (shares and counts and 0 <= deviation < MOST):
        raise DataError("no evaluation can have these metrics", about="metrics")
    one, other = Proportion(newest, examples), Proportion(previous, examples_before)
    if texts:
        if min(newest, previous) > FARTHEST or max(newest, previous) < -FARTHEST:
            return None
        low, high = mean_interval(other, one, squares[0], deviation)
        return Verdict(SPREAD * (previous - newest), SPREAD * low, SPREAD * high, margin)
    low, high = difference_interval(one, other, deviation=deviation)
    return Verdict(newest - previous, low - ROUNDING, high + ROUNDING, margin)


@dataclass(frozen=True, slots=True)
class JudgedEvaluation(Exact):
    """Holds a round of evaluation with its verdict, as the log of a repository has it. ``version``: SHA-256 of the
    adapter's file that the round made, which its signed manifest names with the metrics. ``newest``, ``previous``:
    ``AdapterManifest.content`` of it in the two releases."""

    round: Count
    version: Sha256
    survivors: Count
    adapter: Annotated[str, Field(max_length=64)]
    newest: Sha256
    previous: Sha256
    metrics: Annotated[dict[Annotated[str, Field(max_length=64)], Figure], Field(max_length=20)]
    verdict: Verdict
    worse: bool

    def require(self) -> Self:
        """Check that its verdict is the one that its metrics give, and return itself. Raises DataError."""
        expected = verdict(self.metrics, self.verdict.margin)
        stated = self.verdict
        if expected is None:
            raise DataError(f"the figures of round {self.round} give no verdict", about="evaluation")
        apart = max(abs(getattr(expected, name) - getattr(stated, name)) for name in ("difference", "low", "high"))
        if apart > TOLERANCE or expected.worse != self.worse:
            reason = f"the figures of round {self.round} do not give the stated verdict, but: {expected}"
            raise DataError(reason, about="evaluation")
        return self

    def __str__(self) -> str:
        return f"round {self.round}, {self.survivors} survivors: {self.verdict}"
