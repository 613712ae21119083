"""The round of the analytic head: its task, what honest survivors can send, and the adapter that comes of it."""

import math
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
from aggregation.vector import Segment, VectorSpec
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
from edgeadapt.rounds.ridge import (
    STRENGTHS,
    EmbeddingMoments,
    Matrix,
    cholesky,
    cross_validated,
    moments_of,
    pack,
    packed_size,
    ridge,
    unit_rows,
    unpack,
)
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


# Ridge regression from moments: the closed form, the laws of the sums, and the same bits in any order of work.
CLASSES = 3


def examples(count: int, d: int, seed: int = 0) -> tuple[Matrix, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, d)), rng.integers(0, CLASSES, count)


def unit(rows: Matrix) -> Matrix:
    scaled: Matrix = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def least_squares(rows: Matrix, targets: Matrix, strength: float) -> Matrix:
    """The head of plain ridge regression as a least-squares problem with rows of √strength, by LAPACK's SVD."""
    d = rows.shape[1]
    left = np.vstack([rows, np.sqrt(strength) * np.eye(d)])
    found: Matrix = np.linalg.lstsq(left, np.vstack([targets, np.zeros((d, targets.shape[1]))]))[0]
    return found


def add(*parts: EmbeddingMoments) -> EmbeddingMoments:
    return EmbeddingMoments(sum(p.xx for p in parts), sum(p.xy for p in parts), sum(p.weight for p in parts))  # type: ignore[arg-type]


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_unpack_gives_back_what_pack_took_bit_for_bit(d: int, seed: int) -> None:
    square = np.random.default_rng(seed).normal(size=(d, d))
    symmetric = square + square.T
    assert pack(symmetric).shape == (packed_size(d),)
    assert unpack(pack(symmetric), d).tobytes() == symmetric.tobytes()


@given(st.integers(0, 30), st.integers(0, 30), st.integers(1, 6), st.integers(0, 2**32))
def test_moments_of_two_sets_add_up_to_those_of_both_in_any_order(a: int, b: int, d: int, seed: int) -> None:
    rows, labels = examples(a + b, d, seed)
    order = np.random.default_rng(seed).permutation(a + b)
    both = moments_of(rows[order], labels[order], CLASSES)
    parts = add(moments_of(rows[:a], labels[:a], CLASSES), moments_of(rows[a:], labels[a:], CLASSES))
    np.testing.assert_allclose(parts.xx, both.xx, atol=1e-12)
    np.testing.assert_allclose(parts.xy, both.xy, atol=1e-12)
    assert parts.weight == both.weight == a + b


@settings(max_examples=25)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=5), st.integers(0, 2**32))
def test_in_the_ring_the_sum_of_devices_is_exactly_the_sum_of_what_each_encoded(counts: list[int], seed: int) -> None:
    d, rng = 4, np.random.default_rng(seed)
    segments = (Segment("xx", packed_size(d), 20.0), Segment("xy", d * CLASSES, 20.0), Segment("weight", 1, 20.0))
    spec = VectorSpec(segments, 32, len(counts))
    vectors = []
    for i, count in enumerate(counts):
        found = moments_of(*examples(count, d, seed + i), CLASSES)
        values = {"xx": pack(found.xx), "xy": found.xy.ravel(), "weight": np.array([found.weight])}
        vectors.append(spec.encode(values, rng))
    alone = [spec.decode(vector, 1) for vector in vectors]
    total = spec.decode(np.add.reduce(vectors, dtype=vectors[0].dtype), len(counts))
    for name in total:
        assert np.array_equal(total[name], np.add.reduce([each[name] for each in alone]))
    assert total["weight"] == sum(counts)


def test_embeddings_are_scaled_to_one_so_that_no_entry_exceeds_the_number_of_examples() -> None:
    rows = np.full((7, 1), 1e-3, np.float32)  # all equal: each entry is as large as it can be
    found = moments_of(rows, np.zeros(7, np.int64), CLASSES)
    assert found.xx[0, 0] <= 7.0
    assert found.xy[0, 0] <= 7.0
    np.testing.assert_allclose(found.xx, 7.0)
    many, labels = examples(40, 5)
    found = moments_of(many.astype(np.float32), labels, CLASSES)
    np.testing.assert_allclose(np.trace(found.xx), 40.0)
    np.testing.assert_allclose(found.xy.sum(1), unit(many).sum(0), rtol=1e-6)


