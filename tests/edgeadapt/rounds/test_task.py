"""The task that a plan carries, and the sums that a round makes: both sides read the same words or refuse."""

import json
import math
import re
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import ring, rotation
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import COUNTS, Privacy, SessionSpec
from edgeadapt.formats.layout import Layout, Tensors, TensorSpec
from edgeadapt.formats.manifest import PeftConfig
from edgeadapt.methods.parts import PARTS, Part
from edgeadapt.rounds import taskkinds
from edgeadapt.rounds.analytic import AnalyticTask, ClassifierHead, moment_spec
from edgeadapt.rounds.discovery import Cells, DiscoveryTask
from edgeadapt.rounds.evaluation import RENEWAL, SIZE, EvaluationTask, evaluated, renewed
from edgeadapt.rounds.observation import ObservationTask
from edgeadapt.rounds.roundtask import RoundTask
from edgeadapt.rounds.sums import UNIFORMS, Bounds, noisy_vector
from edgeadapt.rounds.sums import published as metrics_of
from edgeadapt.rounds.task import (
    MAX_LOSS,
    RESOLUTION,
    Task,
    _width,
    contribution_spec,
    least_ring_bits,
    require_reach,
    rounding_noise,
    rounding_norm,
    weighted_mean,
)
from tests.support import refused
from tests.support.fleet import session_spec

ADAPTER = bytes(range(32))  # SHA-256 of the adapter that a round begins with
SEED = rotation.seed(ADAPTER)
TASK = Task(PeftConfig("LORA", 8, 16, ("query", "value")), ("off", "on"), 2, 16, 2e-3, 0.01, 0.0, PARTS, PARTS)
LAYOUT = Layout((TensorSpec("a", (2, 3)),))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"epochs": 0}, "epochs"),
        ({"epochs": "1"}, "epochs"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"labels": "on"}, "labels"),
        ({"peft_config": {**asdict(TASK.peft_config), "peft_type": "LOKR"}}, "peft_config.peft_type"),
        ({"peft_config": {**asdict(TASK.peft_config), "code": "x"}}, "peft_config.code"),
        ({"trained": ["C"]}, "trained.0"),
        ({"trained": []}, "shared"),
        ({"trained": ["A"], "shared": ["B", "head"]}, "shared"),
        ({"trained": ["R", "head"], "shared": ["head"]}, "parts"),
        ({"trained": ["R", "B"], "shared": ["R"]}, "parts"),
        ({"trained": ["R"], "shared": ["R", "A"]}, "parts"),
        ({"trained": ["frozen", "head"], "shared": ["head"]}, "parts"),
        ({"trained": ["head"], "shared": ["frozen", "head"]}, "parts"),
    ],
)
def test_a_field_that_is_unknown_or_out_of_range_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with refused(ProtocolError, f"task.{field}"):
        Task.decode(json.dumps({**json.loads(TASK.encode()), **changes}).encode())


def test_a_task_without_variants_is_written_as_before_there_were_any() -> None:
    """So that older devices read it, and an audit older transcripts."""
    written = json.loads(TASK.encode())
    assert "variants" not in written
    varied = replace(TASK, variants=3)
    assert json.loads(varied.encode()) == written | {"variants": 3}
    assert (Task.decode(varied.encode()), Task.decode(TASK.encode())) == (varied, TASK)


def test_every_sum_has_its_bound_and_the_adapter_comes_first() -> None:
    large = Layout((TensorSpec("a", (1, 10**6)),))
    spec = contribution_spec(large, Bounds(clip_norm=12.0, weight_cap=128, ring_bits=22, max_clients=15))
    assert [(s.name, s.size, s.bound) for s in spec.segments] == [
        ("delta", 10**6, 12.0 * 128 * rotation.peak(10**6)),
        ("weight", 1, 128.0),
        ("correct", 1, 128.0),
        ("loss", 1, MAX_LOSS * 128),
        ("held_out", 1, 128.0),
    ]
    assert (spec.ring_bits, spec.max_clients, spec.size) == (22, 15, 10**6 + 4)


