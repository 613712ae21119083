"""The analytic head with noise: a device's vector has the norm of its moments, and the head allows for the noise."""

import math
from typing import Any

import numpy as np
import pytest

from aggregation import rotation
from aggregation.errors import DataError
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Privacy, SessionSpec
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds import analytic
from edgeadapt.rounds.analytic import AnalyticTask, ClassifierHead
from edgeadapt.rounds.ridge import Matrix, moments_of, packed_size, unpack
from edgeadapt.rounds.sums import Bounds, noisy_vector
from tests.support import refused
from tests.support.fleet import session_spec

HIDDEN, LABELS, DEVICES, CLIP, ADAPTER = 40, 4, 60, 0.3, b"a" * 32
BEFORE: Tensors = {
    "classifier.weight": np.zeros((LABELS, HIDDEN), np.float32),
    "classifier.bias": np.zeros(LABELS, np.float32),
}
HEAD = ClassifierHead.of(Layout.of(BEFORE))
CENTERS = np.random.default_rng(5).standard_normal((LABELS, HIDDEN))


def task_of(dimensions: int = HIDDEN) -> AnalyticTask:
    return AnalyticTask(PeftConfig("LORA", 2, 4, ("query",)), tuple("abcd"), 1e-6, 16.0, dimensions)


def spec_of(task: AnalyticTask, deviation: float) -> SessionSpec:
    layout = Layout.of(BEFORE)
    vector = task.vector(layout, Bounds(CLIP, 1, 32, DEVICES, deviation))
    privacy = Privacy(Mechanism.SKELLAM, 20, 1e-6)
    return session_spec(DEVICES, vector=vector, clip_norm=CLIP, weight_cap=1, privacy=privacy)


def texts(count: int, seed: int) -> tuple[Matrix, Any]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, LABELS, count)
    rows = CENTERS[labels] + 1.5 * rng.standard_normal((count, HIDDEN))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), labels


def summed(spec: SessionSpec, task: AnalyticTask, *, empty: bool = False) -> dict[str, Any]:
    """The sum over all devices, as it is decoded."""
    total = np.zeros(spec.vector.size, np.uint32)
    for device in range(DEVICES):
        found = analytic.contributed(*texts(0 if empty else 12, device), HEAD, task, ADAPTER)
        total += noisy_vector(found, spec, ADAPTER, np.random.default_rng(device), bytes([device]) * 32)
    return spec.vector.decode(total, DEVICES)


def accuracy(tensors: Tensors) -> float:
    rows, labels = texts(4000, 999)
    return float((np.argmax(rows @ tensors["classifier.weight"].T, axis=1) == labels).mean())


