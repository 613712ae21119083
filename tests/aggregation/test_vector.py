"""Fixed point: unbiased, exact where it promises to be, never out of the ring, loud about what it cannot hold."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import ring
from aggregation.errors import ConfigError, DataError
from aggregation.vector import MAX_SIZE, Segment, VectorSpec

BOUNDS = st.floats(1e-6, 1e6)


def encoded_sum(spec: VectorSpec, contributions: list[dict[str, Any]], seed: int = 0) -> ring.Ring:
    rng = np.random.default_rng(seed)
    total = ring.zeros(spec.size, spec.ring_bits)
    for values in contributions:
        total += spec.encode(values, rng)
    return total


@given(bits=st.integers(6, 64), clients=st.integers(1, 31), bound=BOUNDS, sign=st.sampled_from([1, -1]))
def test_as_many_clients_as_allowed_at_their_bound_do_not_wrap(
    bits: int, clients: int, bound: float, sign: int
) -> None:
    spec = VectorSpec((Segment("x", 2, bound),), bits, clients)
    total = encoded_sum(spec, [{"x": np.full(2, sign * bound)}] * clients)
    step = spec.step(spec.segments[0])
    assert np.abs(spec.decode(total, clients)["x"] - sign * clients * bound).max() <= clients * step


@given(bits=st.integers(6, 64), clients=st.integers(1, 31), bound=BOUNDS)
def test_the_step_is_the_finest_power_of_two_that_cannot_wrap(bits: int, clients: int, bound: float) -> None:
    spec = VectorSpec((Segment("x", 1, bound),), bits, clients)
    step = spec.step(spec.segments[0])
    assert np.frexp(step)[0] == 0.5
    assert np.ceil(bound / step) <= spec.max_steps
    assert np.ceil(bound / (step / 2)) > spec.max_steps


@pytest.mark.parametrize(("bits", "clients"), [(1, 1), (2, 2), (6, 32), (16, 2**15)])
def test_a_spec_whose_sum_could_wrap_cannot_be_constructed(bits: int, clients: int) -> None:
    with pytest.raises(ConfigError, match="cannot hold a sum"):
        VectorSpec((Segment("x", 1, 1.0),), bits, clients)


def test_rounding_is_unbiased_and_the_test_would_see_a_bias() -> None:
    spec = VectorSpec((Segment("x", 200_000, 1.0),), 8, 1)
    step = spec.step(spec.segments[0])
    value = 0.3 * step
    decoded = spec.decode(spec.encode({"x": np.full(200_000, value)}, np.random.default_rng(1)), 1)["x"]
    assert set(np.unique(decoded)) == {0.0, step}
    spread = step * np.sqrt(0.3 * 0.7 / decoded.size)  # of the mean, one standard deviation
    error = abs(decoded.mean() - value)
    assert error < 4 * spread
    assert abs(0.0 - value) > 100 * spread  # what rounding to nearest would give


def test_counts_are_exact_for_100_clients_and_a_million_elements() -> None:
    spec = VectorSpec((Segment("count", 10**6, 500.0),), 24, 100)
    counts = np.random.default_rng(2).integers(-500, 501, 10**6).astype(float)
    for seed in range(3):
        assert np.array_equal(
            spec.decode(spec.encode({"count": counts}, np.random.default_rng(seed)), 1)["count"], counts
        )


def test_whole_steps_are_never_lifted_by_a_coin_close_to_one() -> None:
    class Coins:
        def random(self, n: int) -> Any:
            return np.full(n, np.nextafter(1.0, 0.0))

    spec = VectorSpec((Segment("x", 1, 1.0),), 53, 1)
    value = np.array([1 - spec.step(spec.segments[0])])
    assert spec.decode(spec.encode({"x": value}, Coins()), 1)["x"] == value  # type: ignore[arg-type]


def test_single_precision_and_many_chunks_are_taken(vector_of: Callable[..., VectorSpec]) -> None:
    spec = VectorSpec((Segment("x", 200_001, 4.0), Segment("y", 1, 2.0)), 24, 4)
    x = np.random.default_rng(3).uniform(-4, 4, 200_001).astype(np.float32)
    decoded = spec.decode(spec.encode({"y": np.array([2.0]), "x": x}, np.random.default_rng(0)), 1)
    assert np.abs(decoded["x"] - x).max() < spec.step(spec.segments[0])
    assert decoded["y"] == 2.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 4.0001, -4.0001, 1e300])
def test_a_value_that_cannot_be_encoded_is_refused_with_its_segments_name(
    vector_of: Callable[..., VectorSpec], bad: float
) -> None:
    spec = vector_of(3)
    values = {"delta": np.zeros(7), "weight": np.ones(1)}
    values["delta"][5] = bad
    with pytest.raises(DataError, match="segment delta"):
        spec.encode(values, np.random.default_rng(0))


@pytest.mark.parametrize(
    "values",
    [
        {"delta": np.zeros(7)},
        {"delta": np.zeros(7), "weight": np.zeros(1), "more": np.zeros(1)},
        {"delta": np.zeros(6), "weight": np.zeros(1)},
        {"delta": np.zeros((7, 1)), "weight": np.zeros(1)},
    ],
)
def test_other_segments_and_shapes_are_refused(vector_of: Callable[..., VectorSpec], values: Any) -> None:
    with pytest.raises(DataError, match="segment"):
        vector_of(3).encode(values, np.random.default_rng(0))


def test_a_sum_that_the_survivors_cannot_have_is_refused(vector_of: Callable[..., VectorSpec]) -> None:
    spec = vector_of(3)
    total = encoded_sum(spec, [{"delta": np.full(7, 4.0), "weight": np.zeros(1)}] * 3)
    spec.decode(total, 3)
    with pytest.raises(DataError, match="delta is more than 2 clients"):
        spec.decode(total, 2)
    with pytest.raises(DataError, match="delta is more than 2 clients"):
        spec.decode(-total, 2)


def test_a_sum_of_nobody_or_of_too_many_is_refused(vector_of: Callable[..., VectorSpec]) -> None:
    spec = vector_of(3)
    for survivors in (0, 4):
        with pytest.raises(DataError, match="survivors"):
            spec.decode(ring.zeros(spec.size, 24), survivors)


@pytest.mark.parametrize(
    "make",
    [
        lambda: VectorSpec((), 24, 4),
        lambda: VectorSpec((Segment("a", 1, 1.0), Segment("a", 1, 1.0)), 24, 4),
        lambda: VectorSpec((Segment("a", 1, 1.0),), 65, 4),
        lambda: VectorSpec((Segment("a", 1, 1.0),), 24, 0),
        lambda: VectorSpec((Segment("a", MAX_SIZE, 1.0), Segment("b", 1, 1.0)), 24, 4),
        lambda: Segment("a", 0, 1.0),
        lambda: Segment("a", MAX_SIZE + 1, 1.0),
        lambda: Segment("a", 1, 0.0),
        lambda: Segment("a", 1, -1.0),
        lambda: Segment("a", 1, float("nan")),
        lambda: Segment("a", 1, float("inf")),
    ],
)
def test_a_spec_that_makes_no_sense_cannot_be_constructed(make: Callable[[], Any]) -> None:
    with pytest.raises(ConfigError):
        make()