@given(st.integers(16, 40), st.integers(1, 65_536), st.integers(3, 5_000))
def test_examples_are_counted_exactly_or_the_ring_is_refused(bits: int, cap: int, clients: int) -> None:
    try:
        spec = contribution_spec(LAYOUT, Bounds(clip_norm=1.0, weight_cap=cap, ring_bits=bits, max_clients=clients))
    except ConfigError as error:
        assert str(bits) in str(error)  # noqa: PT017
        assert cap * clients >= 2 ** (bits - 1) - clients
        return
    for segment in spec.segments[1:]:
        if segment.name in ("weight", "correct", "held_out"):
            assert spec.step(segment) <= 1


@given(st.integers(1, 10**6), st.integers(1, 65_536), st.integers(3, 5_000), st.floats(1e-3, 1e3))
def test_the_least_ring_counts_examples_and_is_fine_enough_and_one_bit_less_is_not(
    size: int, cap: int, clients: int, clip: float
) -> None:
    layout = Layout((TensorSpec("a", (1, size)),))
    bounds: dict[str, Any] = {"clip_norm": clip, "weight_cap": cap, "max_clients": clients}

    def fits(bits: int) -> bool:
        try:
            spec = contribution_spec(layout, Bounds(ring_bits=bits, **bounds))
        except ConfigError:
            return False
        return spec.step(spec.segment("delta")) * np.sqrt(size) / clients <= RESOLUTION * clip

    bits = least_ring_bits(layout, Bounds(ring_bits=16, **bounds))
    assert fits(bits)
    assert bits == 16 or not fits(bits - 1)


@pytest.mark.parametrize("clients", [12, 100, 255])
def test_sixteen_bits_hold_updates_of_the_demos_size(clients: int) -> None:
    layout = Layout((TensorSpec("a", (1, 84_864)),))
    assert least_ring_bits(layout, Bounds(12.0, 128, 16, clients)) == 16


# What honest survivors can have.


def spec_of(size: int, clients: int, *, clip: float, cap: int, bits: int) -> SessionSpec:
    layout = Layout((TensorSpec("a", (1, size)),))
    vector = contribution_spec(layout, Bounds(clip_norm=clip, weight_cap=cap, ring_bits=bits, max_clients=clients))
    return session_spec(clients, vector=vector, clip_norm=clip, weight_cap=cap)


def layout_of(spec: SessionSpec) -> Layout:
    return Layout((TensorSpec("a", (1, spec.vector.segments[0].size)),))


def rounded(spec: SessionSpec, delta: Any, weight: int, rng: np.random.Generator) -> Any:
    """A contribution to the adapter ``ADAPTER``."""
    segment = spec.vector.segment("delta")
    value = rotation.rotate(delta * weight, SEED) + rounding_noise(spec.vector.step(segment), delta.size, rng)
    others = {other.name: np.zeros(other.size) for other in spec.vector.segments}
    given = {"delta": np.clip(value, -segment.bound, segment.bound), "weight": np.array([float(weight)])}
    return spec.vector.encode(others | given, rng)


