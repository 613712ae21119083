"""Rounding to whole steps with a bound on the norm that holds for every device and every input.

Stochastic rounding moves each coordinate by up to one step, which would lengthen a vector of d numbers by up to √d
steps. Its squared norm is expected to grow by at most d/4. Rounding is therefore repeated until the result is not much
longer than that (conditional randomized rounding; Kairouz, Liu, Steinke 2021).
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError

# √(2 log 1/β) for the probability β = 2^-10 that a rounding is repeated, rounded up. A greater β would save less than
# 0.3 % of the norm where the norm is √d steps or more; rounding that is repeated often is biased and slow.
_REPEATED = 3.7233
_SLACK = 2.0**-20  # relative, of a norm in floating point
_LONGEST = 2.0**30  # steps: its square is exact in 64 bits


def norm_squared(norm: float, size: int) -> int:
    """The largest squared L2 norm, in squared steps, of a rounded vector: what its sensitivity is.

    With c = ``norm`` and d = ``size``, the least of c² + d/4 + √(2 log 1/β) (c + √d/2) and (c + √d)², rounded down
    (Kairouz, Liu, Steinke 2021, theorem 1 with γ = 1).

    Args:
        norm: L2 norm of what is rounded, at most, in steps; at most 2^30.
        size: Its number of elements.

    Raises:
        ConfigError: ``norm`` is out of range.

    >>> norm_squared(1000.0, 10_000), norm_squared(0.5, 1)
    (1006409, 2)
    """
    if not 0 < norm <= _LONGEST:
        raise ConfigError(f"a norm of {norm:g} steps is not between 0 and 2^30", about="norm")
    root = math.sqrt(size)
    expected = norm**2 + size / 4 + _REPEATED * (norm + root / 2)
    return math.floor(min(expected, (norm + root) ** 2))


def round_within(
    steps: NDArray[np.float64], norm: float, rounded: Callable[[], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """Round until the norm is within ``norm_squared(norm, size)``, which is compared in whole numbers.

    Guarantee: no result is longer, whatever the input. It is the first one with a probability of at least 1 - 2^-10.

    Args:
        steps: What is rounded, shape ``(n,)``, in steps.
        norm: L2 norm that it has at most.
        rounded: Rounds ``steps`` by unbiased coins, new ones in each call.

    Raises DataError: ``steps`` is longer, or not finite.
    """
    length = float(np.linalg.norm(steps))
    if not length <= norm * (1 + _SLACK):
        text = f"a vector of length {length:g} steps is longer than its bound of {norm:g}"
        raise DataError(text, about="norm")
    longest = norm_squared(norm, steps.size)
    while int(np.dot(found := rounded(), found)) > longest:
        pass
    return found