def test_an_embedding_of_zeros_adds_nothing_and_one_that_is_not_finite_is_refused() -> None:
    found = moments_of(np.zeros((1, 2)), np.array([0]), CLASSES)
    assert not found.xx.any()
    assert found.weight == 1.0
    for bad in (np.nan, np.inf):
        with refused(DataError, "embeddings"):
            moments_of(np.array([[bad, 1.0]]), np.array([0]), CLASSES)


@pytest.mark.parametrize("strength", [0.03, 1.0, 50.0])
def test_the_head_is_that_of_least_squares_over_all_examples(strength: float) -> None:
    rows, labels = examples(60, 8)
    found = ridge(moments_of(rows, labels, CLASSES), np.zeros((8, CLASSES)), strength)
    peer = least_squares(unit(rows), np.eye(CLASSES)[labels], strength)
    np.testing.assert_allclose(found, peer, atol=1e-10)


def test_with_a_prior_the_head_fits_what_the_prior_leaves_over() -> None:
    rows, labels = examples(60, 8)
    prior = np.random.default_rng(1).normal(size=(8, CLASSES))
    found = ridge(moments_of(rows, labels, CLASSES), prior, 2.0)
    rest = np.eye(CLASSES)[labels] - unit(rows) @ prior
    np.testing.assert_allclose(found, prior + least_squares(unit(rows), rest, 2.0), atol=1e-10)


def test_without_examples_or_with_a_strong_prior_the_head_is_the_prior() -> None:
    prior = np.random.default_rng(1).normal(size=(8, CLASSES))
    nothing = moments_of(np.zeros((0, 8)), np.zeros(0, np.int64), CLASSES)
    np.testing.assert_allclose(ridge(nothing, prior, 1.0), prior, atol=1e-12)
    np.testing.assert_allclose(ridge(moments_of(*examples(9, 8), CLASSES), prior, 1e9), prior, atol=1e-6)


@given(st.integers(1, 10), st.integers(0, 2**32))
def test_cholesky_is_that_of_lapack_and_needs_a_positive_definite_matrix(d: int, seed: int) -> None:
    square = np.random.default_rng(seed).normal(size=(d, d + 2))
    positive = square @ square.T
    lower = cholesky(positive, 0.1)
    assert lower is not None
    np.testing.assert_allclose(lower, np.linalg.cholesky(positive + 0.1 * np.eye(d)), atol=1e-8)
    assert cholesky(-positive) is None
    assert cholesky(np.full((d, d), np.nan)) is None


def test_a_sum_that_rounding_made_slightly_indefinite_still_has_a_head() -> None:
    found = moments_of(*examples(60, 8), CLASSES)
    rounded = EmbeddingMoments(found.xx - 1.001 * np.linalg.eigvalsh(found.xx)[0] * np.eye(8), found.xy, 60.0)
    assert cholesky(rounded.xx, 1e-6) is None
    assert np.isfinite(ridge(rounded, np.zeros((8, CLASSES)), 1e-6)).all()


def test_moments_that_no_embeddings_have_are_refused() -> None:
    for matrix in (np.full((2, 2), np.inf), np.full((2, 2), np.nan)):
        with refused(DataError, "moments.xx"):
            ridge(EmbeddingMoments(matrix, np.zeros((2, CLASSES)), 1.0), np.zeros((2, CLASSES)), 1.0)


def in_plain_python(xx: list[list[float]], right: list[list[float]], shift: float) -> list[list[float]]:
    """The same equations solved one number at a time: column Cholesky, then forward and backward substitution."""
    n, k = len(xx), len(right[0])
    a, lower = [row[:] for row in xx], [[0.0] * n for _ in range(n)]
    for j in range(n):
        a[j][j] += shift
    for j in range(n):
        root = math.sqrt(a[j][j])
        for i in range(j, n):
            lower[i][j] = a[i][j] / root
        for i in range(j + 1, n):
            for m in range(j + 1, n):
                a[i][m] -= lower[i][j] * lower[m][j]
    z = [row[:] for row in right]
    for col in range(k):
        for j in range(n):
            z[j][col] /= lower[j][j]
            for i in range(j + 1, n):
                z[i][col] -= lower[i][j] * z[j][col]
        for j in reversed(range(n)):
            z[j][col] /= lower[j][j]
            for i in range(j):
                z[i][col] -= lower[j][i] * z[j][col]
    return z