@given(
    size=st.integers(1, 300),
    weights=st.lists(st.integers(0, 50), min_size=3, max_size=9),
    clip=st.floats(1e-3, 1e3),
    bits=st.integers(16, 40),
    alike=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_honest_devices_at_the_clip_norm_are_not_refused(
    size: int, weights: list[int], clip: float, bits: int, alike: bool, seed: int
) -> None:
    spec, rng = spec_of(size, len(weights), clip=clip, cap=50, bits=bits), np.random.default_rng(seed)
    total = ring.zeros(spec.vector.size, bits)
    # All devices alike: then the norms add up.
    drawn = np.ones((1, size)) if alike else rng.standard_normal((len(weights), size))
    for number, weight in enumerate(weights):
        direction = drawn[number % len(drawn)]
        delta = np.clip(direction / np.linalg.norm(direction) * clip * (1 - 2.0**-40), -clip, clip)
        total += rounded(spec, delta, weight, rng)
    sums = spec.vector.decode(total, len(weights))
    mean = weighted_mean(spec, TASK, layout_of(spec), sums, len(weights), ADAPTER)
    assert sums["weight"][0] == sum(weights)
    counted = sum(weights) or len(weights)
    noise = UNIFORMS / 2 * _width(spec, TASK, sum(weights), len(weights)) * np.sqrt(size)
    assert np.linalg.norm(mean) <= (clip + (rounding_norm(spec, len(weights)) + noise) / counted) * (1 + 1e-5)


@pytest.mark.parametrize(("size", "clients"), [(10_000, 3), (10_000, 50), (400, 400)])
def test_rounding_errors_are_within_their_bound_and_not_far_from_it(size: int, clients: int) -> None:
    spec, rng = spec_of(size, clients, clip=12.0, cap=16, bits=16), np.random.default_rng(size)
    total = sum(rounded(spec, np.zeros(size), 0, rng) for _ in range(clients))
    error = np.linalg.norm(spec.vector.decode(total, clients)["delta"])
    step, bound = spec.vector.step(spec.vector.segment("delta")), rounding_norm(spec, clients)
    assert error == pytest.approx(step * np.sqrt(clients * size) / 2, rel=0.1)
    assert error < bound < (1.5 if size == 10_000 else 3.5) * error


def test_the_bound_on_rounding_errors_is_never_above_what_rounding_can_do() -> None:
    spec = spec_of(4, 3, clip=12.0, cap=16, bits=16)
    assert rounding_norm(spec, 3) == 3 * 1.5 * 2 * spec.vector.step(spec.vector.segment("delta"))


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"norm": 1.01}, "vector.delta"),
        ({"norm": float("nan")}, "vector.delta"),
        ({"weight": 0.0, "delta": 2.0**-15}, "vector.delta"),
        ({"weight": -1.0}, "vector.weight"),
        ({"weight": 9.5}, "vector.weight"),
        ({"weight": 151.0}, "vector.weight"),
    ],
)
def test_a_sum_that_honest_survivors_cannot_have_is_refused_without_its_numbers(
    changes: dict[str, float], about: str
) -> None:
    spec = spec_of(100, 3, clip=2.0, cap=50, bits=32)
    norm, weight = changes.get("norm", 0.99), changes.get("weight", 9.0)
    delta = changes.get("delta", norm * 2.0 * weight / 10)
    sums = {"delta": np.full(100, delta), "weight": np.array([weight])}
    with refused(DataError, about) as caught:
        require_reach(spec, sums, 3)
    assert set(re.findall(r"[0-9.]+", str(caught.value))) <= {"0", "2", "50"}  # the limits
    others = {segment.name: np.zeros(1) for segment in spec.vector.segments[2:]}
    delta = rotation.rotate(np.full(100, 1.7), SEED)
    sums = {"delta": delta, "weight": np.array([9.0]), **others}
    noise = UNIFORMS / 2 * 2 * TASK.learning_rate / 3
    assert np.allclose(weighted_mean(spec, TASK, layout_of(spec), sums, 3, ADAPTER), 1.7 / 9, atol=noise)


def test_the_mean_of_devices_without_examples_is_noise_that_differs_from_round_to_round() -> None:
    size, clients = 10_000, 8
    spec = spec_of(size, clients, clip=2.0, cap=50, bits=32)
    rng = np.random.default_rng(1)
    total = sum(rounded(spec, np.ones(size), 0, rng) for _ in range(clients))
    sums = spec.vector.decode(total, clients)
    means = [weighted_mean(spec, TASK, layout_of(spec), sums, clients, bytes([number]) * 32) for number in range(100)]
    spread = np.sqrt(UNIFORMS / 12) * 2 * TASK.learning_rate / clients
    assert np.std(means[0]) == pytest.approx(spread, rel=0.05)
    assert np.std(np.sum(means, axis=0)) == pytest.approx(10 * spread, rel=0.05)  # not 100


