"""A contribution is the clipped, weighted delta within its bounds; without one, nothing is sent."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from aggregation import rotation
from aggregation.errors import DataError, ProtocolError
from aggregation.spec import Adversary, SessionSpec
from client.node.training import check_bounds
from client.training.examples import Score
from edgeadapt.formats.layout import Layout, Tensors, TensorSpec
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds.roundtask import Outcome
from edgeadapt.rounds.sums import Bounds, clip
from edgeadapt.rounds.task import MAX_LOSS, Task, contribution, contribution_spec, require_reach
from tests.support import refused

START: Tensors = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
LAYOUT = Layout.of(START)
CLIP, CAP = 12.0, 128
ADAPTER = bytes(range(32))  # SHA-256 of the file of ``START``, as it were
TASK = Task(PeftConfig("LORA", 2, 4, ("query",)), ("off", "on"), 1, 4, 0.01, 0.0, 0.0, PARTS, PARTS)


def spec_of(clip_norm: float = CLIP, cap: int = CAP, bits: int = 22, clients: int = 12) -> SessionSpec:
    vector = contribution_spec(LAYOUT, Bounds(clip_norm=clip_norm, weight_cap=cap, ring_bits=bits, max_clients=clients))
    return SessionSpec(1, 2, 2, clients - 1, vector, clip_norm, cap, None, "b" * 64, LAYOUT.digest, Adversary.ACTIVE)


def outcome_of(delta: Any, **changes: Any) -> Outcome:
    trained = LAYOUT.unflatten((LAYOUT.flatten(START) + np.asarray(delta, np.float32)).astype(np.float32))
    return Outcome(START, trained, **{"examples": 5, "held_out": Score(2, 3, 1.5), **changes})


def sent(outcome: Outcome, spec: SessionSpec, seed: int = 0) -> dict[str, Any]:
    """The values of a sum over this device alone; ``delta`` is rotated."""
    return spec.vector.decode(contribution(outcome, LAYOUT, spec, ADAPTER, np.random.default_rng(seed)), 1)


def rotated(delta: Any) -> Any:
    return rotation.rotate(delta, rotation.seed(ADAPTER))


def step(spec: SessionSpec, name: str) -> float:
    return spec.vector.step(next(segment for segment in spec.vector.segments if segment.name == name))


deltas = st.lists(st.floats(-100, 100, width=32), min_size=10, max_size=10)


@settings(deadline=None)
@given(deltas, st.integers(1, 300), st.integers(0, 2**32))
def test_the_contribution_is_weight_times_clipped_delta_rotated_within_one_and_a_half_steps(
    delta: list[float], examples: int, seed: int
) -> None:
    spec, outcome = spec_of(), outcome_of(delta, examples=examples)
    values = sent(outcome, spec, seed)
    weight = min(examples, CAP)
    exact = LAYOUT.flatten(outcome.trained).astype(np.float64) - LAYOUT.flatten(START)
    length = np.linalg.norm(exact)
    expected = exact * weight * min(1.0, CLIP / length if length else 1.0)
    assert np.abs(values["delta"] - rotated(expected)).max() < 1.5 * step(spec, "delta") * (1 + 1e-9)
    assert values["weight"][0] == weight
    assert (values["correct"][0], values["held_out"][0]) == (2, 3)
    assert abs(values["loss"][0] - 1.5) < step(spec, "loss")


@settings(deadline=None)
@given(deltas, st.floats(2.0**-20, 1e6))
def test_a_clipped_vector_keeps_its_direction_and_has_at_most_the_norm(delta: list[float], norm: float) -> None:
    vector = np.array(delta)
    clipped, length = clip(vector, norm), np.linalg.norm(vector)
    if length <= norm:
        assert np.abs(clipped - vector).max() <= 1e-12 * norm
    else:
        assert np.linalg.norm(clipped) == pytest.approx(norm, rel=1e-9)
        assert np.linalg.norm(clipped) <= norm
        assert np.allclose(clipped * length, vector * norm, rtol=1e-9, atol=1e-12 * norm * length)


@settings(deadline=None)
@given(st.floats(2.0**-60, 2.0**60), st.integers(0, 3), st.sampled_from([-1.0, 1.0]))
def test_a_single_coordinate_at_the_norm_stays_within_the_bound_however_it_rounds(
    norm: float, above: int, sign: float
) -> None:
    value = norm
    for _ in range(above):
        value = float(np.nextafter(value, np.inf))
    assert np.abs(clip(np.array([sign * value, 0.0]), norm)).max() <= norm


@settings(deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=10, max_size=10),
    st.floats(2.0**-20, 2.0**20),
    st.integers(1, 70_000),
    st.integers(16, 62),
)
def test_no_bound_is_ever_exceeded_by_finite_tensors(delta: list[float], norm: float, cap: int, bits: int) -> None:
    assume(12 * cap < 2 ** (bits - 1))  # the ring can count the examples
    trained = LAYOUT.unflatten(np.array(delta, np.float32))
    spec = spec_of(norm, cap, bits)
    outcome = Outcome(START, trained, 10**9, Score(cap, cap, MAX_LOSS * cap))
    values = sent(outcome, spec)  # refuses what is out of bounds
    assert np.linalg.norm(values["delta"]) <= norm * cap + 1.5 * np.sqrt(10) * step(spec, "delta")
    assert values["weight"][0] == cap


LARGE, WIDE = Layout((TensorSpec("a", (1, 500)),)), Layout((TensorSpec("a", (1, 10_000)),))


@settings(deadline=None)
@given(
    st.integers(0, 2**32), st.floats(1e-3, 1e3), st.floats(0.5, 2), st.integers(1, 200), st.sampled_from([16, 24, 40])
)
def test_no_honest_device_is_refused_for_its_norm_and_a_lie_of_a_ten_thousandth_is(
    seed: int, norm: float, longer: float, examples: int, bits: int
) -> None:
    """With float32 tensors and stochastic rounding, about the clip norm; the lie where the ring resolves it."""
    rng = np.random.default_rng(seed)
    start = {"a": rng.standard_normal((1, LARGE.size)).astype(np.float32)}
    delta = rng.standard_normal((1, LARGE.size))
    trained = {"a": (start["a"] + delta * (norm * longer / np.linalg.norm(delta))).astype(np.float32)}
    vector = contribution_spec(LARGE, Bounds(clip_norm=norm, weight_cap=CAP, ring_bits=bits, max_clients=12))
    spec = replace(spec_of(norm), vector=vector, layout_digest=LARGE.digest)
    outcome = Outcome(start, trained, examples, Score(2, 3, 1.5))
    sums = vector.decode(contribution(outcome, LARGE, spec, ADAPTER, rng), 1)
    require_reach(spec, sums, 1)
    if bits == 40:
        delta = sums["delta"] * (norm * sums["weight"][0] * (1 + 1e-4) / np.linalg.norm(sums["delta"]))
        with refused(DataError, "vector.delta"):
            require_reach(spec, {**sums, "delta": delta}, 1)


def test_the_weight_of_a_device_is_at_most_the_cap() -> None:
    spec = spec_of()
    assert [sent(outcome_of([0.0] * 10, examples=n), spec)["weight"][0] for n in (1, 127, 128, 129, 10**6)] == [
        1,
        127,
        128,
        128,
        128,
    ]


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["trained", "start"])
def test_an_update_with_nan_or_infinity_makes_no_contribution(poison: float, where: str) -> None:
    broken = {**START, "b": np.array([1, poison, 1, 1], np.float32)}
    with pytest.raises(DataError):
        sent(replace(outcome_of([0.0] * 10), **{where: broken}), spec_of())


@pytest.mark.parametrize("loss", [np.nan, np.inf, MAX_LOSS * CAP * 1.001])
def test_a_metric_that_is_not_finite_or_beyond_its_bound_is_refused(loss: float) -> None:
    with pytest.raises(DataError):
        sent(outcome_of([0.0] * 10, held_out=Score(1, 3, loss)), spec_of())


def test_only_the_bounds_that_follow_from_clip_norm_and_weight_cap_are_accepted() -> None:
    check_bounds(spec_of(), LAYOUT, TASK)
    for changes in ({"clip_norm": 3.0}, {"weight_cap": 127}, {"weight_cap": 129}):
        with refused(ProtocolError, "offer.spec.vector", peer="coordinator"):
            check_bounds(replace(spec_of(), **changes), LAYOUT, TASK)
    with refused(ProtocolError, "offer.spec.vector", peer="coordinator"):
        check_bounds(replace(spec_of(), weight_cap=2**32), LAYOUT, TASK)


def test_the_update_of_a_device_that_could_not_train_is_only_rounding_noise_and_its_examples_count() -> None:
    spec = spec_of()
    found = [sent(Outcome(START, START, 5, Score.worst(3)), spec, seed) for seed in range(100)]
    counts = [[float(values[name][0]) for name in ("weight", "correct", "held_out")] for values in found]
    assert counts == [[5, 0, 3]] * 100
    assert all(abs(values["loss"][0] - 3 * MAX_LOSS) < step(spec, "loss") for values in found)
    assert set(np.unique([values["delta"] for values in found]) / step(spec, "delta")) == {-1.0, 0.0, 1.0}


def test_an_adapter_of_another_layout_is_refused() -> None:
    with pytest.raises(DataError):
        sent(replace(outcome_of([0.0] * 10), trained={"a": START["a"]}), spec_of())


def rounding_errors(norm: float, draws: int, seed: int = 0) -> tuple[Any, Any]:
    """What rounding changes of a wide update of this norm, in steps, in each of so many draws; the exact update."""
    vector = contribution_spec(WIDE, Bounds(clip_norm=2.0**-4, weight_cap=3, ring_bits=16, max_clients=3))
    spec = replace(spec_of(2.0**-4, 3, 16, 3), vector=vector, layout_digest=WIDE.digest)
    delta = np.random.default_rng(seed).standard_normal((1, WIDE.size))
    trained = (norm * delta / np.linalg.norm(delta)).astype(np.float32)
    outcome = Outcome({"a": np.zeros_like(trained)}, {"a": trained}, 1, Score(0, 0, 0.0))
    exact, unit = rotated(trained.ravel().astype(np.float64)), step(spec, "delta")
    sums = (
        vector.decode(contribution(outcome, WIDE, spec, ADAPTER, np.random.default_rng(number)), 1)
        for number in range(draws)
    )
    return np.stack([(found["delta"] - exact) / unit for found in sums]), exact / unit


def test_the_rounding_is_unbiased() -> None:
    """Accepts the right mean and rejects one that is off by a hundredth of a step, whatever the sign of the number."""
    errors, exact = rounding_errors(2.0**-5, 4)  # the standard error of the mean is 1/2 / sqrt(40,000) = 0.0025
    for shift in (errors, errors * np.sign(exact)):
        assert abs(shift.mean()) < 0.01


@pytest.mark.parametrize("norm", [0.0, 3e-4, 0.016])
def test_the_variance_of_the_rounding_shows_nothing_of_the_update(norm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of a squared step for every update. By stochastic rounding alone, an update of zero has none."""

    def variance() -> float:
        return float(np.mean(rounding_errors(norm, 4)[0] ** 2))

    assert variance() == pytest.approx(1 / 4, rel=0.02)  # the standard error of the estimate is 0.6 %
    monkeypatch.setattr("edgeadapt.rounds.task.rounding_noise", lambda step, size, rng: np.zeros(size))
    assert variance() < 0.18


def test_a_coordinate_beyond_its_bound_is_clipped_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seeds are, none is: here the rotation is one that gathers the norm in one coordinate."""
    vector = contribution_spec(LARGE, Bounds(clip_norm=1.0, weight_cap=CAP, ring_bits=16, max_clients=12))
    spec = replace(spec_of(1.0), vector=vector, layout_digest=LARGE.digest)
    start = {"a": np.zeros((1, LARGE.size), np.float32)}
    trained = {"a": np.full((1, LARGE.size), 1.0, np.float32)}
    monkeypatch.setattr(rotation, "rotate", lambda delta, seed: np.linalg.norm(delta) * np.eye(1, delta.size)[0])
    outcome = Outcome(start, trained, CAP, Score(0, 0, 0.0))
    sums = vector.decode(contribution(outcome, LARGE, spec, ADAPTER, np.random.default_rng(0)), 1)
    bound, unit = vector.segment("delta").bound, step(spec, "delta")
    assert bound < 0.6 * CAP
    assert bound - unit < sums["delta"][0] < bound + unit
    require_reach(spec, sums, 1)
