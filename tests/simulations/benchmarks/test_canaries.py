"""Canaries: the two lower bounds against oracles, and a mechanism with too little noise, which they catch."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import beta, binom, norm

from adapters.noisysum import noisy_spec
from aggregation.privacy import noise
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Privacy, SessionSpec
from simulations.benchmarks import canaries
from simulations.benchmarks.canaries import Guesses, gaussian_epsilon, one_run_epsilon, planted
from tests.support.fleet import session_spec

DEVICES, SIZE, CLIP, DELTA, SUMS = 60, 400, 1.0, 1e-6, 40


def spec_of(multiplier: float, mechanism: Mechanism = Mechanism.SKELLAM) -> SessionSpec:
    """A session in which all devices together have noise of this multiplier."""
    deviation = multiplier * CLIP / math.sqrt(DEVICES)
    vector = noisy_spec("delta", SIZE, clip_norm=CLIP, noise=deviation, ring_bits=24, max_clients=DEVICES)
    fewest = session_spec(DEVICES).minimum_survivors
    return session_spec(DEVICES, vector=vector, clip_norm=CLIP, weight_cap=1, privacy=Privacy(mechanism, fewest, DELTA))


def guessed(spec: SessionSpec, sums: int = SUMS) -> Guesses:
    total, rng = Guesses(0, 0, 0, 0), np.random.default_rng(0)
    for _ in range(sums):
        total += planted(spec, DEVICES, rng.bytes)
    return total


def claimed(spec: SessionSpec) -> float:
    return spec.spent(DEVICES).epsilon(DELTA)


@pytest.mark.parametrize("mechanism", Mechanism)
def test_honest_noise_stays_below_the_account_and_two_thirds_of_it_are_caught(
    mechanism: Mechanism, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(0.9, mechanism)
    account = claimed(spec)
    bound = gaussian_epsilon(guessed(spec), DELTA)
    assert 0.75 * account < bound < account
    draw = noise.draw
    monkeypatch.setattr(noise, "draw", lambda kind, variance, *rest: draw(kind, variance * (2 / 3) ** 2, *rest))
    assert gaussian_epsilon(guessed(spec), DELTA) > account


def test_a_sum_without_noise_is_read_without_an_error() -> None:
    found = guessed(spec_of(0.02), sums=2)
    assert (found.missed, found.mistaken) == (0, 0)
    assert found.inside + found.outside == found.correct == 2 * DEVICES


@pytest.mark.parametrize(("trials", "correct"), itertools.product((1, 3, 7), (0, 1, 3, 7)))
def test_without_delta_the_bound_is_the_exact_binomial_test(trials: int, correct: int) -> None:
    if correct > trials:
        return
    found = one_run_epsilon(Guesses(trials, trials - correct, 0, 0), 0.0, confidence=0.9)
    if found == 0:
        assert sum(math.comb(trials, k) for k in range(correct, trials + 1)) >= 0.1 * 2**trials
        return
    chance = Fraction(1 / (1 + math.exp(-found)))
    terms = (math.comb(trials, k) * chance**k * (1 - chance) ** (trials - k) for k in range(correct, trials + 1))
    assert float(sum(terms)) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("trials", "correct", "delta"), [(100, 80, 1e-5), (1000, 700, 1e-6), (500, 500, 1e-4)])
def test_the_bound_of_one_run_is_that_of_its_paper(trials: int, correct: int, delta: float) -> None:
    """Algorithm of the appendix of Steinke, Nasr and Jagielski 2023, with SciPy's binomial distribution."""

    def p_value(epsilon: float) -> float:
        q = 1 / (1 + math.exp(-epsilon))
        best, total = 0.0, 0.0
        for i in range(1, correct + 1):
            total += float(binom.pmf(correct - i, trials, q))
            best = max(best, total / i)
        return float(binom.sf(correct - 1, trials, q)) + 2 * trials * delta * best

    found = one_run_epsilon(Guesses(trials, trials - correct, 0, 0), delta)
    assert p_value(found - 1e-3) < 0.05 < p_value(found + 1e-3)


@pytest.mark.parametrize(("count", "trials"), [(0, 10), (3, 10), (17, 400), (400, 400)])
def test_the_rates_are_bounded_as_by_clopper_and_pearson(count: int, trials: int) -> None:
    expected = 1.0 if count == trials else float(beta.ppf(0.975, count + 1, trials - count))
    assert canaries._upper(count, trials, 0.025) == pytest.approx(expected, abs=1e-9)


def test_the_gaussian_bound_approaches_the_epsilon_of_its_mechanism() -> None:
    """With a multiplier of 1, guesses at the middle are wrong with the probability Φ(-1/2)."""
    many, wrong = 4 * 10**5, round(4 * 10**5 * float(norm.cdf(-0.5)))
    found = gaussian_epsilon(Guesses(many, wrong, many, wrong), 1e-5)
    exact = 4.37718  # of μ = 1 at δ = 1e-5
    reached = float(norm.cdf(0.5 - exact)) - math.exp(exact) * float(norm.cdf(-0.5 - exact))
    assert reached == pytest.approx(1e-5, rel=1e-3)
    assert 0.97 * exact < found < exact


def test_guesses_by_coin_bound_nothing() -> None:
    guesses = Guesses(500, 250, 500, 250)
    assert one_run_epsilon(guesses, DELTA) == gaussian_epsilon(guesses, DELTA) == 0.0
