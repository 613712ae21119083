"""The integers of one device: noise from a cryptographic bit stream, without floating point, and rounding to steps.

A distribution is a table of its cumulative probabilities in units of 2^-128, computed with integers of unlimited size.
A draw compares uniform bits of an AES-CTR stream with the table: no logarithm or power whose rounding could make some
outcomes impossible, as in samplers of continuous noise (Mironov 2012, "On Significance of the Least Significant
Bits"), and no rejection loop, whose length shows. ``docs/decisions/0037-integer-noise.md`` has the alternatives.

Rounding to whole steps has a bound on the norm that holds for every device and every input. Stochastic rounding moves
each coordinate by up to one step, which would lengthen a vector of d numbers by up to √d steps. Its squared norm is
expected to grow by at most d/4. Rounding is therefore repeated until the result is not much longer than that
(conditional randomized rounding; Kairouz, Liu, Steinke 2021)."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError
from aggregation.keystream import Keystream
from aggregation.privacy.accounting import Mechanism

# √(2 log 1/β) for the probability β = 2^-10 that a rounding is repeated, rounded up. A greater β would save less than
# 0.3 % of the norm where the norm is √d steps or more; rounding that is repeated often is biased and slow.
_REPEATED = 3.7233
_SLACK = 2.0**-20  # relative, of a norm in floating point
_LONGEST = 2.0**30  # steps: its square is exact in 64 bits
Integers = NDArray[np.int64]
MAX_DEVIATION = 2**10  # steps: rounding then adds a 2^-22th part of the noise, and the table takes 0.1 s
_BITS, _WORD = 128, 64
_UNIT = 1 << _BITS
_GUARD = 64  # bits by which the weights are finer than the table
_TAIL = (_BITS + 1) * math.log(2)  # the outcomes beyond a table have a probability of at most 2^-128 on both sides
_CHUNK = 2**15  # draws: their bits and results stay in the second-level cache
_GUIDE = 16  # leading bits of a draw, by which it finds its place in a table


def norm_squared(norm: float, size: int) -> int:
    """The largest squared L2 norm, in squared steps, of a rounded vector: what its sensitivity is.

    With c = ``norm`` and d = ``size``, the least of c² + d/4 + √(2 log 1/β) (c + √d/2) and (c + √d)², rounded down
    (Kairouz, Liu, Steinke 2021, theorem 1 with γ = 1).

    >>> norm_squared(1000.0, 10_000), norm_squared(0.5, 1)
    (1006409, 2)

    ``norm``: L2 norm of what is rounded, at most, in steps; at most 2^30. Raises ConfigError: ``norm`` is out of range.
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
    ``steps``: what is rounded, shape ``(n,)``, in steps. ``norm``: L2 norm that it has at most. ``rounded``: rounds
    ``steps`` by unbiased coins, new ones in each call. Raises DataError: ``steps`` is longer, or not finite."""
    length = float(np.linalg.norm(steps))
    if not length <= norm * (1 + _SLACK):
        text = f"a vector of length {length:g} steps is longer than its bound of {norm:g}"
        raise DataError(text, about="norm")
    longest = norm_squared(norm, steps.size)
    while int(np.dot(found := rounded(), found)) > longest:
        pass
    return found


def reach(variance: float, log_odds: float) -> float:
    """What noise exceeds, on one side, with a probability of at most exp(-``log_odds``): √(2 v L) + L / 3.

    Of the sum of any number of independent Skellam or discrete Gaussian variables whose variances add up to
    ``variance``. The logarithm of the moment generating function of Skellam noise, v (cosh s - 1), is at most
    v s² / (2 (1 - s / 3)), that of a discrete Gaussian at most v s² / 2 (Canonne et al. 2020, lemma 26); the bound
    follows as in Boucheron, Lugosi and Massart 2013, section 2.4.

    >>> round(reach(100.0, math.log(2**40)), 1)
    83.7
    """
    return math.sqrt(2 * variance * log_odds) + log_odds / 3


@dataclass(frozen=True, slots=True)
class Table:
    """A symmetric distribution over the integers, as cumulative probabilities.

    Guarantee: a draw from a uniform stream is within a statistical distance of ``accounting.DISTANCE``. It comes from
    the tails, of which a table lacks at most 2^-128 and whose outermost weights are wrong by as much; from the
    boundaries, less than 2^16 of them, each rounded down by less than 2^-128; and from the weights, each step of whose
    recurrence loses less than a relative 2^-128. ``first``: the smallest outcome. ``high``, ``low``: words of the
    boundaries, shape ``(n,)``, ascending: outcome ``first + k`` is drawn where exactly ``k`` boundaries are at or below
    128 uniform bits. ``guide``: shape ``(2**16,)``: how many boundaries are at or below a draw that begins with these
    bits, at least. Most draws need one comparison more (Chen and Asau 1974)."""

    first: int
    high: NDArray[np.uint64] = field(repr=False)
    low: NDArray[np.uint64] = field(repr=False)
    guide: NDArray[np.int64] = field(repr=False)

    @classmethod
    def of(cls, weights: list[int]) -> "Table":
        """The table of outcomes -n…n, whose probabilities are proportional to ``weights`` of 0…n."""
        both = [*reversed(weights[1:]), *weights]
        total, ones = sum(both), (1 << _WORD) - 1
        bounds = [min((part << _BITS) // total, _UNIT - 1) for part in accumulate(both[:-1])]
        high = np.array([bound >> _WORD for bound in bounds], np.uint64)
        low = np.array([bound & ones for bound in bounds], np.uint64)
        begins = np.arange(1 << _GUIDE, dtype=np.uint64) << np.uint64(_WORD - _GUIDE)
        return cls(1 - len(weights), high, low, np.searchsorted(high, begins, side="right"))

    def draw(self, stream: Keystream, size: int) -> Integers:
        """Draw ``size`` independent outcomes: shape ``(size,)``."""
        drawn, words = np.empty(size, np.int64), np.empty(min(size, _CHUNK), np.uint64)
        after = np.append(self.high, np.uint64((1 << _WORD) - 1))  # the boundary after the ones below, if any
        for start in range(0, size, _CHUNK):
            part = words[: size - start]
            stream.read_into(part.data.cast("B"))
            below = self.guide[(part >> np.uint64(_WORD - _GUIDE)).view(np.int64)]
            below += (after[below] <= part) & (below < self.high.size)
            further = np.flatnonzero(after[below] <= part)
            below[further] = np.searchsorted(self.high, part[further], side="right")
            for tied in np.flatnonzero(self.high[below - 1] == part):
                below[tied] = self._by_next_word(part[tied], stream)
            drawn[start : start + part.size] = below
        drawn += self.first
        return drawn

    def _by_next_word(self, word: np.uint64, stream: Keystream) -> int:
        """The boundaries at or below a draw whose first 64 bits are those of one: of 2^48 draws, about one."""
        begin, end = (int(np.searchsorted(self.high, word, side=side)) for side in ("left", "right"))
        following = np.empty(1, np.uint64)
        stream.read_into(following.data.cast("B"))
        return begin + int(np.searchsorted(self.low[begin:end], following[0], side="right"))


@lru_cache(maxsize=8)
def table(mechanism: Mechanism, variance: float) -> Table:
    """The table of the noise of one device. ``mechanism``: its distribution. ``variance``: in squared steps, at most
    ``MAX_DEVIATION`` squared; of a discrete Gaussian the parameter σ². Raises ConfigError: the variance is out of
    range."""
    if not 0 < variance <= MAX_DEVIATION**2:
        text = f"noise with a variance of {variance:g} squared steps is not between 0 and {MAX_DEVIATION}² of them"
        raise ConfigError(text, about="noise.variance")
    last = math.ceil(reach(variance, _TAIL)) + 1
    weights = skellam_weights if mechanism is Mechanism.SKELLAM else gaussian_weights
    return Table.of(weights(Fraction(variance), last))


def skellam_weights(variance: Fraction, last: int) -> list[int]:
    """Numbers proportional to the probabilities of 0…``last`` under Skellam noise: I_k(v) of the Bessel function. The
    recurrence I_{k-1}(v) = I_{k+1}(v) + (2k / v) I_k(v), downward from where the function vanishes, is stable: all
    terms are positive, and what the start lacks shrinks at each step (Miller's algorithm; DLMF 3.6(iii), 10.29.1)."""
    above, weights = 0, [1 << (_BITS + _GUARD)]
    for k in range(last, 0, -1):
        at = weights[-1]
        weights.append(above + 2 * k * variance.denominator * at // variance.numerator)
        above = at
    return weights[::-1]


def gaussian_weights(variance: Fraction, last: int) -> list[int]:
    """Numbers proportional to the probabilities of 0…``last`` under a discrete Gaussian: exp(-k² / 2σ²)."""
    one = 1 << (2 * _BITS)
    with localcontext(prec=120):  # digits
        ratio = int((-Decimal(variance.denominator) / (2 * Decimal(variance.numerator))).exp() * one)
    square, weights = ratio * ratio // one, [one]
    for _ in range(last):  # each weight is the one before times exp(-(2k + 1) / 2σ²)
        weights.append(weights[-1] * ratio // one)
        ratio = ratio * square // one
    return weights


def draw(mechanism: Mechanism, variance: float, size: int, key: bytes) -> Integers:
    """Noise of one device for one segment.

    Returns:
        Shape ``(size,)``, in steps: independent draws, each within ``accounting.DISTANCE`` of the exact distribution.

    ``mechanism``, ``variance``: as of ``table``. ``key``: 32 secret bytes with no other use: equal keys, equal noise.
    Raises ConfigError as ``table``."""
    return table(mechanism, variance).draw(Keystream(key), size)
