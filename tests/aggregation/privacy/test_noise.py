"""Noise has the distribution it is accounted as. Keys are fixed; the limits would reject a right sampler once in 10^9
keys."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import ive
from scipy.stats import chi2

from aggregation.errors import ConfigError
from aggregation.keystream import Keystream
from aggregation.privacy import noise
from aggregation.privacy.accounting import DISTANCE, Mechanism
from aggregation.privacy.noise import MAX_DEVIATION, Table, draw, reach, skellam_weights, table
from tests.support import refused

SKELLAM, GAUSSIAN = Mechanism.SKELLAM, Mechanism.DISCRETE_GAUSSIAN
KEY = bytes(range(32))
ALARM = 1e-9


def pmf(mechanism: Mechanism, variance: float, last: int) -> NDArray[np.float64]:
    k = np.arange(-last, last + 1)
    found = ive(np.abs(k), variance) if mechanism is SKELLAM else np.exp(-(k**2) / (2 * variance))
    return np.asarray(found / found.sum())


def fits(drawn: NDArray[np.int64], mechanism: Mechanism, variance: float) -> bool:
    """Pearson's test, with outcomes of fewer than ten expected draws in one class on each side."""
    last = math.ceil(60 * math.sqrt(variance)) + 40
    expected = drawn.size * pmf(mechanism, variance, last)
    first = int(np.argmax(np.cumsum(expected) >= 10))
    found = np.bincount(np.clip(drawn + last, first, 2 * last - first), minlength=2 * last + 1)
    inner = slice(first, 2 * last - first + 1)
    wanted = expected[inner].copy()
    wanted[0], wanted[-1] = expected[: first + 1].sum(), expected[2 * last - first :].sum()
    statistic = ((found[inner] - wanted) ** 2 / wanted).sum()
    return bool(chi2.sf(statistic, wanted.size - 1) > ALARM)


@pytest.mark.parametrize("mechanism", Mechanism)
@pytest.mark.parametrize("variance", [0.7, 9.0, 400.0, MAX_DEVIATION**2 / 3])
def test_draws_fit_their_distribution_and_none_of_two_thirds_or_one_and_a_half_times_its_scale(
    mechanism: Mechanism, variance: float
) -> None:
    drawn = draw(mechanism, variance, 400_000, KEY)
    assert fits(drawn, mechanism, variance)
    assert not fits(drawn, mechanism, variance * 4 / 9)
    assert not fits(drawn, mechanism, variance * 9 / 4)


def test_skellam_and_discrete_gaussian_noise_of_few_steps_differ() -> None:
    assert not fits(draw(SKELLAM, 2.0, 400_000, KEY), GAUSSIAN, 2.0)


@pytest.mark.parametrize("mechanism", Mechanism)
def test_draws_have_no_bias_of_half_a_step_nor_a_twentieth(mechanism: Mechanism) -> None:
    size, variance = 1_000_000, 25.0
    mean = draw(mechanism, variance, size, KEY).mean()
    limit = 6.2 * math.sqrt(variance / size)  # of a Gaussian, beyond with a probability of 6e-10
    assert abs(mean) < limit < 0.05


def test_a_sum_of_skellam_noises_is_skellam_noise() -> None:
    total = sum(draw(SKELLAM, 3.0, 400_000, bytes([k]) * 32) for k in range(5))
    assert isinstance(total, np.ndarray)
    assert fits(total, SKELLAM, 15.0)


def bessel(k: int, x: Fraction) -> Fraction:
    """I_k(x) by its series, to 2^-200."""
    term = (x / 2) ** k / math.factorial(k)
    total, m = term, 0
    while term > Fraction(1, 2**200):
        m += 1
        term *= (x / 2) ** 2 / (m * (m + k))
        total += term
    return total


def gaussian(k: int, variance: Fraction) -> Fraction:
    with localcontext(prec=100):
        return Fraction((Decimal(-(k**2) * variance.denominator) / (2 * variance.numerator)).exp())


def distance(found: Table, weights: list[Fraction]) -> Fraction:
    """Between the table's distribution and one proportional to the weights of 0…n, which reach further."""
    both = [*reversed(weights[1:]), *weights]
    total, bounds, before = sum(both), [], 0
    for high, low in zip(found.high.tolist(), found.low.tolist(), strict=True):
        bounds.append(((high << 64) + low) - before)
        before = (high << 64) + low
    drawn = [Fraction(bound, 2**128) for bound in (*bounds, 2**128 - before)]
    outside = len(weights) - 1 + found.first
    padded = [Fraction(0)] * outside + drawn + [Fraction(0)] * outside
    return sum((abs(p - q / total) for p, q in zip(padded, both, strict=True)), Fraction(0)) / 2


