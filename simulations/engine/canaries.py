"""An empirical lower bound on epsilon: canaries that are in a sum or not, by coin, and guessed from it.

The account of a session is an upper bound. Guessing which known vectors are in a sum gives a lower bound from the real
code of a device: if it is above the account, there is a mistake, such as noise that is too small. A canary replaces a
device, in all of its sums: its vector is as long as an update may be, and orthogonal to those of all other canaries.

Two bounds, each with a confidence:

- ``one_run_epsilon`` assumes nothing of the mechanism (Steinke, Nasr and Jagielski 2023, "Privacy Auditing with One (1)
  Training Run", theorem 5.2 and appendix D), and stays far below the account.
- ``gaussian_epsilon`` assumes the trade-off between the two errors of a Gaussian mechanism (Dong, Roth and Su 2022,
  "Gaussian Differential Privacy"; as an audit: Nasr et al. 2023, "Tight Auditing of Differentially Private Machine
  Learning"), which sums of Skellam noise have nearly, and independent canaries. It is tight enough to catch a mistake.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from operator import add
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import beta, binom, norm

from aggregation import rotation
from aggregation.ring import dtype
from aggregation.spec import SessionSpec
from edgeadapt.auditing.account import Account, sums
from edgeadapt.rounds.sums import noisy_vector
from simulations.engine import provision
from simulations.engine.plain import open_coordinator
from simulations.result import CanaryBounds

CONFIDENCE = 0.95
ADAPTER = bytes(32)  # stands for the digest that seeds the rotation
MOST = 100.0  # epsilon


@dataclass(frozen=True, slots=True)
class Guesses:
    inside: int  # canaries that were in their sum, and ``missed``: how many of them were taken for absent
    missed: int
    outside: int  # canaries that were not, and ``mistaken``: how many of them were taken for present
    mistaken: int

    @property
    def correct(self) -> int:
        return self.inside - self.missed + self.outside - self.mistaken

    def __add__(self, other: "Guesses") -> "Guesses":
        return Guesses(*map(add, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class Sum:
    spec: SessionSpec  # of a session with noise, whose vector has at least as many numbers as ``devices``
    devices: int  # that add their noise, 1 to ``spec.vector.max_clients``


def planted(sums: Sequence[Sum], entropy: Callable[[int], bytes]) -> Guesses:
    """Plant canaries instead of as many devices as are in all of these sums, and guess each from all of them.

    Each device contributes its canary, to all sums, or zeros, by a fair coin, through the code of a real device:
    clipping, rotation, rounding and noise in the ring. A canary counts as present if Gaussian noise of the same
    variance made that likelier: if Σ C (r - C/2) / V > 0 over the sums, with the clip norm C, the canary's reading r,
    and the variance V of all noise. ``entropy``: random bytes, as ``os.urandom``."""
    rng = np.random.default_rng(int.from_bytes(entropy(32), "big"))
    coins = rng.random(min(sum_.devices for sum_ in sums)) < 0.5
    likelier = np.zeros(coins.size)
    for sum_ in sums:
        norm, variance = sum_.spec.clip_norm, sum_.devices * sum_.spec.vector.segments[0].noise ** 2
        likelier += norm * (_readings(sum_, coins, rng, entropy) - norm / 2) / variance
    guessed: NDArray[np.bool_] = likelier > 0
    return Guesses(int(coins.sum()), int((coins & ~guessed).sum()), int((~coins).sum()), int((~coins & guessed).sum()))


def _readings(
    sum_: Sum, coins: NDArray[np.bool_], rng: np.random.Generator, entropy: Callable[[int], bytes]
) -> NDArray[np.float64]:
    """Read the coordinates of a sum in which the canaries are, if their coins say so."""
    spec = sum_.spec
    (segment,) = spec.vector.segments
    total = np.zeros(segment.size, dtype(spec.vector.ring_bits))
    for device in range(sum_.devices):
        vector = np.zeros(segment.size)
        if device < coins.size:
            vector[device] = spec.clip_norm * coins[device]
        total += noisy_vector(vector, spec, ADAPTER, rng, entropy(32))
    decoded = spec.vector.decode(total, sum_.devices)[segment.name]
    return rotation.rotate_back(decoded, rotation.seed(ADAPTER))[: coins.size]


def audited(fleets: Iterable[Path], delta: float, canaries: int) -> CanaryBounds | None:
    """Bound what canaries find in sums like a run's: for the device that spent most, of all its federations.

    The sums are those that the coordinators' logs name, with as many devices as the account counts on: of the
    survivors, those that may be corrupt add nothing. At least so many ``canaries`` are planted, in the same sums again
    until there are enough. None if there are to be none, no sum with noise was revealed, or nothing bounds it."""
    read = (_spent_most(folder / provision.COORDINATOR, delta) for folder in fleets) if canaries else ()
    account, sums = max(filter(None, read), key=lambda one: one[0], default=(math.inf, []))
    if not math.isfinite(account):
        return None
    guesses = Guesses(0, 0, 0, 0)
    while guesses.inside + guesses.outside < canaries:
        guesses += planted(sums, os.urandom)
    return CanaryBounds(
        count=guesses.inside + guesses.outside,
        right=guesses.correct,
        account=account,
        one_run=one_run_epsilon(guesses, delta),
        gaussian=gaussian_epsilon(guesses, delta),
        confidence=CONFIDENCE,
    )


def _spent_most(coordinator: Path, delta: float) -> tuple[float, list[Sum]] | None:
    """Return the epsilon of a federation's device that spent most, and the sums that it was in; None without noise."""
    named = [each for entries in open_coordinator(coordinator).transcripts.sessions() for each in sums(entries)]
    account = Account()
    for spec, survivors in named:
        account = account.after(spec, survivors)
    epsilons = {device: spent.epsilon(delta) for device, spent in account.spent.items()}
    if not epsilons:
        return None
    most = max(epsilons, key=epsilons.__getitem__)
    mine = [Sum(spec, spec.honest(len(survivors))) for spec, survivors in named if spec.privacy and most in survivors]
    return epsilons[most], mine


