"""With noise a contribution is within its sensitivity before the noise, and the noise alone if nothing was trained."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import rotation
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.privacy import noise
from aggregation.privacy.accounting import Mechanism
from aggregation.privacy.noise import norm_squared
from aggregation.spec import Adversary, Privacy, SessionSpec
from client.node.training import check_bounds
from client.training.examples import Score
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import Part
from edgeadapt.rounds.roundtask import Outcome
from edgeadapt.rounds.sums import Bounds, check_noisy, noisy_ring_bits, noisy_spec, noisy_vector
from edgeadapt.rounds.task import Task, noisy_mean, update_of
from tests.support import refused

START: Tensors = {"a": np.zeros((20, 30), np.float32), "b": np.ones(40, np.float32)}
LAYOUT, CLIP, CLIENTS, ADAPTER = Layout.of(START), 2.0, 12, b"a" * 32
TASK = Task(PeftConfig("LORA", 2, 4, ("query",)), ("off", "on"), 1, 4, 0.01, 0.0, 0.0, tuple(Part), tuple(Part))
KEY = bytes(range(32))


def spec_of(deviation: float = 0.3, mechanism: Mechanism = Mechanism.SKELLAM) -> SessionSpec:
    vector = noisy_spec("delta", LAYOUT.size, Bounds(CLIP, 1, 16, CLIENTS, deviation))
    privacy = Privacy(mechanism, 5, 1e-6)
    return SessionSpec(1, 7, 7, CLIENTS - 1, vector, CLIP, 1, privacy, "b" * 64, LAYOUT.digest, Adversary.ACTIVE)


def outcome_of(delta: Any) -> Outcome:
    return Outcome(START, LAYOUT.unflatten(LAYOUT.flatten(START) + np.asarray(delta, np.float32)), 5, Score(0, 0, 0.0))


def steps_of(spec: SessionSpec, outcome: Outcome, *, key: bytes = KEY, seed: int = 0) -> Any:
    """A contribution, in whole steps."""
    sent = noisy_vector(update_of(outcome, LAYOUT), spec, ADAPTER, np.random.default_rng(seed), key)
    return sent.astype(np.uint16).view(np.int16).astype(np.int64)


def drawn(spec: SessionSpec, key: bytes = KEY) -> Any:
    (segment,) = spec.vector.segments
    return noise.draw(Mechanism.SKELLAM, (segment.noise / spec.vector.step(segment)) ** 2, segment.size, key)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**32), st.floats(1e-3, 1e3))
def test_without_its_noise_a_contribution_is_within_its_sensitivity(seed: int, length: float) -> None:
    spec, delta = spec_of(), np.random.default_rng(seed).standard_normal(LAYOUT.size)
    found = steps_of(spec, outcome_of(delta * length / np.linalg.norm(delta)), seed=seed) - drawn(spec)
    step = spec.vector.step(spec.vector.segments[0])
    assert int(found @ found) <= norm_squared(CLIP / step, LAYOUT.size)
    back = rotation.rotate_back(found * step, rotation.seed(ADAPTER))
    assert back @ delta > 0
    assert np.linalg.norm(back - delta * min(length, CLIP) / np.linalg.norm(delta)) < step * np.sqrt(LAYOUT.size)


def test_a_device_that_could_not_train_contributes_the_noise_alone() -> None:
    spec = spec_of()
    assert steps_of(spec, Outcome(START, START, 5, Score.worst(3))).tolist() == drawn(spec).tolist()


def test_the_noise_follows_from_its_key_alone() -> None:
    spec, outcome = spec_of(), outcome_of(np.full(LAYOUT.size, 0.01))
    first, again, other = (steps_of(spec, outcome, key=key) for key in (KEY, KEY, bytes(32)))
    assert first.tolist() == again.tolist()
    assert (first - other).tolist() == (drawn(spec) - drawn(spec, bytes(32))).tolist()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_makes_no_contribution(value: float) -> None:
    with refused(DataError, "a"):
        steps_of(spec_of(), outcome_of(np.full(LAYOUT.size, value)))


def test_only_the_vector_that_follows_from_the_clip_norm_is_accepted() -> None:
    spec = spec_of()
    check_bounds(spec, LAYOUT, TASK)
    (segment,) = spec.vector.segments
    narrow = replace(spec.vector, segments=(replace(segment, bound=segment.bound / 2),))
    with refused(ProtocolError, "offer.spec.vector"):
        check_bounds(replace(spec, vector=narrow), LAYOUT, TASK)


@pytest.mark.parametrize(
    ("size", "norm", "deviation", "clients", "expected"), [(10**6, 2.0, 0.3, 12, 16), (12_096, 0.2, 0.006, 1000, 18)]
)
def test_the_ring_has_the_fewest_bits_with_which_rounding_costs_little(
    size: int, norm: float, deviation: float, clients: int, expected: int
) -> None:
    bounds = Bounds(norm, 1, 16, clients, deviation)

    def longest(bits: int) -> float:
        spec = noisy_spec("delta", size, replace(bounds, ring_bits=bits))
        steps = norm / spec.step(spec.segments[0])
        return float(np.sqrt(norm_squared(steps, size)) / steps)

    bits = noisy_ring_bits(size, bounds)
    assert bits == expected
    assert longest(bits) <= 1.01 * longest(60)
    assert bits == 16 or longest(bits - 1) > 1.01 * longest(60)


def test_no_ring_holds_noise_that_dwarfs_its_bound() -> None:
    with refused(ConfigError, "vector.ring_bits"):
        noisy_ring_bits(10**6, Bounds(CLIP, 1, 16, CLIENTS, 1e4))


def test_a_sum_of_honest_devices_is_within_reach_and_one_of_long_updates_is_not() -> None:
    spec = spec_of(0.002)
    (segment,) = spec.vector.segments
    delta = np.random.default_rng(0).standard_normal(LAYOUT.size)
    delta *= CLIP / np.linalg.norm(delta)
    total = sum(steps_of(spec, outcome_of(delta), key=bytes([k]) * 32, seed=k) for k in range(CLIENTS))
    sums = {"delta": total * spec.vector.step(segment)}
    check_noisy(spec, sums, CLIENTS)
    with refused(DataError, "vector.delta"):
        check_noisy(spec, {"delta": 1.1 * sums["delta"]}, CLIENTS)
    with refused(DataError, "vector.delta"):
        check_noisy(spec, sums, CLIENTS - 1)


def test_the_mean_is_that_of_all_survivors_also_of_those_without_examples() -> None:
    spec = spec_of(0.002)
    (segment,) = spec.vector.segments
    delta = np.random.default_rng(0).standard_normal(LAYOUT.size)
    delta *= CLIP / np.linalg.norm(delta)
    outcomes = [outcome_of(delta)] * 6 + [Outcome(START, START, 5, Score.worst(3))] * 6
    total = sum(steps_of(spec, each, key=bytes([k]) * 32, seed=k) for k, each in enumerate(outcomes))
    sums = {"delta": total * spec.vector.step(segment)}
    mean = noisy_mean(spec, TASK, LAYOUT, sums, CLIENTS, ADAPTER)
    errors = mean - delta / 2
    assert errors.std() < 0.002
    assert np.corrcoef(mean, delta)[0, 1] > 0.99


def test_the_mean_of_a_sum_that_counts_as_zero_still_makes_another_adapter() -> None:
    spec = spec_of()
    mean = noisy_mean(spec, TASK, LAYOUT, spec.vector.zeros(), CLIENTS, ADAPTER)
    assert 0 < np.abs(mean).max() < spec.vector.step(spec.vector.segments[0])