def test_the_mean_is_zero_in_the_parts_that_are_not_trained_whatever_the_sum() -> None:
    spec, weight = spec_of(300, 3, clip=2.0, cap=50, bits=32), np.array([9.0])
    names = ("q.lora_A.weight", "q.lora_B.weight", "score.weight")
    layout = Layout(tuple(TensorSpec(name, (1, 100)) for name in names))
    others = {segment.name: np.zeros(1) for segment in spec.vector.segments[2:]}
    sums = {"delta": np.full(300, 0.9), "weight": weight, **others}
    mean = weighted_mean(spec, replace(TASK, trained=(Part.B, Part.HEAD)), layout, sums, 3, bytes(32))
    assert not mean[:100].any()
    assert mean[100:].all()
    assert weighted_mean(spec, TASK, layout, sums, 3, bytes(32))[:100].all()


def test_a_sum_without_an_update_is_refused() -> None:
    spec = session_spec(3)
    other = replace(spec, vector=replace(spec.vector, segments=spec.vector.segments[:1]))
    with refused(DataError, "vector.segments"):
        require_reach(other, {"delta": np.zeros(7)}, 3)


# Metrics.


def held_out(**values: float) -> dict[str, Any]:
    sums = {"correct": 60.0, "loss": 40.0, "held_out": 120.0, **values}
    return {name: np.array([value]) for name, value in sums.items()}


def test_metrics_are_means_over_held_out_examples_to_two_decimals() -> None:
    assert metrics_of(held_out()) == {"accuracy": 0.5, "loss": 0.33}
    assert metrics_of(held_out(loss=-0.001)) == {"accuracy": 0.5, "loss": 0.0}
    assert metrics_of(held_out(held_out=100.0)) == {"accuracy": 0.6, "loss": 0.4}


@pytest.mark.parametrize("sums", [{"held_out": 0.0}, {"held_out": 99.0}, {"correct": 121.0}, {"correct": -1.0}])
def test_sums_of_too_few_held_out_examples_or_of_a_liar_give_no_metrics(sums: dict[str, float]) -> None:
    assert metrics_of(held_out(**sums)) == {}


# A plan's task is read as the kind that it is, and the sums of a round are those of its kind.
CONFIG, LABELS = PeftConfig("LORA", 2, 4, ("query",)), ("off", '{"ridge":1}')
TRAINING = Task(CONFIG, LABELS, 1, 4, 0.01, 0.0, 0.0, PARTS, PARTS)
ANALYTIC = AnalyticTask(CONFIG, LABELS, 1e-3, 16.0)
EVALUATION = EvaluationTask(CONFIG, LABELS, "a" * 64, "b" * 64, 32)
OBSERVATION = ObservationTask(CONFIG, LABELS, ("doubt", "labels"), 20_000, 7, ("a" * 64,))
HEAD_LAYOUT = Layout((TensorSpec("m.classifier.bias", (2,)), TensorSpec("m.classifier.weight", (2, 5))))
BOUNDS = {"weight_cap": 100, "ring_bits": 32, "max_clients": 3}


DISCOVERY = DiscoveryTask(CONFIG, LABELS, Cells(np.zeros(5), np.eye(2, 5)).encode(), 2)
TASKS = (TRAINING, ANALYTIC, EVALUATION, OBSERVATION, DISCOVERY)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_read_as_it_was_written_and_with_exactly_its_fields(task: RoundTask) -> None:
    raw = task.encode()
    assert taskkinds.decode(raw) == task
    assert type(taskkinds.decode(raw)) is type(task)
    assert taskkinds.decode(raw).encode() == raw
    fields = json.loads(raw)
    for name in fields:
        with refused(ProtocolError, f"task.{name}"):
            taskkinds.decode(json.dumps({key: fields[key] for key in fields if key != name}).encode())
    for name in {"unknown"} | {name for kind in taskkinds.KINDS for name in kind.names()} - set(fields):
        with refused(ProtocolError, f"task.{name}"):
            taskkinds.decode(json.dumps(fields | {name: fields["labels"]}).encode())