def one_run_epsilon(guesses: Guesses, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return the largest epsilon that the right guesses refute with ``confidence``, whatever the mechanism; 0 if none.
    For a mechanism that is (ε, δ)-private, the number of right guesses of m coins is at least v with a probability of
    at most P(B ≥ v) + 2 m δ max_i P(v > B ≥ v - i) / i, where B is binomial with m trials of exp ε / (1 + exp ε)."""
    trials, correct = guesses.inside + guesses.outside, guesses.correct

    def doubt(epsilon: float) -> float:
        chance = 1 / (1 + math.exp(-epsilon))
        below = np.cumsum(binom.pmf(np.arange(correct)[::-1], trials, chance))  # P(v > B >= v - i) for i = 1…v
        worst = float((below / np.arange(1, correct + 1)).max(initial=0.0))
        return float(binom.sf(correct - 1, trials, chance)) + 2 * trials * delta * worst - (1 - confidence)

    return _root(doubt)


def gaussian_epsilon(guesses: Guesses, delta: float, confidence: float = CONFIDENCE) -> float:
    """Return the epsilon of the most private Gaussian mechanism that the errors allow; 0 if they allow any.

    With the rates α of mistaken and β of missed canaries at most, μ = Φ⁻¹(1 - α) - Φ⁻¹(β); each rate is bounded with
    half of the risk (Clopper and Pearson 1934). The least ε of μ-GDP solves Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ) = δ
    (Dong, Roth and Su 2022, corollary 2.13). There is a canary on either side at least."""
    mistaken, missed = (
        float(beta.ppf((1 + confidence) / 2, count + 1, trials - count)) if count < trials else 1.0
        for count, trials in ((guesses.mistaken, guesses.outside), (guesses.missed, guesses.inside))
    )
    if mistaken + missed >= 1:
        return 0.0
    mu = float(norm.ppf(1 - mistaken) - norm.ppf(missed))

    def missing(epsilon: float) -> float:
        return delta - float(norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * norm.cdf(-mu / 2 - epsilon / mu))

    return _root(missing)


def _root(rising: Callable[[float], float]) -> float:
    """Find the epsilon from 0 to ``MOST`` at which a function that rises reaches 0, or the bound that is nearer."""
    if rising(0.0) >= 0:
        return 0.0
    return float(brentq(rising, 0.0, MOST)) if rising(MOST) > 0 else MOST
