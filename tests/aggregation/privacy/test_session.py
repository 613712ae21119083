"""The parameters of a session with noise: its step, its room in the ring, and what it accounts for."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from aggregation import ring
from aggregation.errors import ConfigError, DataError
from aggregation.messages import SESSION_SPEC
from aggregation.privacy import noise
from aggregation.privacy.accounting import Mechanism, NoisySum, Spent
from aggregation.privacy.noise import MAX_DEVIATION
from aggregation.privacy.rounding import norm_squared, round_within
from aggregation.spec import Privacy, SessionSpec
from aggregation.vector import Segment, VectorSpec
from tests.support import refused
from tests.support.fleet import session_spec

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