@pytest.mark.parametrize("count", [1, 2, 12])
def test_a_vector_has_the_norm_of_the_mean_moments(count: int) -> None:
    rows, labels = texts(count, 0)
    found = moments_of(rows, labels, LABELS)
    expected = math.sqrt((found.xx**2).sum() + (found.xy**2).sum()) / count
    vector = analytic.contributed(rows, labels, HEAD, task_of(), ADAPTER)
    assert np.linalg.norm(vector) == pytest.approx(expected)  # the rotation of embeddings keeps it, too
    assert np.linalg.norm(vector) <= math.sqrt(2) + 1e-9
    shorter = analytic.contributed(rows, labels, HEAD, task_of(7), ADAPTER)
    assert shorter.shape == (7 * 8 // 2 + 7 * LABELS,)
    assert np.linalg.norm(shorter) < np.linalg.norm(vector)


def test_the_number_of_examples_counts_for_nothing() -> None:
    rows, labels = texts(5, 1)
    once = analytic.contributed(rows, labels, HEAD, task_of(9), ADAPTER)
    thrice = analytic.contributed(np.tile(rows, (3, 1)), np.tile(labels, 3), HEAD, task_of(9), ADAPTER)
    np.testing.assert_allclose(once, thrice, atol=1e-12)


def test_without_examples_a_device_contributes_zeros() -> None:
    assert not analytic.contributed(*texts(0, 1), HEAD, task_of(9), ADAPTER).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_makes_no_contribution(value: float) -> None:
    with refused(DataError, "embeddings"):
        analytic.contributed(np.full((2, HIDDEN), value), np.zeros(2, np.int64), HEAD, task_of(9), ADAPTER)


def test_with_little_noise_the_head_is_a_ridge_regression_on_the_mean_moments() -> None:
    task = task_of()
    spec = spec_of(task, 1e-5)
    head = analytic.noisy_solved(spec, task, BEFORE, summed(spec, task), DEVICES, ADAPTER)
    xx, xy = np.zeros((HIDDEN, HIDDEN)), np.zeros((HIDDEN, LABELS))
    for device in range(DEVICES):
        found = moments_of(*texts(12, device), LABELS)
        norm = math.sqrt((found.xx**2).sum() + (found.xy**2).sum()) / found.weight
        share = min(1.0, CLIP / norm) / found.weight
        xx, xy = xx + share * found.xx, xy + share * found.xy
    strength = 1e-6 * DEVICES + 1e-5 * math.sqrt(DEVICES * HIDDEN / 2)
    expected = 16.0 * np.linalg.solve(xx + strength * np.eye(HIDDEN), xy).T
    np.testing.assert_allclose(head["classifier.weight"], expected, atol=0.02 * np.abs(expected).max())


def test_the_eigenvalues_of_the_noise_fill_the_semicircle_that_sets_the_strength() -> None:
    task, deviation = task_of(), 0.05
    spec = spec_of(task, deviation)
    flat = rotation.rotate_back(summed(spec, task, empty=True)["moments"], rotation.seed(ADAPTER))
    weights = np.where(np.eye(HIDDEN)[np.triu_indices(HIDDEN)] > 0, 1.0, math.sqrt(2))
    values = np.linalg.eigvalsh(unpack(flat[: packed_size(HIDDEN)] / weights, HIDDEN))
    radius = deviation * math.sqrt(DEVICES) * math.sqrt(2 * HIDDEN)
    assert 0.93 < math.sqrt(float((values**2).mean())) / (radius / 2) < 1.07
    assert 0.8 < np.abs(values).max() / radius < 1.15


def test_a_head_that_does_not_allow_for_the_noise_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of()
    spec = spec_of(task, 0.1)
    sums = summed(spec, task)
    allowed = accuracy(analytic.noisy_solved(spec, task, BEFORE, sums, DEVICES, ADAPTER))
    bare = analytic.refit
    monkeypatch.setattr(analytic, "refit", lambda *given, **named: bare(*given, **{**named, "strength": 1e-4}))
    monkeypatch.setattr(analytic, "positive_part", lambda matrix: matrix)
    assert accuracy(analytic.noisy_solved(spec, task, BEFORE, sums, DEVICES, ADAPTER)) < allowed - 0.05
    assert allowed > 0.5


@pytest.mark.parametrize(("deviation", "times"), [(0.02, 1.0), (0.1, 0.1 * math.sqrt(DEVICES) / CLIP)])
def test_noise_longer_than_a_contribution_has_a_strength_in_proportion_to_its_variance(
    deviation: float, times: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, used, bare = task_of(), [], analytic.refit

    def noted(*given: Any, strength: float, scale: float) -> Tensors:
        used.append(strength)
        return bare(*given, strength=strength, scale=scale)

    monkeypatch.setattr(analytic, "refit", noted)
    spec = spec_of(task, deviation)
    analytic.noisy_solved(spec, task, BEFORE, summed(spec, task), DEVICES, ADAPTER)
    expected = 1e-6 * DEVICES + times * deviation * math.sqrt(DEVICES * HIDDEN / 2)
    assert used == [pytest.approx(expected, rel=1e-3)]  # the ring rounds the noise


def test_a_good_head_is_not_lost_to_noise_that_drowns_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    task, spec = task_of(), spec_of(task_of(), 0.3)
    good = BEFORE | {"classifier.weight": (2 * CENTERS).astype(np.float32)}
    sums, bare = summed(spec, task), analytic.refit
    assert accuracy(analytic.noisy_solved(spec, task, good, sums, DEVICES, ADAPTER)) > accuracy(good) - 0.05
    weak = 0.3 * math.sqrt(DEVICES * HIDDEN / 2)
    monkeypatch.setattr(analytic, "refit", lambda *given, **named: bare(*given, **{**named, "strength": weak}))
    assert accuracy(analytic.noisy_solved(spec, task, good, sums, DEVICES, ADAPTER)) < accuracy(good) - 0.05


def test_directions_that_were_not_kept_do_not_change() -> None:
    task, seed = task_of(11), rotation.seed(ADAPTER)
    before = BEFORE | {"classifier.weight": np.random.default_rng(0).normal(size=(LABELS, HIDDEN)).astype(np.float32)}
    spec = spec_of(task, 0.01)
    after = analytic.noisy_solved(spec, task, before, summed(spec, task), DEVICES, ADAPTER)
    moved = after["classifier.weight"].astype(np.float64) - before["classifier.weight"]
    rotated = np.array([rotation.rotate(row, seed) for row in moved])
    assert np.abs(rotated[:, 11:]).max() < 0.1  # the noise that hides nothing, and rounding
    assert np.abs(rotated[:, :11]).max() > 1


def test_a_sum_that_counts_as_zero_changes_the_head_by_small_noise_alone() -> None:
    task, before = task_of(11), BEFORE | {"classifier.weight": np.ones((LABELS, HIDDEN), np.float32)}
    spec = spec_of(task, 0.01)
    after = analytic.noisy_solved(spec, task, before, spec.vector.zeros(), DEVICES, ADAPTER)
    assert 0 < np.abs(after["classifier.weight"] - 1).max() < 0.1


def test_sums_of_another_size_and_sums_out_of_reach_make_no_head() -> None:
    task = task_of(11)
    spec = spec_of(task, 0.01)
    sums = summed(spec, task)
    with refused(DataError, "vector.segments"):
        analytic.noisy_solved(spec, task_of(12), BEFORE, sums, DEVICES, ADAPTER)
    with refused(DataError, "vector.moments"):
        analytic.noisy_solved(spec, task, BEFORE, {"moments": 1e3 * sums["moments"]}, DEVICES, ADAPTER)
