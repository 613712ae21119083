"""Ridge regression from moments: the closed form, the laws of the sums, and the same bits in any order of work."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation.errors import DataError
from aggregation.vector import Segment, VectorSpec
from edgeadapt.rounds.ridge import (
    STRENGTHS,
    EmbeddingMoments,
    Matrix,
    cholesky,
    cross_validated,
    moments_of,
    pack,
    packed_size,
    positive_part,
    ridge,
    unpack,
)
from tests.support import refused

LABELS = 3


def examples(count: int, d: int, seed: int = 0) -> tuple[Matrix, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, d)), rng.integers(0, LABELS, count)


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
    both = moments_of(rows[order], labels[order], LABELS)
    parts = add(moments_of(rows[:a], labels[:a], LABELS), moments_of(rows[a:], labels[a:], LABELS))
    np.testing.assert_allclose(parts.xx, both.xx, atol=1e-12)
    np.testing.assert_allclose(parts.xy, both.xy, atol=1e-12)
    assert parts.weight == both.weight == a + b


@settings(max_examples=25)
@given(st.lists(st.integers(0, 20), min_size=2, max_size=5), st.integers(0, 2**32))
def test_in_the_ring_the_sum_of_devices_is_exactly_the_sum_of_what_each_encoded(counts: list[int], seed: int) -> None:
    d, rng = 4, np.random.default_rng(seed)
    segments = (Segment("xx", packed_size(d), 20.0), Segment("xy", d * LABELS, 20.0), Segment("weight", 1, 20.0))
    spec = VectorSpec(segments, 32, len(counts))
    vectors = []
    for i, count in enumerate(counts):
        found = moments_of(*examples(count, d, seed + i), LABELS)
        values = {"xx": pack(found.xx), "xy": found.xy.ravel(), "weight": np.array([found.weight])}
        vectors.append(spec.encode(values, rng))
    alone = [spec.decode(vector, 1) for vector in vectors]
    total = spec.decode(np.add.reduce(vectors, dtype=vectors[0].dtype), len(counts))
    for name in total:
        assert np.array_equal(total[name], np.add.reduce([each[name] for each in alone]))
    assert total["weight"] == sum(counts)


def test_embeddings_are_scaled_to_one_so_that_no_entry_exceeds_the_number_of_examples() -> None:
    rows = np.full((7, 1), 1e-3, np.float32)  # all equal: each entry is as large as it can be
    found = moments_of(rows, np.zeros(7, np.int64), LABELS)
    assert found.xx[0, 0] <= 7.0
    assert found.xy[0, 0] <= 7.0
    np.testing.assert_allclose(found.xx, 7.0)
    many, labels = examples(40, 5)
    found = moments_of(many.astype(np.float32), labels, LABELS)
    np.testing.assert_allclose(np.trace(found.xx), 40.0)
    np.testing.assert_allclose(found.xy.sum(1), unit(many).sum(0), rtol=1e-6)


def test_an_embedding_of_zeros_adds_nothing_and_one_that_is_not_finite_is_refused() -> None:
    found = moments_of(np.zeros((1, 2)), np.array([0]), LABELS)
    assert not found.xx.any()
    assert found.weight == 1.0
    for bad in (np.nan, np.inf):
        with refused(DataError, "embeddings"):
            moments_of(np.array([[bad, 1.0]]), np.array([0]), LABELS)


@pytest.mark.parametrize("strength", [0.03, 1.0, 50.0])
def test_the_head_is_that_of_least_squares_over_all_examples(strength: float) -> None:
    rows, labels = examples(60, 8)
    found = ridge(moments_of(rows, labels, LABELS), np.zeros((8, LABELS)), strength)
    peer = least_squares(unit(rows), np.eye(LABELS)[labels], strength)
    np.testing.assert_allclose(found, peer, atol=1e-10)


def test_with_a_prior_the_head_fits_what_the_prior_leaves_over() -> None:
    rows, labels = examples(60, 8)
    prior = np.random.default_rng(1).normal(size=(8, LABELS))
    found = ridge(moments_of(rows, labels, LABELS), prior, 2.0)
    rest = np.eye(LABELS)[labels] - unit(rows) @ prior
    np.testing.assert_allclose(found, prior + least_squares(unit(rows), rest, 2.0), atol=1e-10)


def test_without_examples_or_with_a_strong_prior_the_head_is_the_prior() -> None:
    prior = np.random.default_rng(1).normal(size=(8, LABELS))
    nothing = moments_of(np.zeros((0, 8)), np.zeros(0, np.int64), LABELS)
    np.testing.assert_allclose(ridge(nothing, prior, 1.0), prior, atol=1e-12)
    np.testing.assert_allclose(ridge(moments_of(*examples(9, 8), LABELS), prior, 1e9), prior, atol=1e-6)


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
    found = moments_of(*examples(60, 8), LABELS)
    rounded = EmbeddingMoments(found.xx - 1.001 * np.linalg.eigvalsh(found.xx)[0] * np.eye(8), found.xy, 60.0)
    assert cholesky(rounded.xx, 1e-6) is None
    assert np.isfinite(ridge(rounded, np.zeros((8, LABELS)), 1e-6)).all()


def test_moments_that_no_embeddings_have_are_refused() -> None:
    for matrix in (np.full((2, 2), np.inf), np.full((2, 2), np.nan)):
        with refused(DataError, "moments.xx"):
            ridge(EmbeddingMoments(matrix, np.zeros((2, LABELS)), 1.0), np.zeros((2, LABELS)), 1.0)


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
    found, prior = moments_of(*examples(40, 12, seed), LABELS), np.random.default_rng(seed).normal(size=(12, LABELS))
    head = ridge(found, prior, 0.375)
    right = [[a + 0.375 * b for a, b in zip(*rows, strict=True)] for rows in zip(found.xy, prior, strict=True)]
    assert head.tolist() == in_plain_python(found.xx.tolist(), [[float(v) for v in row] for row in right], 0.375)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.integers(0, 2**32), st.booleans())
def test_the_positive_part_is_that_of_an_eigendecomposition(d: int, seed: int, low_rank: bool) -> None:
    square = np.random.default_rng(seed).normal(size=(d, 1 if low_rank else d))
    symmetric = square @ square.T - np.eye(d) if low_rank else square + square.T
    values, vectors = np.linalg.eigh(symmetric)
    expected = (vectors * np.maximum(values, 0)) @ vectors.T
    found = positive_part(symmetric)
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(symmetric).max())
    np.testing.assert_allclose(found, found.T, atol=1e-12 * np.abs(symmetric).max())
    np.testing.assert_allclose(positive_part(found), found, atol=1e-10 * np.abs(symmetric).max())


def test_what_is_positive_semidefinite_stays_and_what_is_negative_vanishes() -> None:
    rows = np.random.default_rng(0).normal(size=(3, 9))
    np.testing.assert_allclose(positive_part(rows.T @ rows), rows.T @ rows, atol=1e-12)
    assert np.abs(positive_part(-rows.T @ rows)).max() < 1e-12
    assert not positive_part(np.zeros((4, 4))).any()


def scores_of(rows: Matrix, targets: Matrix) -> np.ndarray:
    """Generalized cross-validation of each of ``STRENGTHS``, by LAPACK's singular values and the examples."""
    count = len(rows)
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    scores = []
    for strength in STRENGTHS:
        shrink = values**2 / (values**2 + strength * count)
        freedom = 1 - shrink.sum() / count
        error = ((targets - left @ (shrink[:, None] * (left.T @ targets))) ** 2).sum() / count
        scores.append(error / freedom**2 if freedom >= 1 / 3 else np.inf)
    return np.array(scores)


