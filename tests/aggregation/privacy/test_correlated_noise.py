"""What correlated noise would gain in a session, and what dropouts cost it: the numbers of decision 37.

Gaussian noise, so that everything is a covariance. Each device draws noise of its own for every round, and adds to the
sum of round t what row t of D = C⁻¹ makes of it, so that later rounds take back part of what earlier ones added (matrix
factorization: Denisov et al. 2022; banded: Choquette-Choo et al. 2023). C is the square root of the prefix-sum matrix
(Fichtenberger, Henzinger and Upadhyay 2023). Errors are of prefix sums, as an adapter is one of all updates, at equal
privacy of the device that is protected least.
"""

import numpy as np
import pytest
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
ROUNDS, DEVICES = 16, 20
PREFIXES = np.tril(np.ones((ROUNDS, ROUNDS)))


def square_root(rounds: int) -> Matrix:
    """The lower triangular Toeplitz matrix with C C = the prefix-sum matrix."""
    entries = np.cumprod(np.concatenate([[1.0], 1 - 0.5 / np.arange(1, rounds)]))
    return np.array([[entries[i - j] if i >= j else 0.0 for j in range(rounds)] for i in range(rounds)])


def noise_covariance(correlated: bool, present: NDArray[np.bool_]) -> Matrix:
    """Of the sums of all rounds. ``present``: shape ``(devices, rounds)``."""
    one = np.linalg.inv(square_root(ROUNDS)) if correlated else np.eye(ROUNDS)
    shared = one @ one.T / DEVICES
    return sum((np.outer(mask, mask) * shared for mask in present.astype(float)), np.zeros_like(shared))


def losses(covariance: Matrix, *, every_round: bool) -> float:
    """Squared sensitivity over noise: the greatest of any device, which contributes to every round or to one."""
    inverse = np.linalg.inv(covariance)
    return float(np.abs(inverse).sum()) if every_round else float(np.diag(inverse).max())


def error(correlated: bool, every_round: bool, drop: float, seed: int = 0) -> tuple[float, float]:
    """Deviation of the last prefix sum, and the root mean square over all, at a loss of 1; mean over 40 draws."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(40):
        covariance = noise_covariance(correlated, rng.random((DEVICES, ROUNDS)) >= drop)
        loss = losses(covariance, every_round=every_round)
        errors = np.diag(PREFIXES @ covariance @ PREFIXES.T) * loss
        found.append((errors[-1], errors.mean()))
    last, mean = np.sqrt(np.mean(found, axis=0))
    return float(last), float(mean)


def gain(every_round: bool, drop: float) -> tuple[float, float]:
    """How many times as large the errors of independent noise are."""
    (last, mean), (own_last, own_mean) = error(False, every_round, drop), error(True, every_round, drop)
    return last / own_last, mean / own_mean


def test_the_square_root_is_one() -> None:
    np.testing.assert_allclose(square_root(ROUNDS) @ square_root(ROUNDS), PREFIXES, atol=1e-12)


@pytest.mark.parametrize(
    ("every_round", "drop", "last", "mean"),
    [
        (True, 0.0, 0.885, 0.698),
        (True, 0.1, 0.959, 0.847),
        (False, 0.0, 2.058, 1.623),
        (False, 0.05, 1.957, 1.664),
        (False, 0.1, 1.838, 1.625),
        (False, 0.3, 1.506, 1.436),
    ],
)
def test_the_decision_states_what_correlated_noise_gains(
    every_round: bool, drop: float, last: float, mean: float
) -> None:
    assert gain(every_round, drop) == pytest.approx((last, mean), abs=2e-3)


@pytest.mark.parametrize("correlated", [False, True])
def test_a_device_in_every_round_needs_in_the_last_prefix_sum_at_least_the_noise_of_independent_rounds(
    correlated: bool,
) -> None:
    """The last prefix sum alone has the sensitivity R: whatever the correlation, its noise is at least R."""
    assert error(correlated, every_round=True, drop=0.0)[0] >= ROUNDS * (1 - 1e-9)
    assert error(False, every_round=True, drop=0.0)[0] == pytest.approx(ROUNDS)


def test_dropouts_change_what_contributions_to_other_rounds_reveal_if_noise_is_correlated() -> None:
    """Independent noise of a round is what its survivors added, whatever happens later."""
    full = np.ones((DEVICES, ROUNDS), bool)
    left = full.copy()
    left[1:7, 8:] = False
    earlier = [
        np.diag(np.linalg.inv(noise_covariance(correlated, left)))[:8]
        / np.diag(np.linalg.inv(noise_covariance(correlated, full)))[:8]
        for correlated in (False, True)
    ]
    assert np.allclose(earlier[0], 1)
    assert (earlier[1].min(), earlier[1].max()) == pytest.approx((0.806, 0.948), abs=1e-3)
    worst = [losses(noise_covariance(True, present), every_round=False) for present in (left, full)]
    assert worst[0] / worst[1] == pytest.approx(1.077, abs=1e-3)
