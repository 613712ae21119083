"""Combination of the means of a round's groups into one, so that a device that lies spoils one group only.

The rules go coordinate by coordinate, over any number of groups (Yin et al. 2018, "Byzantine-Robust Distributed
Learning: Towards Optimal Statistical Rates"). A combined coordinate is never outside the means of the groups without a
liar while these are more than half (``Median``), or all but ``cut`` (``TrimmedMean``). Sums are in ascending order in
float64 and then rounded to float32, so that equal means give equal bits.

>>> combine(Median(), [np.float32([1, 9]), np.float32([2, 0]), np.float32([900, 1])])
array([2., 1.], dtype=float32)
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.manifest import ServerRule


@dataclass(frozen=True, slots=True)
class Median:
    """Takes the median; of an even number of groups, the mean of the middle two."""

    def cut(self, groups: int) -> int:
        return (groups - 1) // 2


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """Takes the mean without the least and the greatest values. ``share``: part of the groups that is cut off at each
    end, above 0 and below 1/2; of few groups, one at each end. Raises ConfigError: the share is out of range."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share < 0.5:
            text = f"share {self.share} of a trimmed mean is not above 0 and below 1/2"
            raise ConfigError(text, about="combination.share")

    def cut(self, groups: int) -> int:
        """Count the least, and the greatest, of ``groups`` values that do not count.

        >>> [TrimmedMean(0.2).cut(groups) for groups in (2, 3, 5, 10)]
        [0, 1, 1, 2]
        """
        return min(max(1, math.floor(self.share * groups)), (groups - 1) // 2)


Combination = Median | TrimmedMean
KINDS: dict[str, type[Combination]] = {kind.__name__: kind for kind in (Median, TrimmedMean)}


def to_rule(combination: Combination) -> ServerRule:
    """Name the combination for a version's manifest. Law: ``of_rule(to_rule(c)) == c``."""
    return ServerRule(type(combination).__name__, asdict(combination))


def of_rule(rule: ServerRule) -> Combination:
    """Return the combination that a manifest names. Raises ConfigError for another name or wrong numbers."""
    kind = KINDS.get(rule.name)
    if kind is None or {field.name for field in fields(kind)} != set(rule.numbers):
        text = f"there is no combination of groups {rule.name!r} with such numbers"
        raise ConfigError(text, about="combination")
    return kind(**rule.numbers)


def combine(combination: Combination, means: Sequence[Floats]) -> Floats:
    """Combine the means of groups.

    Returns:
        float32 of shape ``(n,)``. Guarantee: it does not depend on the order of the groups, each coordinate is between
        the least and the greatest of the values that are not cut off, and equal means give equal bits.

    Raises DataError: there is no group, shapes differ, or a number is not finite."""
    if not means or any(mean.ndim != 1 or mean.shape != means[0].shape for mean in means):
        raise DataError("the means of the groups are not flat vectors of one size", about="combination.shape")
    values = np.sort(np.stack(means).astype(np.float32) + np.float32(0), axis=0)  # -0 + 0 = 0: one order of zeros
    if not np.isfinite(values).all():
        raise DataError("the mean of a group holds NaN or infinity", about="combination.means")
    cut = combination.cut(len(means))
    kept = values[cut : len(means) - cut].astype(np.float64)
    total = np.zeros(means[0].size)
    for row in kept:
        total += row
    mean: Floats = (total / len(kept)).astype(np.float32)
    return mean


def distances(means: Sequence[Floats], combined: Floats) -> tuple[float, ...]:
    """Return each group's mean's distance from the combination, in weight units (L2 norm): for the operator's eyes."""
    return tuple(float(np.linalg.norm(mean.astype(np.float64) - combined)) for mean in means)
