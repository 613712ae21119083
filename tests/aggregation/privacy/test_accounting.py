"""What sums reveal: never below the exact value, close to it, and refused where it would not hold.

The oracles are the exact divergence of the two distributions, added up from SciPy's probabilities, and dp-accounting.
"""

import itertools
import math

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.rdp import RdpAccountant, rdp_privacy_accountant
from numpy.typing import NDArray
from scipy.special import ive, logsumexp

from aggregation.errors import ConfigError
from aggregation.privacy.accounting import ORDERS, Mechanism, NoisySum, Spent, calibrated
from aggregation.privacy.rounding import norm_squared
from tests.support import refused

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
# the β of aggregation.privacy.rounding. Steps for a weight unit, clip norm, numbers, devices, deviation of the noise of
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
    with refused(ConfigError, "privacy.epsilon", value=1.0):
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
