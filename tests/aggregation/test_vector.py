"""Fixed point: unbiased, exact where guaranteed, never out of the ring; values that cannot be encoded are refused."""

import math
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from aggregation import ring, vector
from aggregation.errors import ConfigError, DataError
from aggregation.vector import MAX_SIZE, Segment, VectorSpec
from tests.support import FleetOf, refused

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
    with refused(ConfigError, "vector.ring_bits"):
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


class Ones:
    """A keystream of the largest coins."""

    def __init__(self, key: bytes) -> None:
        assert len(key) == 32

    def read_into(self, buffer: memoryview) -> None:
        buffer[:] = b"\xff" * len(buffer)


@pytest.mark.parametrize(("bits", "clients"), [(8, 1), (24, 4), (32, 1), (32, 100), (40, 3), (64, 1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_whole_steps_are_never_lifted_by_the_largest_coin(
    bits: int, clients: int, sign: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vector, "Keystream", Ones)
    spec = VectorSpec((Segment("x", 4, 1.0),), bits, clients)
    step = spec.step(spec.segments[0])
    whole = sign * np.array([1.0, 1 - step, step, 0.0])
    assert np.array_equal(spec.decode(spec.encode({"x": whole}, np.random.default_rng(0)), 1)["x"], whole)
    almost = np.array([0.25, 0.5, 0.75, 1 - 2.0**-7]) * step
    lifted = spec.decode(spec.encode({"x": almost}, np.random.default_rng(0)), 1)["x"]
    assert np.array_equal(lifted, np.full(4, step))  # the coin is the largest: every fraction is lifted


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_largest_coin_lifts_nothing_by_two(kind: type[np.floating[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A number just below zero has a fraction that is rounded to 1."""
    monkeypatch.setattr(vector, "Keystream", Ones)
    spec = VectorSpec((Segment("x", 4, 1.0),), 32, 100)
    below = np.array([-1e-30, -1e-12, -1e-38, 0.0], kind)
    assert not spec.encode({"x": below}, np.random.default_rng(0)).any()


@given(bound=BOUNDS, bits=st.integers(8, 64), clients=st.integers(1, 9), sign=st.sampled_from([1, -1]))
def test_a_bound_that_single_precision_rounds_up_is_within_itself(
    bound: float, bits: int, clients: int, sign: int
) -> None:
    spec = VectorSpec((Segment("x", 1, bound),), bits, clients)
    at = {"x": np.full(1, sign * bound, np.float32)}
    (total,) = spec.decode(encoded_sum(spec, [at] * clients), clients)["x"]
    assert abs(total - clients * float(at["x"][0])) <= clients * spec.step(spec.segments[0])


@pytest.mark.parametrize("bound", [2.0**-100, 2.0**-20, 1.0, 2.0**100])
@pytest.mark.parametrize("bits", [8, 16, 32, 64])
def test_single_precision_is_rounded_as_double_is(bound: float, bits: int) -> None:
    spec = VectorSpec((Segment("x", 4096, bound),), bits, 3)
    x = (np.random.default_rng(7).uniform(-1, 1, 4096) * bound).astype(np.float32)
    single, double = (spec.encode({"x": given}, np.random.default_rng(8)) for given in (x, x.astype(np.float64)))
    assert np.mean(single != double) < 0.001  # where a fraction and a coin are within 2^-23 of 1


@pytest.mark.parametrize("bits", [16, 32, 48])
def test_coins_are_the_key_streams_bits_of_a_key_that_the_generator_draws(bits: int) -> None:
    """Rounding is reproducible, and its rule is checked against one in whole numbers, without floating point."""
    spec = VectorSpec((Segment("x", 50_001, 1.0), Segment("y", 3, 2.0)), bits, 2)
    values = {name: np.random.default_rng(4).uniform(-1, 1, size) for name, size in (("x", 50_001), ("y", 3))}
    coins = np.empty(50_004, np.uint32)
    stream = Cipher(algorithms.AES(np.random.default_rng(5).bytes(32)), modes.CTR(bytes(16))).encryptor()
    coins[:] = np.frombuffer(stream.update(bytes(coins.nbytes)), np.uint32)
    exact = [Fraction(float(x)) / Fraction(spec.step(part)) for part in spec.segments for x in values[part.name]]
    shift, unit = 32 - vector.COIN_BITS, 2**vector.COIN_BITS
    expected = [math.floor(x + Fraction(int(coin) >> shift, unit)) for x, coin in zip(exact, coins, strict=True)]
    found = spec.encode(values, np.random.default_rng(5)).astype(np.int64)
    wide = 1 << 8 * np.dtype(ring.dtype(bits)).itemsize
    apart = {(int(a) - b) % wide for a, b in zip(found.tolist(), expected, strict=True)}
    assert apart <= {0, 1}  # 1 where floating point rounds a sum up to the ceiling of its number
    assert sum(int(a - b) % wide for a, b in zip(found.tolist(), expected, strict=True)) <= 2


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
    with refused(DataError, "vector.delta"):
        spec.encode(values, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("values", "about"),
    [
        ({"delta": np.zeros(7)}, "vector.segments"),
        ({"delta": np.zeros(7), "weight": np.zeros(1), "more": np.zeros(1)}, "vector.segments"),
        ({"delta": np.zeros(6), "weight": np.zeros(1)}, "vector.delta"),
        ({"delta": np.zeros((7, 1)), "weight": np.zeros(1)}, "vector.delta"),
    ],
)
def test_other_segments_and_shapes_are_refused(vector_of: Callable[..., VectorSpec], values: Any, about: str) -> None:
    with refused(DataError, about):
        vector_of(3).encode(values, np.random.default_rng(0))


@pytest.mark.parametrize("bound", [0.1, 1 / 3, 4.0])
@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_the_next_number_after_the_bound_is_refused_in_either_precision(
    bound: float, kind: type[np.floating[Any]]
) -> None:
    spec = VectorSpec((Segment("x", 1, bound),), 24, 10)
    at = np.array([bound], kind)
    spec.encode({"x": at}, np.random.default_rng(1))
    with refused(DataError, "vector.x"):
        spec.encode({"x": np.nextafter(at, kind(np.inf))}, np.random.default_rng(1))


@pytest.mark.parametrize("kind", [np.float16, np.int64, np.bool_, object, np.complex128])
def test_numbers_of_another_type_are_refused(kind: Any) -> None:
    spec = VectorSpec((Segment("x", 1, 1.0),), 24, 10)
    with refused(DataError, "vector.x"):
        spec.encode({"x": np.ones(1, kind)}, np.random.default_rng(1))


def test_a_sum_that_the_survivors_cannot_have_is_refused(vector_of: Callable[..., VectorSpec]) -> None:
    spec = vector_of(3)
    total = encoded_sum(spec, [{"delta": np.full(7, 4.0), "weight": np.zeros(1)}] * 3)
    spec.decode(total, 3)
    with refused(DataError, "vector.delta"):
        spec.decode(total, 2)
    with refused(DataError, "vector.delta"):
        spec.decode(-total, 2)


@pytest.mark.parametrize("total", [np.zeros(7, np.uint32), np.zeros(8, np.uint64), np.zeros((8, 1), np.uint32)])
def test_a_sum_of_another_shape_or_type_is_refused(vector_of: Callable[..., VectorSpec], total: Any) -> None:
    with refused(DataError, "ring.vector"):
        vector_of(3).decode(total, 3)


def test_a_sum_of_nobody_or_of_too_many_is_refused(vector_of: Callable[..., VectorSpec]) -> None:
    spec = vector_of(3)
    for survivors in (0, 4):
        with refused(DataError, "survivors"):
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


# The memory that a contribution takes, besides its numbers


CONSTANT = 3 * 2**20  # bytes: blocks, keys, messages


@pytest.mark.parametrize("bits", [16, 22, 24, 32])
def test_a_device_needs_three_times_its_vector(
    fleet_of: FleetOf, spec_of: Callable[..., Any], vector_of: Callable[..., Any], bits: int
) -> None:
    size = 2 * 10**6
    fleet = fleet_of(4, spec=spec_of(4, vector=vector_of(4, size=size, bits=bits)))
    name, (_, plans) = "device-000", fleet.begin(fleet.establish())
    planned = fleet.states[name].on_plan(fleet.devices[name], plans[name])
    values, rng = fleet.values(name), np.random.default_rng(1)
    tracemalloc.start()
    planned.contribute(fleet.devices[name], fleet.spec.vector.encode(values, rng))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * ring.zeros(size, bits).nbytes + CONSTANT


def test_the_coordinator_holds_one_vector_however_many_arrive(
    fleet_of: FleetOf, spec_of: Callable[..., Any], vector_of: Callable[..., Any]
) -> None:
    size = 10**6
    fleet = fleet_of(6, spec=spec_of(6, vector=vector_of(6, size=size)))
    state, plans = fleet.begin(fleet.establish())
    tracemalloc.start()
    for name in sorted(plans):
        body = fleet.contribute(name, plans[name])
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        state = state.on_masked_input(name, body)
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before < CONSTANT
        del body
    tracemalloc.stop()
    assert len(state.vectors) == 6