@pytest.mark.parametrize("variance", [0.25, 2.0, 6.5])
def test_a_table_is_as_near_to_the_exact_distribution_as_is_accounted(variance: float) -> None:
    exact = Fraction(variance)
    for mechanism, weight in ((SKELLAM, bessel), (GAUSSIAN, gaussian)):
        found = table(mechanism, variance)
        weights = [weight(k, exact) for k in range(-found.first + 20)]
        assert 0 < distance(found, weights) < Fraction(DISTANCE)
        assert (
            distance(found, [weight(k, exact * Fraction(2**99 + 1, 2**99)) for k in range(-found.first + 20)])
            > DISTANCE / 64
        )


def test_the_largest_table_agrees_with_the_probabilities_of_scipy() -> None:
    found = table(SKELLAM, float(MAX_DEVIATION**2))
    drawn = np.diff(np.concatenate(([0.0], found.high / 2.0**64, [1.0])))
    np.testing.assert_allclose(drawn, pmf(SKELLAM, float(MAX_DEVIATION**2), -found.first), rtol=1e-9, atol=1e-15)


class Words(Keystream):
    def __init__(self, *words: int) -> None:
        self.words = list(words)

    def read_into(self, buffer: memoryview) -> None:
        for start in range(0, len(buffer), 8):
            buffer[start : start + 8] = self.words.pop(0).to_bytes(8, "little")


def test_a_draw_equal_to_the_first_word_of_a_boundary_is_decided_by_the_next() -> None:
    quarters = Table.of([2, 1])  # probabilities 1/4, 1/2, 1/4: boundaries at 2^126 and 3 · 2^126
    thirds = Table.of([1, 1])  # boundaries whose low words are not 0
    bound, low = int(thirds.high[0]), int(thirds.low[0])
    assert quarters.draw(Words(2**62 - 1, 0), 1).tolist() == [-1]
    assert quarters.draw(Words(2**62, 0), 1).tolist() == [0]
    assert quarters.draw(Words(3 * 2**62, 0), 1).tolist() == quarters.draw(Words(2**64 - 1), 1).tolist() == [1]
    assert thirds.draw(Words(bound, low - 1), 1).tolist() == [-1]
    assert thirds.draw(Words(bound, low), 1).tolist() == [0]


def test_the_guide_gives_what_a_search_of_the_whole_table_gives() -> None:
    for variance in (0.5, 50.0, float(MAX_DEVIATION**2)):
        found = table(SKELLAM, variance)
        words = np.empty(100_000, np.uint64)
        Keystream(KEY).read_into(words.data.cast("B"))
        expected = np.searchsorted(found.high, words, side="right") + found.first
        assert found.draw(Keystream(KEY), words.size).tolist()[: 2**15] == expected.tolist()[: 2**15]


def test_equal_keys_give_equal_noise_and_others_give_other() -> None:
    first, again, other = (draw(SKELLAM, 100.0, 1000, key) for key in (KEY, KEY, bytes(32)))
    assert first.tolist() == again.tolist()
    assert abs(np.corrcoef(first, other)[0, 1]) < 0.2
    assert abs(np.corrcoef(first[1:], first[:-1])[0, 1]) < 0.2


@pytest.mark.parametrize("variance", [0.0, -1.0, math.nan, math.inf, MAX_DEVIATION**2 + 1.0])
def test_a_variance_out_of_range_is_refused(variance: float) -> None:
    with refused(ConfigError, "noise.variance"):
        draw(SKELLAM, variance, 1, KEY)


@pytest.mark.parametrize("variance", [3.0, 1000.0])
@pytest.mark.parametrize("odds", [8.0, 28.0])
def test_noise_goes_beyond_its_reach_as_rarely_as_stated_and_not_much_more_rarely(variance: float, odds: float) -> None:
    for mechanism in Mechanism:
        last = math.ceil(noise.reach(variance, 200.0))
        limit, beyond = reach(variance, odds), np.arange(-last, last + 1)
        probability = pmf(mechanism, variance, last)[beyond > limit].sum()
        assert probability <= math.exp(-odds)
        nearer = pmf(mechanism, variance, last)[beyond > limit / 2].sum()
        assert nearer > math.exp(-odds)


def test_weights_of_vanishing_noise_are_those_of_zero() -> None:
    weights = skellam_weights(Fraction(1, 10**6), 40)
    assert weights[1] / weights[0] == pytest.approx(5e-7, rel=1e-9)