@pytest.mark.parametrize(
    ("task", "changes", "field"),
    [
        (ANALYTIC, {"ridge": 0.0}, "ridge"),
        (ANALYTIC, {"ridge": "most"}, "ridge"),
        (ANALYTIC, {"scale": "16"}, "scale"),
        (ANALYTIC, {"labels": []}, "labels"),
        (EVALUATION, {"newest": "a" * 63}, "newest"),
        (EVALUATION, {"newest": "b" * 64}, "newest"),
        (EVALUATION, {"most": 2**17}, "most"),
        *((TRAINING, {"learning_rate": rate}, "learning_rate") for rate in (0.0, math.nan, math.inf, True)),
    ],
)
def test_a_field_out_of_range_is_refused_by_name(task: RoundTask, changes: dict[str, Any], field: str) -> None:
    with refused(ProtocolError, f"task.{field}"):
        taskkinds.decode(json.dumps(json.loads(task.encode()) | changes).encode())


@given(
    st.binary(max_size=64)
    | st.sampled_from([b"[]", b'"ridge"', b"{}", b'{"ridge":1}', b"\xff", b"[" * 10**5])
    | st.sampled_from(TASKS).flatmap(
        lambda task: st.integers(0, len(task.encode()) - 1).map(lambda n: task.encode()[:n])
    )
)
def test_any_other_bytes_are_refused_in_one_line(raw: bytes) -> None:
    with pytest.raises(ProtocolError) as caught:
        taskkinds.decode(raw)
    assert "\n" not in str(caught.value)


def test_the_sums_are_those_of_the_kind() -> None:
    training = TRAINING.vector(HEAD_LAYOUT, Bounds(2.0, **BOUNDS))
    moments = ANALYTIC.vector(HEAD_LAYOUT, Bounds(2.0, **BOUNDS))
    assert training == contribution_spec(HEAD_LAYOUT, Bounds(2.0, **BOUNDS))
    assert moments == moment_spec(ClassifierHead.of(HEAD_LAYOUT), Bounds(1.0, **BOUNDS))
    noisy = ANALYTIC.vector(HEAD_LAYOUT, Bounds(2.0, noise=0.1, **BOUNDS))
    assert [segment.size for segment in noisy.segments] == [5 * 2]
    assert [taskkinds.kind_of(vector) for vector in (training, moments, noisy)] == [Task, AnalyticTask, AnalyticTask]
    counts = EVALUATION.vector(HEAD_LAYOUT, Bounds(2.0, noise=0.1, **BOUNDS))
    assert [(segment.size, segment.noise) for segment in counts.segments] == [(4, 0.1)]
    assert taskkinds.kind_of(counts) is EvaluationTask


def test_an_adapter_without_a_head_has_no_moments() -> None:
    factors = Layout((TensorSpec("query.lora_A.weight", (2, 5)),))
    with refused(DataError, "task.head"):
        ANALYTIC.vector(factors, Bounds(2.0, **BOUNDS))


@pytest.mark.parametrize(("task", "about"), [(TRAINING, "vector.delta"), (ANALYTIC, "vector.xx")])
def test_a_sum_is_held_to_the_bounds_of_its_kind(task: RoundTask, about: str) -> None:
    vector = task.vector(HEAD_LAYOUT, Bounds(2.0, **BOUNDS))
    spec = session_spec(3, vector=vector, clip_norm=2.0, weight_cap=100)
    taskkinds.kind_of(vector).check_sum(spec, vector.zeros(), 3)
    first = vector.segments[0]
    with refused(DataError, about):
        taskkinds.kind_of(vector).check_sum(spec, vector.zeros() | {first.name: np.full(first.size, 1.5)}, 3)


# The counts of an evaluation: what a sum may be, and what of it is published.
EVALUATION_TASK = EvaluationTask(PeftConfig("LORA", 2, 4, ("query",)), ("on", "off"), "a" * 64, "b" * 64, 32)
DEVICES, DIGEST, NORM = 60, b"d" * 32, 32 * 2**0.5
HEAD: Tensors = {
    "classifier.weight": np.zeros((2, 5), np.float32),
    "classifier.bias": np.zeros(2, np.float32),
    "query.lora_A.weight": np.ones((2, 5), np.float32),
}


