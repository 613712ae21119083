"""An empirical lower bound on epsilon: canaries that are in a sum or not, by coin, and guessed from it.

The account of a session is an upper bound on what a sum reveals. Whoever puts known vectors into the sum, and guesses
from it which ones are there, gets a lower bound, from the real code of a device: if it is above the account, there is a
mistake, such as noise that is too small. A canary takes the place of a device: its vector is as long as an update may
be, and orthogonal to those of all other canaries, so that one sum tries many of them. A device is in the sums of
several rounds; so is its canary, which is guessed from all of them.

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
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from adapters.sums import noisy_vector
from aggregation import rotation
from aggregation.pki.identity import IdentityKey
from aggregation.ring import dtype
from aggregation.spec import SessionSpec
from coordinator.audit.account import Account, sums
from coordinator.audit.transcripts import logs
from coordinator.statedir import KEY, TRANSCRIPT
from coordinator.storedlog import StoredLog
from simulations.engine import provision
from simulations.report.result import CanaryBounds

CONFIDENCE = 0.95
ADAPTER = bytes(32)  # stands for the digest that seeds the rotation
_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Guesses:
    """How well canaries were guessed.

    Args:
        inside: Canaries that were in their sum, and ``missed``: how many of them were taken for absent.
        outside: Canaries that were not, and ``mistaken``: how many of them were taken for present.
    """

    inside: int
    missed: int
    outside: int
    mistaken: int

    @property
    def correct(self) -> int:
        return self.inside - self.missed + self.outside - self.mistaken

    def __add__(self, other: "Guesses") -> "Guesses":
        return Guesses(
            self.inside + other.inside,
            self.missed + other.missed,
            self.outside + other.outside,
            self.mistaken + other.mistaken,
        )


@dataclass(frozen=True, slots=True)
class Sum:
    """One sum that a device was in.

    Args:
        spec: Of a session with noise, whose vector has at least as many numbers as ``devices``.
        devices: That add their noise, 1 to ``spec.vector.max_clients``.
    """

    spec: SessionSpec
    devices: int


def planted(found: Sequence[Sum], entropy: Callable[[int], bytes]) -> Guesses:
    """Plant canaries in the place of as many devices as are in all of these sums, and guess each from all of them.

    Each device contributes its canary, to all sums, or zeros, by a fair coin, through the code of a real device:
    clipping, rotation, rounding and noise in the ring. A canary counts as present if Gaussian noise of the same
    variance made that likelier: if Σ C (r - C/2) / V > 0 over the sums, with the clip norm C, the canary's reading r,
    and the variance V of all noise.

    Args:
        found: One sum or more.
        entropy: Random bytes, as ``os.urandom``.
    """
    rng = np.random.default_rng(int.from_bytes(entropy(32), "big"))
    coins = rng.random(min(one.devices for one in found)) < 0.5
    likelier = np.zeros(coins.size)
    for one in found:
        norm, variance = one.spec.clip_norm, one.devices * one.spec.vector.segments[0].noise ** 2
        likelier += norm * (_readings(one, coins, rng, entropy) - norm / 2) / variance
    guessed: NDArray[np.bool_] = likelier > 0
    return Guesses(int(coins.sum()), int((coins & ~guessed).sum()), int((~coins).sum()), int((~coins & guessed).sum()))


def _readings(
    one: Sum, coins: NDArray[np.bool_], rng: np.random.Generator, entropy: Callable[[int], bytes]
) -> NDArray[np.float64]:
    """The coordinates of a sum in which the canaries are, if their coins say so."""
    spec = one.spec
    (segment,) = spec.vector.segments
    total = np.zeros(segment.size, dtype(spec.vector.ring_bits))
    for device in range(one.devices):
        vector = np.zeros(segment.size)
        if device < coins.size:
            vector[device] = spec.clip_norm * coins[device]
        total += noisy_vector(vector, spec, ADAPTER, rng, entropy(32))
    decoded = spec.vector.decode(total, one.devices)[segment.name]
    return rotation.rotate_back(decoded, rotation.seed(ADAPTER))[: coins.size]


def bounded(found: Sequence[Sum], account: float, delta: float, canaries: int) -> CanaryBounds:
    """What canaries find in the sums of one device.

    Args:
        found: One sum or more.
        account: Epsilon of these sums, for ``delta``.
        delta: For which bounds are stated.
        canaries: At least; they are planted in the same sums again until they are as many.
    """
    guesses = Guesses(0, 0, 0, 0)
    while guesses.inside + guesses.outside < canaries:
        guesses += planted(found, os.urandom)
    return CanaryBounds(
        count=guesses.inside + guesses.outside,
        right=guesses.correct,
        account=account,
        one_run=one_run_epsilon(guesses, delta),
        gaussian=gaussian_epsilon(guesses, delta),
        confidence=CONFIDENCE,
    )


def audited(fleets: Iterable[Path], delta: float, canaries: int) -> CanaryBounds | None:
    """What canaries find in sums as those of a run: for the device that spent most, of all its federations.

    The sums are those that the coordinators' logs name, with as many devices as the account counts on: of the
    survivors, those that may be corrupt add nothing.

    Args:
        fleets: The folder of each federation.
        delta: Of the account.
        canaries: As of ``bounded``.

    Returns:
        None if no sum with noise was revealed, or if nothing bounds what the device spent.
    """
    spent = [one for folder in fleets if (one := _spent_most(folder / provision.COORDINATOR, delta)) is not None]
    if not spent:
        return None
    account, found = max(spent, key=lambda one: one[0])
    return bounded(found, account, delta, canaries) if math.isfinite(account) else None


def _spent_most(coordinator: Path, delta: float) -> tuple[float, list[Sum]] | None:
    """The epsilon of the device that spent most in a federation, and the sums that it was in; None without noise."""
    key = IdentityKey.from_pem((coordinator / KEY).read_bytes()).public
    named = [each for log in logs(coordinator / TRANSCRIPT) for each in sums(StoredLog.read(log, key).entries)]
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
    """The largest epsilon that so many right guesses refute, whatever the mechanism; 0 if none.

    For a mechanism that is (ε, δ)-private, the number of right guesses of m coins is at least v with a probability of
    at most P(B ≥ v) + 2 m δ max_i P(v > B ≥ v - i) / i, where B is binomial with m trials of exp ε / (1 + exp ε).

    Args:
        guesses: Of all canaries; none is left out.
        delta: For which epsilon is stated.
        confidence: Probability that the bound holds, at least.
    """
    trials, correct = guesses.inside + guesses.outside, guesses.correct

    def refuted(epsilon: float) -> bool:
        masses = _binomial(trials, 1 / (1 + math.exp(-epsilon)))
        below = np.cumsum(masses[:correct][::-1])  # P(v > B >= v - i) for i = 1…v
        worst = float((below / np.arange(1, correct + 1)).max(initial=0.0))
        return float(masses[correct:].sum()) + 2 * trials * delta * worst <= 1 - confidence

    return _largest(refuted)


def gaussian_epsilon(guesses: Guesses, delta: float, confidence: float = CONFIDENCE) -> float:
    """The epsilon of the most private Gaussian mechanism that the errors allow; 0 if they allow any.

    With the rates α of mistaken and β of missed canaries at most, μ = Φ⁻¹(1 - α) - Φ⁻¹(β); each rate is bounded with
    half of the risk (Clopper and Pearson 1934). The least ε of μ-GDP solves Φ(μ/2 - ε/μ) - exp(ε) Φ(-μ/2 - ε/μ) = δ
    (Dong, Roth and Su 2022, corollary 2.13).

    Args:
        guesses: With a canary on either side at least.
        delta, confidence: As of ``one_run_epsilon``.
    """
    risk = (1 - confidence) / 2
    most_mistaken = _upper(guesses.mistaken, guesses.outside, risk)
    most_missed = _upper(guesses.missed, guesses.inside, risk)
    if most_mistaken + most_missed >= 1:
        return 0.0
    mu = _NORMAL.inv_cdf(1 - most_mistaken) - _NORMAL.inv_cdf(most_missed)

    def refuted(epsilon: float) -> bool:
        reached = _NORMAL.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * _NORMAL.cdf(-mu / 2 - epsilon / mu)
        return reached > delta

    return _largest(refuted)


def _largest(refuted: Callable[[float], bool]) -> float:
    """The largest epsilon up to 100 that is refuted, to 2^-20; what is below it is, too."""
    low, high = 0.0, 100.0
    while high - low > 2.0**-20:
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _upper(count: int, trials: int, risk: float) -> float:
    """The largest probability with which ``count`` or fewer of ``trials`` have a probability of ``risk``."""
    low, high = 0.0, 1.0
    while high - low > 2.0**-40:
        middle = (low + high) / 2
        low, high = (middle, high) if _binomial(trials, middle)[: count + 1].sum() > risk else (low, middle)
    return high


def _binomial(trials: int, chance: float) -> NDArray[np.float64]:
    """The probabilities of 0…trials successes."""
    if not 0 < chance < 1:
        certain: NDArray[np.float64] = np.eye(trials + 1)[round(chance) * trials]
        return certain
    k = np.arange(trials + 1)
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1.0, trials + 1)))])
    logs = factorials[-1] - factorials[k] - factorials[trials - k]
    masses: NDArray[np.float64] = np.exp(logs + k * math.log(chance) + (trials - k) * math.log1p(-chance))
    return masses
