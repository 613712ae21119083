"""A rounded vector is never longer than its sensitivity, and has no bias that one could measure."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError
from aggregation.privacy.rounding import norm_squared, round_within
from tests.support import refused

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