def evaluation_spec(noise: float = 5.0, ring_bits: int | None = None) -> SessionSpec:
    layout, bounds = Layout.of(HEAD), Bounds(NORM, 1, 32, DEVICES, noise)
    vector = EVALUATION_TASK.vector(
        layout, replace(bounds, ring_bits=ring_bits or EVALUATION_TASK.ring_bits(layout, bounds))
    )
    privacy = Privacy(Mechanism.SKELLAM, 20, 1e-6)
    own = {"vector": vector, "clip_norm": NORM, "weight_cap": 1, "privacy": privacy}
    return session_spec(DEVICES, **own)


def counts_of(device: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of one device: a third of them has the newest release, which is right in a half, and the others in 3 of 4."""
    return np.array([16.0, 32.0, 0, 0]) if device % 3 == 0 else np.array([0, 0, 24.0, 32.0])


def test_a_sum_without_noise_or_beyond_its_ring_is_refused() -> None:
    """Nobody can tell a device how many others have its release: an exact sum could be its own counts."""
    with refused(ConfigError, "noise"):
        evaluation_spec(noise=0.0, ring_bits=32)
    with refused(ConfigError, "ring.bits"):
        evaluation_spec(ring_bits=65)


def rotated(*counts: float) -> dict[str, Any]:
    return {COUNTS: rotation.rotate(np.array(counts, np.float64), rotation.seed(DIGEST))}


def test_a_release_with_few_examples_is_not_published() -> None:
    spec = evaluation_spec()
    deviation = {"deviation": pytest.approx(5.0 * DEVICES**0.5)}
    assert evaluated(spec, rotated(98.4, 99.4, 0, 0), DEVICES, DIGEST) == deviation
    found = evaluated(spec, rotated(0, 0, 75.4, 100.4), DEVICES, DIGEST)
    assert found == deviation | {"accuracy_previous": 0.75, "examples_previous": 100.0}


def noisy_metrics(seed: int, noise: float) -> dict[str, float]:
    spec = evaluation_spec(noise)
    total = np.zeros(SIZE, np.uint64)
    for device in range(DEVICES):
        rng, key = np.random.default_rng([seed, device]), bytes([seed, device]) * 16
        total += noisy_vector(counts_of(device), spec, DIGEST, rng, key).astype(np.uint64)
    width = spec.vector.to_ring(np.zeros(1, np.int64)).dtype
    return evaluated(spec, spec.vector.decode(total.astype(width), DEVICES), DEVICES, DIGEST)


def test_with_noise_the_counts_have_the_deviation_that_is_published_and_no_other() -> None:
    noise = 5.0
    found = [noisy_metrics(seed, noise) for seed in range(150)]
    stated = found[0]["deviation"]
    assert stated == pytest.approx(noise * DEVICES**0.5)
    errors = np.array(
        [each["examples_newest"] - 640 for each in found] + [e["examples_previous"] - 1280 for e in found]
    )
    # 300 draws: the root mean square is within 20 % of the deviation, except with chances below 1e-5.
    assert 0.8 * stated < np.sqrt((errors**2).mean()) < 1.2 * stated
    assert np.mean([each["accuracy_previous"] for each in found]) == pytest.approx(0.75, abs=0.02)


def test_the_next_adapter_has_other_bytes_the_same_for_all_sums_and_hardly_moves() -> None:
    made, again = renewed(HEAD, DIGEST), renewed(HEAD, DIGEST)
    assert made["classifier.weight"].tobytes() == again["classifier.weight"].tobytes()
    assert made["classifier.weight"].tobytes() != HEAD["classifier.weight"].tobytes()
    assert np.abs(made["classifier.weight"]).max() <= RENEWAL * UNIFORMS / 2
    assert all(made[name] is HEAD[name] for name in HEAD if name != "classifier.weight")
    assert renewed(HEAD, b"e" * 32)["classifier.weight"].tobytes() != made["classifier.weight"].tobytes()
    factor = {"query.lora_A.weight": HEAD["query.lora_A.weight"]}  # a language model has no head
    assert 0 < np.abs(renewed(factor, DIGEST)["query.lora_A.weight"] - 1).max() <= RENEWAL * UNIFORMS / 2
