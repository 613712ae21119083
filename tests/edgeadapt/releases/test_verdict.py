"""The interval against published figures and other code, its level with noise, and what the verdict says of metrics."""

import numpy as np
import pytest

from aggregation.errors import DataError
from edgeadapt.releases.verdict import Proportion, difference_interval, verdict
from tests.support import refused

# Newcombe 1998, table II, method 10: right of n, right of n, limits.
TABLE = [
    ((56, 70), (48, 80), (0.0524, 0.3339)),
    ((9, 10), (3, 10), (0.1705, 0.8090)),
    ((6, 7), (2, 7), (0.0582, 0.8062)),
    ((5, 56), (0, 29), (-0.0381, 0.1926)),
    ((0, 10), (0, 20), (-0.1611, 0.2775)),
    ((0, 10), (0, 10), (-0.2775, 0.2775)),
    ((10, 10), (0, 20), (0.6791, 1.0)),
    ((10, 10), (0, 10), (0.6075, 1.0)),
]
METRICS = {
    "deviation": 0.0,
    "accuracy_newest": 0.5,
    "examples_newest": 1024.0,
    "accuracy_previous": 0.8,
    "examples_previous": 1024.0,
}


def of(right: float, examples: float) -> Proportion:
    return Proportion(right / examples, examples)


@pytest.mark.parametrize(("one", "other", "expected"), TABLE)
def test_the_limits_are_those_that_newcombe_published(
    one: tuple[int, int], other: tuple[int, int], expected: tuple[float, float]
) -> None:
    assert difference_interval(of(*one), of(*other)) == pytest.approx(expected, abs=6e-5)


def test_the_limits_are_those_of_other_code() -> None:
    """scipy's Wilson interval of each proportion, put together as the paper says."""
    from scipy.stats import binomtest

    rng = np.random.default_rng(1)
    for _ in range(200):
        n, m = (int(each) for each in rng.integers(1, 3000, 2))
        r, s = int(rng.integers(0, n + 1)), int(rng.integers(0, m + 1))
        one, other = (binomtest(*each).proportion_ci(0.9, method="wilson") for each in ((r, n), (s, m)))
        p, q = r / n, s / m
        low = p - q - np.hypot(p - one.low, other.high - q)
        high = p - q + np.hypot(one.high - p, q - other.low)
        assert difference_interval(of(r, n), of(s, m), confidence=0.9) == pytest.approx((low, high), abs=1e-9)


def coverage(assumed: float, actual: float, draws: int = 4000) -> float:
    """The share of intervals that hold the difference, if the noise has the deviation ``actual``."""
    rng, n, p, q = np.random.default_rng(2), 400, 0.6, 0.7
    held = 0
    for _ in range(draws):
        right, right_before = rng.binomial(n, p), rng.binomial(n, q)
        a, b, c, d = rng.normal(0, actual, 4)
        one = Proportion(float(np.clip((right + a) / (n + b), 0, 1)), n + b)
        other = Proportion(float(np.clip((right_before + c) / (n + d), 0, 1)), n + d)
        low, high = difference_interval(one, other, deviation=assumed)
        held += low <= p - q <= high
    return held / draws


@pytest.mark.parametrize("deviation", [0.0, 8.0, 25.0])
def test_with_noise_the_interval_holds_its_level(deviation: float) -> None:
    assert 0.935 < coverage(deviation, deviation) < 0.97


def test_another_scale_of_the_noise_does_not_hold_the_level() -> None:
    assert coverage(25.0 * 2 / 3, 25.0) < 0.9
    assert coverage(25.0 * 3 / 2, 25.0) > 0.985


def test_a_release_that_is_worse_by_more_than_the_margin_is_found() -> None:
    found = verdict(METRICS, 0.01)
    assert found is not None
    assert found.worse
    assert found.difference == pytest.approx(-0.3)
    near = verdict(METRICS | {"accuracy_newest": 0.79}, 0.01)
    assert near is not None
    assert not near.worse
    wide = verdict(METRICS, 0.3)
    assert wide is not None
    assert not wide.worse


def test_a_release_on_few_examples_is_not_found_worse() -> None:
    few = {"examples_newest": 4.0, "examples_previous": 4.0}
    found = verdict(METRICS | few, 0.0)
    assert found is not None
    assert not found.worse
    noisy = verdict(METRICS | {"deviation": 300.0}, 0.0)
    assert noisy is not None
    assert not noisy.worse


@pytest.mark.parametrize("missing", ["newest", "previous"])
def test_without_figures_of_both_releases_there_is_no_verdict(missing: str) -> None:
    assert verdict({name: value for name, value in METRICS.items() if not name.endswith(missing)}, 0.01) is None


@pytest.mark.parametrize(
    "metrics",
    [
        {"accuracy": 0.9, "loss": 0.1},
        METRICS | {"accuracy_newest": 1.5},
        METRICS | {"examples_previous": 0.0},
        METRICS | {"deviation": -1.0},
        METRICS | {"deviation": 1e300},
        METRICS | {"deviation": float("nan")},
        METRICS | {"examples_newest": 1e300},
        METRICS | {"examples_previous": float("inf")},
    ],
)
def test_metrics_of_no_evaluation_are_refused(metrics: dict[str, float]) -> None:
    with refused(DataError, "metrics"):
        verdict(metrics, 0.01)
