"""What sums reveal: never below the exact value, close to it, and refused where it would not hold.

The oracles are the exact divergence of the two distributions, added up from SciPy's probabilities, and dp-accounting.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import ive, logsumexp

from aggregation import ring
from aggregation.errors import ConfigError, DataError
from aggregation.messages import SESSION_SPEC
from aggregation.privacy import noise
from aggregation.privacy.accounting import ORDERS, Mechanism, NoisySum, Spent, calibrated
from aggregation.privacy.noise import MAX_DEVIATION, norm_squared, round_within
from aggregation.spec import Privacy, SessionSpec
from aggregation.vector import Segment, VectorSpec
from tests.support import refused
from tests.support.fleet import session_spec

SKELLAM, GAUSSIAN = Mechanism.SKELLAM, Mechanism.DISCRETE_GAUSSIAN
DELTA = 1e-6


def one_sum(variance: float, norm_squared: int, *, honest: int = 1, size: int = 1) -> NoisySum:
    return NoisySum(SKELLAM, size, norm_squared, variance, honest)


def skellam_log_pmf(variance: float, last: int) -> NDArray[np.float64]:
    return np.log(ive(np.abs(np.arange(-last, last + 1)), variance))


def discrete_gaussians_log_pmf(variance: float, count: int, last: int) -> NDArray[np.float64]:
    """Of the sum of ``count`` discrete Gaussians, on -count·last…count·last, by convolution."""
    one = np.exp(-(np.arange(-last, last + 1) ** 2) / (2 * variance))
    one /= one.sum()
    total = np.ones(1)
    for _ in range(count):
        total = np.convolve(total, one)
    return np.log(total)


def divergence(log_pmf: NDArray[np.float64], shift: int, order: int) -> float:
    """The exact Rényi divergence between the distribution and itself, ``shift`` further."""
    here, there = log_pmf[shift:], log_pmf[:-shift]
    return float(logsumexp(order * here - (order - 1) * there)) / (order - 1)


def exact_epsilon(log_pmf: NDArray[np.float64], shift: int, delta: float) -> float:
    """The least ε of one sum, by bisection on δ(ε) = Σ max(0, p(k) - exp(ε) p(k - shift))."""
    here, there = np.exp(log_pmf[shift:]), np.exp(log_pmf[:-shift])
    low, high = 0.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        enough = np.maximum(here - math.exp(middle) * there, 0).sum() <= delta
        low, high = (low, middle) if enough else (middle, high)
    return high


@pytest.mark.parametrize(("variance", "shift"), itertools.product((4.0, 100.0, 900.0), (1, 2, 7)))
def test_the_curve_of_skellam_noise_is_above_the_exact_divergence_and_near_it(variance: float, shift: int) -> None:
    curve = one_sum(variance, shift**2).curve()
    for order in (2, 3, 5, 10):
        exact = divergence(skellam_log_pmf(variance, math.ceil(20 * math.sqrt(variance) + order * shift)), shift, order)
        assert exact <= curve[ORDERS.index(order)]
        assert 2 * order * shift > variance or curve[ORDERS.index(order)] <= exact * (1 + 4 / variance)


def test_the_curve_of_two_thirds_of_the_noise_is_below_the_exact_divergence() -> None:
    log_pmf = skellam_log_pmf((2 / 3) ** 2 * 900.0, 500)
    assert divergence(log_pmf, 7, 5) > 1.5 * one_sum(900.0, 49).curve()[ORDERS.index(5)]


def test_a_change_spread_over_coordinates_reveals_no_more_than_the_curve() -> None:
    curve, log_pmf = one_sum(4.0, 9, size=9).curve(), skellam_log_pmf(4.0, 90)
    assert all(9 * divergence(log_pmf, 1, order) <= curve[ORDERS.index(order)] for order in (2, 5, 20))


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("variance", [0.3, 0.5, 4.0])
def test_the_curve_of_summed_discrete_gaussians_is_above_the_exact_divergence(variance: float, count: int) -> None:
    log_pmf = discrete_gaussians_log_pmf(variance, count, int(15 * math.sqrt(variance)))
    curve = NoisySum(GAUSSIAN, 1, 4, variance, count).curve()
    for order in (2, 4):
        exact = divergence(log_pmf, 2, order) * (1 - 1e-9)  # sums of floating point
        assert exact <= curve[ORDERS.index(order)]
        assert variance < 4 or curve[ORDERS.index(order)] <= 1.001 * exact


@pytest.mark.parametrize(("multiplier", "delta"), itertools.product((0.7, 1.0, 3.0), (1e-5, 1e-9)))
def test_one_sum_costs_no_less_than_exactly_and_little_more(multiplier: float, delta: float) -> None:
    shift = 60
    variance = (multiplier * shift) ** 2
    exact = exact_epsilon(skellam_log_pmf(variance, int(14 * multiplier * shift)), shift, delta)
    assert exact <= Spent.on([one_sum(variance, shift**2)]).epsilon(delta) <= 1.15 * exact


def test_ten_sums_cost_no_less_than_by_the_privacy_loss_distribution_and_little_more() -> None:
    log_pmf, shift = skellam_log_pmf(3600.0, 900), 40
    support = range(-900, 901)
    lower, upper = (
        dict(zip(support, log_pmf, strict=True)),
        {k + shift: v for k, v in zip(support, log_pmf, strict=True)},
    )
    both = {k: lower[k] for k in lower if k in upper}, {k: upper[k] for k in upper if k in lower}
    one = privacy_loss_distribution.from_two_probability_mass_functions(*both, value_discretization_interval=1e-3)
    tight = one.self_compose(10).get_epsilon_for_delta(DELTA)
    assert tight <= Spent.on([one_sum(3600.0, shift**2)] * 10).epsilon(DELTA) <= 1.12 * tight


# Of the accounting code that the authors of both papers published: github.com/google-research/federated, commit
# 5e27a86, distributed_dp/accounting_utils.py, _skellam_rdp and compute_rdp_dgaussian after rounded_l2_norm_bound, with
# the β of aggregation.privacy.noise. Steps for a weight unit, clip norm, numbers, devices, deviation of the noise of
# one device; divergences of Skellam and of discrete Gaussian noise for the orders 2, 8 and 32.
PUBLISHED = [
    ((100, 1.0, 1_000, 100, 0.05), (4.274546, 17.09711, 68.38738), (4.27248, 17.08992, 68.35968)),
    ((20, 0.5, 100_000, 1_000, 0.1), (6.435102, 25.73438, 102.9315), (6.431485, 25.72594, 102.9038)),
    ((1_000, 0.1, 84_864, 300, 0.01), (1.071102, 4.284275, 17.13697), (1.071022, 4.284087, 17.13635)),
    ((10, 5.0, 1_000, 400, 0.1), (7.517853, 30.03678, 120.1125), (7.584222, 30.33689, 120.358)),
]


@pytest.mark.parametrize(("given", "skellam", "gaussian"), PUBLISHED)
def test_the_curves_are_those_of_the_code_that_the_papers_authors_published(
    given: tuple[int, float, int, int, float], skellam: tuple[float, ...], gaussian: tuple[float, ...]
) -> None:
    """Their bounds on the norm are no whole numbers; ours is the whole number below."""
    steps, clip_norm, size, devices, deviation = given
    longest = norm_squared(steps * clip_norm, size)
    for mechanism, expected in ((SKELLAM, skellam), (GAUSSIAN, gaussian)):
        curve = NoisySum(mechanism, size, longest, (steps * deviation) ** 2, devices).curve()
        found = [float(curve[ORDERS.index(order)]) for order in (2, 8, 32)]
        assert found == pytest.approx(expected, rel=1 / longest + 1e-6)


@pytest.mark.parametrize(("multiplier", "rounds"), itertools.product((1.0, 2.0, 20.0), (1, 10)))
def test_of_many_steps_skellam_noise_costs_what_dp_accounting_says_of_a_gaussian(
    multiplier: float, rounds: int
) -> None:
    accountant = RdpAccountant(orders=ORDERS).compose(GaussianDpEvent(multiplier), rounds)
    sums = one_sum((multiplier * 1e5) ** 2, 10**10)
    assert Spent.on([sums]).times(rounds).epsilon(DELTA) == pytest.approx(accountant.get_epsilon(DELTA), rel=1e-3)


def test_the_conversion_is_that_of_dp_accounting() -> None:
    curve = Spent.on([one_sum(25.0, 9), one_sum(100.0, 16)])
    expected, _ = rdp_privacy_accountant.compute_epsilon(ORDERS, curve.curve, DELTA * (1 - 2.0**-10))
    assert curve.epsilon(DELTA) == pytest.approx(expected, rel=1e-6)


def test_segments_with_noise_of_their_own_and_rounds_add_up() -> None:
    first, second = one_sum(25.0, 9), NoisySum(GAUSSIAN, 50, 16, 100.0, 3)
    both = Spent.on([first, second])
    assert both.curve == tuple(first.curve() + second.curve())
    assert (both + both).curve == both.times(2).curve
    assert both.draws == 1 + 150


def test_a_sum_of_skellam_noises_costs_what_one_of_their_total_variance_costs() -> None:
    assert one_sum(10.0, 9, honest=12, size=5).curve().tolist() == one_sum(120.0, 9, size=5).curve().tolist()


@pytest.mark.parametrize("mechanism", Mechanism)
def test_each_further_honest_survivor_lowers_epsilon(mechanism: Mechanism) -> None:
    found = [Spent.on([NoisySum(mechanism, 100, 900, 100.0, honest)]).epsilon(DELTA) for honest in range(2, 12)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 2 * found[-1]


def test_nothing_costs_nothing() -> None:
    assert Spent().epsilon(DELTA) == Spent.on([]).epsilon(DELTA) == 0.0


def test_a_sampler_too_far_from_its_distribution_for_delta_gives_no_finite_epsilon() -> None:
    spent = Spent.on([one_sum(1e4, 100, size=10**6, honest=100)])
    assert spent.epsilon(1e-15) < 1
    assert spent.epsilon(1e-23) == math.inf


@pytest.mark.parametrize("target", [0.1, 2.0, 9.0])
def test_calibrated_noise_meets_the_target_and_slightly_less_does_not(target: float) -> None:
    def epsilon(multiplier: float) -> float:
        return Spent.on([one_sum(multiplier**2 * 1e8 / 12, 10**8, honest=12, size=10**5)]).times(8).epsilon(DELTA)

    found = calibrated(epsilon, target)
    assert epsilon(found) <= target < epsilon(found * (1 - 2.0**-11))


def test_a_target_that_no_noise_meets_is_refused() -> None:
    with refused(ConfigError, "privacy.epsilon"):
        calibrated(lambda _: 2.0, 1.0)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-6, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    with refused(ConfigError, "delta"):
        Spent.on([one_sum(4.0, 1)]).epsilon(delta)


@pytest.mark.parametrize(
    ("field", "value"), [("size", 0), ("norm_squared", 0), ("variance", 0.0), ("variance", math.nan), ("honest", 0)]
)
def test_a_sum_without_noise_or_elements_is_refused(field: str, value: float) -> None:
    given = {"size": 1, "norm_squared": 1, "variance": 1.0, "honest": 1} | {field: value}
    with refused(ConfigError, f"sum.{field}"):
        NoisySum(SKELLAM, **given)  # type: ignore[arg-type]


def test_a_discrete_gaussian_narrower_than_its_bound_is_proved_for_is_refused() -> None:
    with refused(ConfigError, "sum.variance", value=0.2):
        NoisySum(GAUSSIAN, 1, 1, 0.2, 5)


# The parameters of a session with noise: its step, its room in the ring, and what it accounts for.
CLIENTS, SIZE, CLIP = 10, 1000, 2.0
PRIVACY = Privacy(Mechanism.SKELLAM, 6, 1e-6)


def vector_of(deviation: float = 0.5, *, bits: int = 16, bound: float = 0.4, size: int = SIZE) -> VectorSpec:
    return VectorSpec((Segment("delta", size, bound, deviation),), bits, CLIENTS)


def spec_of(**changes: Any) -> SessionSpec:
    given = {"vector": vector_of(), "clip_norm": CLIP, "weight_cap": 1, "privacy": PRIVACY, **changes}
    return session_spec(CLIENTS, **given)


@pytest.mark.parametrize("bits", [12, 16, 24, 40])
@pytest.mark.parametrize("deviation", [0.001, 0.5, 3.0])
def test_the_step_is_the_finest_that_leaves_room_for_the_noise(bits: int, deviation: float) -> None:
    spec, half = vector_of(deviation, bits=bits, bound=6.0), 2 ** (bits - 1)
    (segment,) = spec.segments
    step = spec.step(segment)

    def fits(step: float) -> bool:
        reach = noise.reach(CLIENTS * (deviation / step) ** 2, math.log(2) * 41 + math.log(SIZE))
        return CLIENTS * math.ceil(6.0 / step) + reach < half and deviation / step <= MAX_DEVIATION and step > 6 / 2**40

    assert fits(step)
    assert not fits(step / 2)


def test_a_sum_with_noise_is_decoded_and_one_beyond_its_reach_is_not() -> None:
    spec = vector_of()
    (segment,) = spec.segments
    step = spec.step(segment)
    total = ring.zeros(SIZE, 16)
    for device in range(CLIENTS):
        drawn = noise.draw(Mechanism.SKELLAM, (0.5 / step) ** 2, SIZE, bytes([device]) * 32)
        total += spec.to_ring(drawn + math.ceil(0.4 / step))
    found = spec.decode(total, CLIENTS)["delta"]
    assert found.std() == pytest.approx(0.5 * math.sqrt(CLIENTS), rel=0.1)
    assert found.mean() == pytest.approx(4.0, abs=0.3)
    largest = CLIENTS * 0.4 + step * noise.reach(CLIENTS * (0.5 / step) ** 2, math.log(2) * 41 + math.log(SIZE))
    edge = math.floor(largest / step)
    assert spec.decode(spec.to_ring(np.full(SIZE, edge)), CLIENTS)["delta"].max() <= largest
    with refused(DataError, "vector.delta"):
        spec.decode(spec.to_ring(np.full(SIZE, -edge - CLIENTS - 1)), CLIENTS)


def test_noise_that_does_not_fit_the_ring_is_refused() -> None:
    with refused(ConfigError, "vector.ring_bits", value=6):
        vector_of(bits=6)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf, 2.0**101])
def test_noise_that_is_no_deviation_is_refused(value: float) -> None:
    with refused(ConfigError, "segment.noise"):
        vector_of(value)


def test_whole_numbers_are_in_the_ring_what_they_are_modulo_its_size() -> None:
    found = vector_of(bits=20).to_ring(np.array([-1, 2**31, -(2**40) - 3, 5]))
    assert (found & (2**20 - 1)).tolist() == [2**20 - 1, 0, 2**20 - 3, 5]


def test_a_session_accounts_for_its_rounded_updates_and_the_noise_of_honest_survivors() -> None:
    spec = spec_of()
    step = spec.vector.step(spec.vector.segments[0])
    expected = NoisySum(Mechanism.SKELLAM, SIZE, norm_squared(CLIP / step, SIZE), (0.5 / step) ** 2, 6 + 3)
    assert spec.spent(spec.minimum_survivors + 3) == Spent.on([expected])
    assert spec.spent(10, corrupt=4) == Spent.on([replace(expected, honest=6)])
    assert spec.noise_multiplier() == pytest.approx(0.5 * math.sqrt(6) / CLIP)
    assert spec.noise_multiplier(corrupt=3) == pytest.approx(0.5 * math.sqrt(4) / CLIP)


@pytest.mark.parametrize("corrupt", [10, 12])
def test_a_sum_without_honest_survivors_has_no_account(corrupt: int) -> None:
    with refused(ConfigError, "sum.honest"):
        spec_of().spent(10, corrupt=corrupt)


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"privacy": None}, "spec.privacy"),
        ({"weight_cap": 2}, "spec.privacy"),
        ({"vector": VectorSpec((Segment("delta", 5, 1.0),), 16, CLIENTS)}, "spec.privacy"),
        ({"vector": VectorSpec((*vector_of().segments, Segment("weight", 1, 1.0)), 16, CLIENTS)}, "spec.privacy"),
        ({"privacy": replace(PRIVACY, honest=0)}, "spec.privacy.honest"),
        ({"privacy": replace(PRIVACY, honest=8)}, "spec.privacy.honest"),
        ({"privacy": Privacy(Mechanism.DISCRETE_GAUSSIAN, 6, 1e-6), "vector": vector_of(1e-9)}, "sum.variance"),
    ],
)
def test_noise_that_is_not_accounted_for_is_refused(changes: dict[str, Any], about: str) -> None:
    with refused(ConfigError, about):
        spec_of(**changes)


@pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
def test_a_session_whose_delta_is_no_probability_is_refused(delta: float) -> None:
    with refused(ConfigError, "spec.privacy.delta"):
        Privacy(Mechanism.SKELLAM, 6, delta)


def test_the_parameters_are_read_as_they_were_written() -> None:
    for privacy in (PRIVACY, Privacy(Mechanism.DISCRETE_GAUSSIAN, 7, 1e-9)):
        spec = spec_of(privacy=privacy)
        assert SESSION_SPEC.decode(SESSION_SPEC.encode(spec)) == spec


# Rounding


Floats, Integers = NDArray[np.float64], NDArray[np.int64]


def coins(steps: Floats, rng: np.random.Generator, calls: list[int] | None = None) -> Callable[[], Integers]:
    def rounded() -> Integers:
        if calls is not None:
            calls.append(1)
        return np.floor(steps + rng.random(steps.size)).astype(np.int64)

    return rounded


@given(size=st.integers(1, 300), norm=st.floats(0.01, 1e4), seed=st.integers(0, 2**32))
def test_no_rounded_vector_is_longer_than_the_bound(size: int, norm: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    steps = rng.standard_normal(size)
    steps *= norm / np.linalg.norm(steps)
    found = round_within(steps, norm, coins(steps, rng))
    assert np.abs(found - steps).max() < 1
    assert int(found @ found) <= norm_squared(norm, size)


def test_rounding_without_repeating_goes_beyond_the_bound() -> None:
    rng, steps = np.random.default_rng(0), np.full(400, 10.5)
    lengths = [int(found @ found) for found in (coins(steps, rng)() for _ in range(50_000))]
    assert max(lengths) > norm_squared(210.0, 400) > np.mean(lengths)


@pytest.mark.parametrize("coordinate", [10.5, 0.5, 0.01])
def test_rounding_is_repeated_about_once_in_a_thousand_times_at_most(coordinate: float) -> None:
    rng, steps, calls = np.random.default_rng(1), np.full(400, coordinate), list[int]()
    for _ in range(20_000):
        round_within(steps, 20 * coordinate, coins(steps, rng, calls))
    assert len(calls) <= 20_000 * (1 + 2.0**-10) + 6.2 * math.sqrt(20_000 * 2.0**-10)


def test_rounding_has_no_bias() -> None:
    rng = np.random.default_rng(2)
    steps = rng.uniform(-3, 3, 200_000)
    norm = float(np.linalg.norm(steps))
    found = round_within(steps, norm, coins(steps, rng))
    assert abs(np.mean(found - steps)) < 6.2 * 0.5 / math.sqrt(steps.size) < 0.01
    assert abs(np.mean(np.floor(steps) - steps)) > 0.4


def test_a_vector_longer_than_its_norm_is_refused() -> None:
    with refused(DataError, "norm"):
        round_within(np.array([3.0, 4.0]), 4.9, lambda: np.array([3, 4]))
    with refused(DataError, "norm"):
        round_within(np.array([math.nan]), 4.9, lambda: np.array([0]))


@pytest.mark.parametrize("norm", [0.0, math.nan, 2.0**31])
def test_a_norm_whose_square_is_not_exact_is_refused(norm: float) -> None:
    with refused(ConfigError, "norm"):
        norm_squared(norm, 10)
