"""What sums with distributed noise reveal about one device: Rényi differential privacy, as a number (ε, δ).

Neighbors are two runs that differ in one device, whose vector is zero in one of them: the unit is everything that a
device contributes, and it may add or take away any vector within its norm. The noise of a sum is what the honest
survivors added. A device, the coordinator and an auditor compute the same number from the same sums.

Sources: Agarwal, Kairouz, Liu 2021, "The Skellam Mechanism for Differentially Private Federated Learning"; Kairouz,
Liu, Steinke 2021, "The Distributed Discrete Gaussian Mechanism for Federated Learning with Secure Aggregation";
Mironov 2017, "Rényi Differential Privacy"; Canonne, Kamath, Steinke 2020, "The Discrete Gaussian for Differential
Privacy"."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import ConfigError, check_fields

# Orders of the Rényi divergence: whole numbers, for which the bound on Skellam noise is proved. The best order for a
# small ε is near 2 log(1/δ) / ε.
ORDERS = (*range(2, 64), *range(64, 256, 8), *range(256, 1024, 32), *range(1024, 8193, 256))
DISTANCE = 2.0**-108  # statistical distance to the exact distribution that one drawn number may have (``noise``)
_RESERVE = 2.0**-10  # share of δ that is kept for it
_ORDERS = np.array(ORDERS, np.float64)
_SEARCH = 2.0**-12  # relative precision of a calibrated noise multiplier

Curve = NDArray[np.float64]  # Rényi divergence at each of ``ORDERS``, in nats


class Mechanism(Enum):
    SKELLAM = "skellam"  # a sum of such noises is one again
    DISCRETE_GAUSSIAN = "discrete-gaussian"  # a sum is near one, for a deviation of more than about 2 steps a device


@dataclass(frozen=True, slots=True)
class NoisySum:
    """One segment of one sum over the survivors of a round. Raises ConfigError: a number is out of range."""

    mechanism: Mechanism  # of the noise
    size: int  # elements, 1 or more
    norm_squared: int  # largest squared L2 norm of one device's integers, in squared steps, 1 or more
    # Of the noise of one device on one element, in squared steps, above 0; of a discrete Gaussian its parameter σ², 1/4
    # or more.
    variance: float
    honest: int  # devices whose noise counts, 1 or more

    def __post_init__(self) -> None:
        names = ("size", "norm_squared", "variance", "honest")
        check_fields(self, "sum.", [(n, 0 < getattr(self, n) < math.inf, "above 0 and finite") for n in names])
        if self.mechanism is Mechanism.DISCRETE_GAUSSIAN and self.variance < 0.25:
            text = f"discrete Gaussian noise of variance {self.variance:g} is below 1/4 squared steps: take finer steps"
            raise ConfigError(text, about="sum.variance")

    def curve(self) -> Curve:
        """The Rényi divergence of each of ``ORDERS`` between the sums of neighbors, an upper bound.

        With S the variance of all noise, Δ² = ``norm_squared`` and Δ₁ = min(√d Δ, Δ²), because an integer is at most
        its square, the bounds are:

        - Skellam (Agarwal et al. 2021, corollary 3.6): αΔ² / 2S + min(((2α-1) Δ² + 6 Δ₁) / 4S², 3 Δ₁ / 2S).
        - n discrete Gaussians of parameter σ² (Kairouz et al. 2021, proposition 14), with S = nσ²: the least of
          αΔ² / 2S + τd, α/2 · (Δ² / S + 2 τ Δ₁ / √S + τ² d) and α/2 · (Δ / √S + τ √d)², for
          τ = 10 Σ_{k<n} exp(-2π² σ² k / (k+1)).
        """
        total, root, squared = self.honest * self.variance, math.sqrt(self.size), float(self.norm_squared)
        first = min(root * math.sqrt(squared), squared)
        limit = _ORDERS * squared / (2 * total)  # that of a Gaussian
        if self.mechanism is Mechanism.SKELLAM:
            fine, coarse = ((2 * _ORDERS - 1) * squared + 6 * first) / (4 * total**2), 3 * first / (2 * total)
            return limit + np.minimum(fine, coarse)
        exponents = -2 * math.pi**2 * self.variance * (1 - 1 / np.arange(2.0, self.honest + 1))
        tau = 10 * math.fsum(np.exp(exponents))
        middle = squared / total + 2 * tau * first / math.sqrt(total) + tau**2 * self.size
        wide = (math.sqrt(squared / total) + tau * root) ** 2
        return np.minimum(limit + tau * self.size, _ORDERS / 2 * min(middle, wide))


@dataclass(frozen=True, slots=True)
class Spent:
    """What a number of sums reveal together: their curves add up, whatever was chosen in view of earlier ones.

    >>> one = Spent.on([NoisySum(Mechanism.SKELLAM, size=100, norm_squared=10**6, variance=1e6, honest=16)])
    >>> round(one.epsilon(1e-6), 2), round((one + one).epsilon(1e-6), 2)
    (1.14, 1.66)

    Raises ConfigError: the curve is not one."""

    curve: tuple[float, ...] = (0.0,) * len(ORDERS)  # Rényi divergence at each of ``ORDERS``, in nats
    draws: int = 0  # numbers that honest devices drew as noise, each within ``DISTANCE`` of its distribution

    def __post_init__(self) -> None:
        if len(self.curve) != len(ORDERS) or not all(0 <= value < math.inf for value in self.curve):
            text = f"a privacy account has {len(ORDERS)} finite numbers, none below 0"
            raise ConfigError(text, about="spent.curve")

    @classmethod
    def on(cls, sums: Iterable[NoisySum]) -> "Spent":
        """Of the segments of one round, or of all sums of several rounds."""
        given = tuple(sums)
        curve = np.sum([one.curve() for one in given], axis=0) if given else np.zeros(len(ORDERS))
        return cls(tuple(curve.tolist()), sum(one.honest * one.size for one in given))

    def __add__(self, other: "Spent") -> "Spent":
        if other == NOTHING:
            return self
        curve = tuple(left + right for left, right in zip(self.curve, other.curve, strict=True))
        return Spent(curve, self.draws + other.draws)

    def times(self, rounds: int) -> "Spent":
        return Spent(tuple(rounds * value for value in self.curve), rounds * self.draws)

    def epsilon(self, delta: float) -> float:
        """The least ε on ``ORDERS`` for which all of it is (ε, δ)-differentially private.

        From the curve, ε = R(α) + log(1 - 1/α) - log(αδ) / (α - 1) (Canonne et al. 2020, proposition 12). A statistical
        distance t of all drawn noise to that of the curve adds (1 + exp ε) t to δ; a 2^-10th part of δ is kept for it.

        Returns:
            0 if nothing was spent; infinite if the distance takes more than is kept for it.

        ``delta``: between 0 and 1, both excluded. Raises ConfigError: ``delta`` is out of range."""
        if not 0 < delta < 1:
            raise ConfigError(f"delta {delta} is not between 0 and 1", about="delta")
        if not any(self.curve):
            return 0.0
        rest = math.log(delta * (1 - _RESERVE))
        found = np.array(self.curve) + np.log1p(-1 / _ORDERS) - (rest + np.log(_ORDERS)) / (_ORDERS - 1)
        least = max(0.0, float(found.min()))
        bounded = least < 100 and (1 + math.exp(least)) * self.draws * DISTANCE <= delta * _RESERVE
        return least if bounded else math.inf


NOTHING = Spent()


def calibrated(epsilon: Callable[[float], float], target: float) -> float:
    """The least noise multiplier that meets a target, to a relative 2^-12 and never below it.

    >>> noisy = lambda z: NoisySum(Mechanism.SKELLAM, 1000, 10**8, variance=z**2 * 10**8 / 16, honest=16)
    >>> round(calibrated(lambda z: Spent.on([noisy(z)]).times(10).epsilon(1e-6), target=4.0), 2)
    4.01

    ``epsilon``: noise multiplier → ε of all rounds: Δ / √S (``NoisySum``) is its inverse. It falls. ``target``: the ε
    that may be spent, above 0. Raises ConfigError: no multiplier up to 2^20 meets the target."""
    low, high = 0.0, 2.0**-6
    while not epsilon(high) <= target:
        low, high = high, 2 * high
        if high > 2**20:
            text = f"no noise meets an epsilon of {target:g}: allow more, or fewer rounds"
            raise ConfigError(text, about="privacy.epsilon")
    while high - low > _SEARCH * high:
        middle = (low + high) / 2
        low, high = (low, middle) if epsilon(middle) <= target else (middle, high)
    return high