@settings(max_examples=40)
@given(st.integers(8, 80), st.integers(1, 24), st.floats(0, 3), st.integers(0, 2**32))
def test_the_strength_is_the_one_that_cross_validation_on_the_examples_chooses(
    count: int, d: int, noise: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows, truth = unit(rng.normal(size=(count, d)) * np.geomspace(1, 0.05, d)), rng.normal(size=(d, LABELS))
    labels = (rows @ truth + noise * rng.normal(size=(count, LABELS))).argmax(1)
    moments = moments_of(rows, labels, LABELS)
    found = cross_validated(moments)
    assert found == cross_validated(moments)
    scores = scores_of(rows, np.eye(LABELS)[labels])
    place = [strength * count for strength in STRENGTHS].index(found)
    assert scores[place] <= min(*scores[::4], *scores[max(place - 1, 0) : place + 2]) * (1 + 1e-6)


@settings(max_examples=15)
@given(st.sampled_from([1e-300, 1.0, 1e150, 1e308, np.inf, np.nan]), st.floats(1, 1e9), st.integers(0, 2**32))
def test_whatever_the_moments_are_the_strength_is_one_of_the_list(size: float, weight: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    square, xy = (rng.uniform(-0.2, 0.2, (5, columns)) for columns in (5, LABELS))
    for second in (square @ square.T, size * (square + square.T)):
        for products in (xy, size * xy):
            found = cross_validated(EmbeddingMoments(second, products, weight))
            assert found in [strength * weight for strength in STRENGTHS]