@pytest.mark.parametrize("seed", range(5))
def test_the_bits_of_the_head_are_those_of_plain_float_arithmetic(seed: int) -> None:
    """So they depend on no processor and no library: an audit recomputes them on another machine."""
    found, prior = moments_of(*examples(40, 12, seed), CLASSES), np.random.default_rng(seed).normal(size=(12, CLASSES))
    head = ridge(found, prior, 0.375)
    right = [[a + 0.375 * b for a, b in zip(*rows, strict=True)] for rows in zip(found.xy, prior, strict=True)]
    assert head.tolist() == in_plain_python(found.xx.tolist(), [[float(v) for v in row] for row in right], 0.375)


def scores_of(rows: Matrix, targets: Matrix, inflation: float = 1.4) -> np.ndarray:
    """Generalized cross-validation of each of ``STRENGTHS``, by LAPACK's singular values and the examples."""
    count = len(rows)
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    scores = []
    for strength in STRENGTHS:
        shrink = values**2 / (values**2 + strength * count)
        freedom = 1 - inflation * shrink.sum() / count
        error = ((targets - left @ (shrink[:, None] * (left.T @ targets))) ** 2).sum() / count
        scores.append(error / freedom**2 if freedom >= 1 / 3 else np.inf)
    return np.array(scores)


@settings(max_examples=40)
@given(st.integers(8, 80), st.integers(1, 24), st.floats(0, 3), st.integers(0, 2**32))
def test_the_strength_is_the_one_that_cross_validation_on_the_examples_chooses(
    count: int, d: int, noise: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, truth = unit(rng.normal(size=(count, d)) * np.geomspace(1, 0.05, d)), rng.normal(size=(d, CLASSES))
    labels = (rows @ truth + noise * rng.normal(size=(count, CLASSES))).argmax(1)
    moments = moments_of(rows, labels, CLASSES)
    found = cross_validated(moments)
    assert found == cross_validated(moments)
    scores = scores_of(rows, np.eye(CLASSES)[labels])
    place = [strength * count for strength in STRENGTHS].index(found)
    decades = scores[::4]
    first = next((i for i in range(len(decades) - 1) if not decades[i + 1] < decades[i]), len(decades) - 1)
    near = scores[max(place - 1, 0) : place + 2]
    assert scores[place] <= min(*decades[: first + 1], *near) * (1 + 1e-6)


def test_examples_that_repeat_each_other_are_not_nearly_interpolated() -> None:
    """Two phrases of a template predict each other: plain cross-validation takes that for knowledge."""
    gains, d, templates = list[float](), 40, 30
    for seed in range(30):
        rng = np.random.default_rng(seed)
        truth, said = rng.normal(size=(d, CLASSES)), rng.normal(size=(templates, d))
        rows = unit(np.repeat(said, 2, axis=0) + 0.3 * rng.normal(size=(2 * templates, d)))
        labels = np.repeat((said @ truth + 4 * rng.normal(size=(templates, CLASSES))).argmax(1), 2)
        plain = STRENGTHS[int(np.argmin(scores_of(rows, np.eye(CLASSES)[labels], inflation=1.0)))] * len(rows)
        moments, new = moments_of(rows, labels, CLASSES), rng.normal(size=(400, d))
        accuracy = [
            ((new @ ridge(moments, np.zeros((d, CLASSES)), strength)).argmax(1) == (new @ truth).argmax(1)).mean()
            for strength in (plain, cross_validated(moments))
        ]
        gains.append(accuracy[1] - accuracy[0])
    assert np.mean(gains) > 0.01


@settings(max_examples=15)
@given(st.sampled_from([1e-300, 1.0, 1e150, 1e308, np.inf, np.nan]), st.floats(1, 1e9), st.integers(0, 2**32))
def test_whatever_the_moments_are_the_strength_is_one_of_the_list(size: float, weight: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    square, xy = (rng.uniform(-0.2, 0.2, (5, columns)) for columns in (5, CLASSES))
    for second in (square @ square.T, size * (square + square.T)):
        for products in (xy, size * xy):
            found = cross_validated(EmbeddingMoments(second, products, weight))
            assert found in [strength * weight for strength in STRENGTHS]
