"""The round of the analytic head: its task, what honest survivors can send, and the adapter that comes of it."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import ring
from aggregation.errors import ConfigError, DataError
from aggregation.spec import SessionSpec
from edgeadapt.formats.layout import Layout, Tensors, TensorSpec
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds.analytic import (
    BIAS,
    LARGEST,
    MINIMUM_EXAMPLES,
    NOISE,
    WEIGHT,
    AnalyticTask,
    ClassifierHead,
    moment_spec,
    require_moments,
    solved,
)
from edgeadapt.rounds.ridge import Matrix, cross_validated, moments_of, pack, unit_rows
from edgeadapt.rounds.sums import UNIFORMS, Bounds
from edgeadapt.rounds.task import MAX_LOSS
from tests.support import refused
from tests.support.fleet import session_spec

D, LABELS = 6, ("off", "on", "stop")
TASK = AnalyticTask(PeftConfig("LORA", 8, 16, ("query", "value")), LABELS, 2e-4, 16.0)
PREFIX = "base_model.model."
DIGEST = bytes(32)


def adapter_of(weight: Matrix, bias: Matrix) -> Tensors:
    factor = np.ones((2, D), np.float32)
    return {
        PREFIX + WEIGHT: weight.astype(np.float32),
        PREFIX + BIAS: bias.astype(np.float32),
        PREFIX + "query.lora_A.weight": factor,
    }


ADAPTER = adapter_of(np.ones((3, D)), np.zeros(3))
HEAD = ClassifierHead.of(Layout.of(ADAPTER))


def spec_of(clients: int, *, cap: int = 100, bits: int = 40, head: ClassifierHead = HEAD) -> SessionSpec:
    vector = moment_spec(head, Bounds(clip_norm=1.0, weight_cap=cap, ring_bits=bits, max_clients=clients))
    return session_spec(clients, vector=vector, weight_cap=cap)


def draw(count: int, seed: int = 0, d: int = D) -> tuple[Matrix, Any]:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(count, d))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), rng.integers(0, len(LABELS), count)


def sums_of(rows: Matrix, labels: Any, **changes: Any) -> dict[str, Any]:
    found = moments_of(rows, labels, len(LABELS))
    sums = {"xx": pack(found.xx), "xy": found.xy.ravel(), "weight": np.array([found.weight])}
    return sums | {name: np.zeros(1) for name in ("correct", "loss", "held_out")} | changes


# The task, and the layout of the sums.


def test_every_sum_has_its_bound() -> None:
    spec = moment_spec(HEAD, Bounds(clip_norm=1.0, weight_cap=128, ring_bits=22, max_clients=15))
    assert [(s.name, s.size, s.bound) for s in spec.segments] == [
        ("xx", D * (D + 1) // 2, 128.0),
        ("xy", D * len(LABELS), 128.0),
        ("weight", 1, 128.0),
        ("correct", 1, 128.0),
        ("loss", 1, MAX_LOSS * 128),
        ("held_out", 1, 128.0),
    ]
    with refused(ConfigError, "ring_bits"):
        moment_spec(HEAD, Bounds(clip_norm=1.0, weight_cap=65536, ring_bits=16, max_clients=15))


@pytest.mark.parametrize(
    "tensors",
    [
        (TensorSpec("query.lora_A.weight", (2, 4)),),
        (TensorSpec("classifier.weight", (2, 4)),),
        (TensorSpec("classifier.bias", (3,)), TensorSpec("classifier.weight", (2, 4))),
        (TensorSpec("a.classifier.weight", (2, 4)), TensorSpec("b.classifier.bias", (2,)))[:1],
        (
            TensorSpec("a.classifier.weight", (2, 4)),
            TensorSpec("b.classifier.bias", (2,)),
            TensorSpec("b.classifier.weight", (2, 4)),
        ),
    ],
)
def test_an_adapter_without_one_head_is_refused(tensors: tuple[TensorSpec, ...]) -> None:
    with refused(DataError, "task.head"):
        ClassifierHead.of(Layout(tensors))


# What honest survivors can send.


@settings(max_examples=60)
@given(
    d=st.integers(1, 20),
    counts=st.lists(st.integers(0, 30), min_size=3, max_size=8),
    bits=st.integers(16, 40),
    alike=st.booleans(),
    up=st.booleans(),
    strength=st.sampled_from([2e-4, "gcv"]),
    seed=st.integers(0, 2**32),
)
def test_honest_devices_are_never_refused_however_they_round(
    d: int, counts: list[int], bits: int, alike: bool, up: bool, strength: Any, seed: int
) -> None:
    spec = spec_of(len(counts), cap=50, bits=bits, head=ClassifierHead("w", "b", len(LABELS), d))
    total = ring.zeros(spec.vector.size, bits)
    for number, count in enumerate(counts):
        rows, labels = draw(count, seed + number, d)
        sums = sums_of(np.ones((count, d)) if alike else rows, labels * 0 if alike else labels)
        start = 0
        for segment in spec.vector.segments:
            # Every number rounded the same way, up or away from zero, by as much as stochastic rounding can.
            steps = sums[segment.name] / spec.vector.step(segment)
            steps = np.ceil(steps) if up else np.sign(steps) * np.ceil(np.abs(steps))
            part = total[start : start + segment.size]
            part += (steps.astype(np.int64) % 2**bits).astype(total.dtype)
            start += segment.size
    sums = spec.vector.decode(total, len(counts))
    require_moments(spec, sums, len(counts))
    tensors = {"w": np.zeros((3, d), np.float32), "b": np.zeros(3, np.float32)}
    named = {f"classifier.{'weight' if name == 'w' else 'bias'}": value for name, value in tensors.items()}
    task = replace(TASK, ridge=strength)
    assert np.isfinite(solved(spec, task, named, sums, len(counts), DIGEST)["classifier.weight"]).all()


def lies() -> dict[str, tuple[dict[str, Any], str]]:
    rows, labels = draw(40)
    honest = sums_of(rows, labels)
    xx, xy = honest["xx"], honest["xy"]
    direction = np.zeros((D, D))
    direction[0, 0] = 1.0
    other = np.zeros((D, D))
    other[0, 1] = other[1, 0] = 20.0
    return {
        "half an example": ({"weight": np.array([39.5])}, "vector.weight"),
        "fewer examples than none": ({"weight": np.array([-1.0])}, "vector.weight"),
        "more than the cap": ({"weight": np.array([301.0])}, "vector.weight"),
        "long embeddings": ({"xx": xx + pack(direction)}, "vector.xx"),
        "a negative direction": ({"xx": xx - pack(20 * direction)}, "vector.xx"),
        "an indefinite matrix": ({"xx": xx + pack(other)}, "vector.xx"),
        "large labels": ({"xy": 3 * xy}, "vector.xy"),
        "labels in a direction without embeddings": (
            {"xx": pack(np.diag([40.0] + [0.0] * (D - 1))), "xy": np.ones(D * len(LABELS))},
            "vector.xy",
        ),
        "moments of nothing": ({"weight": np.zeros(1)}, "vector.xx"),
        "labels of nothing": ({"weight": np.zeros(1), "xx": 0 * xx}, "vector.xx"),
        "no number": ({"xx": np.where(xx == xx[0], np.nan, xx)}, "vector.xx"),
    }


@pytest.mark.parametrize("lie", lies())
def test_a_sum_that_honest_survivors_cannot_have_is_refused_without_its_numbers(lie: str) -> None:
    spec, (changes, about) = spec_of(3), lies()[lie]
    honest = sums_of(*draw(40))
    require_moments(spec, honest, 3)
    with refused(DataError, about) as caught:
        require_moments(spec, honest | changes, 3)
    assert set(re.findall(r"[0-9.]+", str(caught.value))) <= {"0", "1", "100"}  # the limits


# The next adapter.


def test_the_head_is_the_ridge_solution_and_the_rest_stays() -> None:
    rows, labels = draw(200)
    found = solved(spec_of(3), TASK, ADAPTER, sums_of(rows, labels), 3, DIGEST)
    strength = TASK.ridge * 200
    before = np.ones((D, 3)) / TASK.scale
    left = rows.T @ rows + strength * np.eye(D)
    expected = TASK.scale * np.linalg.solve(left, rows.T @ np.eye(3)[labels] + strength * before).T
    assert np.abs(found[PREFIX + WEIGHT] - expected).max() <= TASK.scale * NOISE * UNIFORMS / 2
    assert np.abs(found[PREFIX + WEIGHT] - expected).max() > 0
    assert found.keys() == ADAPTER.keys()
    assert all(found[name].tobytes() == ADAPTER[name].tobytes() for name in ADAPTER if not name.endswith(WEIGHT))
    assert found[PREFIX + WEIGHT].dtype == np.float32


def test_the_bias_stays_and_the_weights_fit_what_it_leaves_over() -> None:
    rows, labels = draw(200)
    bias = np.array([1.0, -2.0, 4.0])
    found = solved(spec_of(3), TASK, adapter_of(np.zeros((3, D)), bias), sums_of(rows, labels), 3, DIGEST)
    rest = np.eye(3)[labels] - bias / TASK.scale
    left = rows.T @ rows + TASK.ridge * 200 * np.eye(D)
    expected = TASK.scale * np.linalg.solve(left, rows.T @ rest).T
    assert np.abs(found[PREFIX + WEIGHT] - expected).max() <= TASK.scale * NOISE * UNIFORMS / 2
    assert found[PREFIX + BIAS].tolist() == bias.tolist()


def test_cross_validation_chooses_the_strength_from_the_sum_whatever_the_head_before_was() -> None:
    rng = np.random.default_rng(3)
    rows = unit_rows(rng.normal(size=(400, D)) + np.array([3.0] + [0.0] * (D - 1)))  # with a mean, as embeddings have
    labels = (rows @ rng.normal(size=(D, 3)) + 0.3 * rng.normal(size=(400, 3))).argmax(1)
    sums, task = sums_of(rows, labels), replace(TASK, ridge="gcv")
    strength = cross_validated(moments_of(rows, labels, 3))
    assert strength != TASK.ridge * 400
    fits = solved(spec_of(4), TASK, ADAPTER, sums, 4, DIGEST)  # trained on the same examples, so that it fits them
    for adapter in (fits, adapter_of(np.ones((3, D)), np.array([1.0, -2.0, 4.0]))):
        given_it = solved(spec_of(4), replace(TASK, ridge=strength / 400), adapter, sums, 4, DIGEST)
        chosen = solved(spec_of(4), task, adapter, sums, 4, DIGEST)
        assert chosen[PREFIX + WEIGHT].tobytes() == given_it[PREFIX + WEIGHT].tobytes()


@pytest.mark.parametrize("count", [0, 1, MINIMUM_EXAMPLES - 1])
def test_of_few_examples_nothing_is_published_but_noise_that_differs_from_round_to_round(count: int) -> None:
    spec, sums = spec_of(3), sums_of(*draw(count))
    task = replace(TASK, ridge="gcv")
    heads = [solved(spec, task, ADAPTER, sums, 3, bytes([number]) * 32)[PREFIX + WEIGHT] for number in range(50)]
    before = ADAPTER[PREFIX + WEIGHT]
    assert all(np.abs(head - before).max() <= TASK.scale * NOISE * UNIFORMS / 2 for head in heads)
    assert len({head.tobytes() for head in heads}) == 50
    assert np.std(heads) == pytest.approx(TASK.scale * NOISE * np.sqrt(UNIFORMS / 12), rel=0.1)
    assert np.abs(np.mean(heads) - before.mean()) < TASK.scale * NOISE / 10


def test_with_as_many_examples_as_labels_are_needed_the_head_follows_them() -> None:
    found = solved(spec_of(3), TASK, ADAPTER, sums_of(*draw(MINIMUM_EXAMPLES)), 3, DIGEST)
    assert np.abs(found[PREFIX + WEIGHT] - ADAPTER[PREFIX + WEIGHT]).max() > 1


def test_no_weight_exceeds_the_largest_whatever_was_sent() -> None:
    spec = spec_of(3, bits=16)  # a coarse ring leaves room for moments that no embeddings have
    rows, labels = draw(150)
    flat = pack(np.diag([150.0] + [0.0] * (D - 1)))
    sums = sums_of(rows, labels, xx=flat, xy=np.full(D * 3, 0.5))
    found = solved(spec, AnalyticTask(TASK.peft_config, LABELS, 1e-9, 1000.0), ADAPTER, sums, 3, DIGEST)
    assert np.abs(found[PREFIX + WEIGHT]).max() == LARGEST


def test_a_sum_that_is_refused_makes_no_adapter() -> None:
    with refused(DataError, "vector.weight"):
        solved(spec_of(3), TASK, ADAPTER, sums_of(*draw(40), weight=np.array([0.5])), 3, DIGEST)


def test_sums_of_another_layout_make_no_adapter() -> None:
    sums, wide = sums_of(*draw(40)), spec_of(3, head=ClassifierHead("w", "b", 3, D + 1))
    with refused(DataError, "vector.segments"):
        solved(wide, TASK, ADAPTER, sums_of(*draw(40, d=D + 1)), 3, DIGEST)
    segments = spec_of(3).vector.segments
    for odd in (
        segments[:1],
        (segments[1], segments[0], *segments[2:]),
        (replace(segments[0], size=20), *segments[1:]),
    ):
        spec = session_spec(3, vector=replace(spec_of(3).vector, segments=odd), weight_cap=100)
        with refused(DataError, "vector.segments"):
            require_moments(spec, sums, 3)
