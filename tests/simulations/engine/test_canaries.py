"""Canaries: the two lower bounds against oracles, and a mechanism with too little noise, which they catch."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom, norm

from aggregation.privacy import noise
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Privacy, SessionSpec
from edgeadapt.rounds.sums import Bounds, noisy_spec
from simulations.engine import canaries, provision
from simulations.engine.canaries import Guesses, Sum, audited, gaussian_epsilon, one_run_epsilon, planted
from tests.support import FleetOf
from tests.support.fleet import session_spec

DEVICES, SIZE, CLIP, DELTA, SUMS = 60, 400, 1.0, 1e-6, 40


def spec_of(multiplier: float, mechanism: Mechanism = Mechanism.SKELLAM) -> SessionSpec:
    """A session in which all devices together have noise of this multiplier."""
    deviation = multiplier * CLIP / math.sqrt(DEVICES)
    vector = noisy_spec("delta", SIZE, Bounds(CLIP, 1, 24, DEVICES, deviation))
    fewest = session_spec(DEVICES).minimum_survivors
    return session_spec(DEVICES, vector=vector, clip_norm=CLIP, weight_cap=1, privacy=Privacy(mechanism, fewest, DELTA))


def guessed(spec: SessionSpec, runs: int = SUMS, rounds: int = 1) -> Guesses:
    total, rng = Guesses(0, 0, 0, 0), np.random.default_rng(0)
    for _ in range(runs):
        total += planted([Sum(spec, DEVICES)] * rounds, rng.bytes)
    return total


@pytest.mark.parametrize(
    ("mechanism", "rounds"), [(Mechanism.SKELLAM, 1), (Mechanism.DISCRETE_GAUSSIAN, 1), (Mechanism.SKELLAM, 2)]
)
def test_honest_noise_stays_below_the_account_and_two_thirds_of_it_are_caught(
    mechanism: Mechanism, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(0.9 * math.sqrt(rounds), mechanism)
    account = spec.spent(DEVICES).times(rounds).epsilon(DELTA)
    bound = gaussian_epsilon(guessed(spec, rounds=rounds), DELTA)
    assert 0.7 * account < bound < account
    draw = noise.draw
    monkeypatch.setattr(noise, "draw", lambda kind, variance, *rest: draw(kind, variance * (2 / 3) ** 2, *rest))
    assert gaussian_epsilon(guessed(spec, rounds=rounds), DELTA) > account


def test_a_sum_with_less_noise_weighs_more_in_a_guess() -> None:
    clear, drowned = Sum(spec_of(0.3), DEVICES), Sum(spec_of(30.0), DEVICES)
    rng, wrong = np.random.default_rng(0), Guesses(0, 0, 0, 0)
    for _ in range(20):
        wrong += planted([clear, drowned], rng.bytes)
    assert wrong.missed + wrong.mistaken < 0.1 * (wrong.inside + wrong.outside)  # 5 % from the clear one alone


def test_the_sums_of_a_run_are_those_of_the_device_that_spent_most(fleet_of: FleetOf) -> None:
    fleet = fleet_of(
        8, rounds=2, aggregation__clip_norm=CLIP, privacy__mechanism="skellam", privacy__noise_multiplier=0.8
    )
    records = fleet.federate(fleet.grid(forced_dropouts=1))
    found = audited([fleet.out], DELTA, canaries=40)
    assert found is not None
    assert found.account == records[-1].epsilon
    assert max(found.one_run, found.gaussian) < found.account
    assert found.right <= found.count >= 40


def test_canaries_of_groups_are_planted_in_the_smallest_sum_as_the_account_counts(fleet_of: FleetOf) -> None:
    noise = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 0.8}
    fleet = fleet_of(16, rounds=1, aggregation__clip_norm=CLIP, aggregation__groups=2, **noise)
    (record,) = fleet.federate(fleet.grid())
    epsilon, (found,) = canaries._spent_most(fleet.out / provision.COORDINATOR, DELTA)  # type: ignore[misc]
    assert found.devices == found.spec.privacy.honest < found.spec.smallest_sum < len(record.survivors) / 2
    assert epsilon == record.epsilon == found.spec.spent(len(record.survivors)).epsilon(DELTA)


def test_a_run_without_noise_has_no_canaries(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4, rounds=1)
    fleet.federate(fleet.grid())
    assert audited([fleet.out], DELTA, canaries=40) is None


def test_a_sum_without_noise_is_read_without_an_error() -> None:
    found = guessed(spec_of(0.02), runs=2)
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
