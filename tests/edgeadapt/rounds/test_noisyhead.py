"""The analytic head with noise: what a device's examples correct, and a step of the head that allows for the noise."""

import math
from typing import Any

import numpy as np
import pytest

from aggregation.errors import DataError
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Privacy, SessionSpec
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds import analytic
from edgeadapt.rounds.analytic import CALM, EVEN, FLOOR, LEAST_DAMPING, NOISE, AnalyticTask
from edgeadapt.rounds.ridge import Matrix
from edgeadapt.rounds.sums import UNIFORMS, Bounds, noisy_vector
from tests.support import refused
from tests.support.fleet import session_spec

HIDDEN, LABELS, DEVICES, CLIP, ADAPTER = 40, 4, 60, 0.3, b"a" * 32
BEFORE: Tensors = {
    "classifier.weight": np.zeros((LABELS, HIDDEN), np.float32),
    "classifier.bias": np.zeros(LABELS, np.float32),
}
CENTERS = np.random.default_rng(5).standard_normal((LABELS, HIDDEN))
GOOD: Tensors = BEFORE | {"classifier.weight": (2 * CENTERS).astype(np.float32)}
# As a vendor's that has seen few phrases.
START = (2 * CENTERS + 4 * np.random.default_rng(6).standard_normal((LABELS, HIDDEN))).astype(np.float32)


def task_of(**changes: Any) -> AnalyticTask:
    fields = {"ridge": "gcv", "scale": 8.0} | changes
    return AnalyticTask(PeftConfig("LORA", 2, 4, ("query",)), tuple("abcd"), **fields)


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


def mean_of(device: int, before: Tensors = BEFORE) -> Matrix:
    return analytic.contributed(*texts(12, device), before)


def summed(spec: SessionSpec, before: Tensors = BEFORE, *, empty: bool = False) -> dict[str, Any]:
    """The sum over all devices, as it is decoded."""
    total = np.zeros(spec.vector.size, np.uint32)
    for device in range(DEVICES):
        found = analytic.contributed(*texts(0 if empty else 12, device), before)
        total += noisy_vector(found, spec, ADAPTER, np.random.default_rng(device), bytes([device]) * 32)
    return spec.vector.decode(total, DEVICES)


def accuracy(tensors: Tensors) -> float:
    rows, labels = texts(4000, 999)
    return float((np.argmax(rows @ tensors["classifier.weight"].T, axis=1) == labels).mean())


def solved(deviation: float, before: Tensors = BEFORE, **changes: Any) -> Tensors:
    task = task_of(**changes)
    spec = spec_of(task, deviation)
    return analytic.noisy_solved(spec, task, before, summed(spec, before), DEVICES, ADAPTER)


def covariance_of(weight: Matrix) -> Matrix:
    rows = weight.astype(float)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return (1 - EVEN) / len(rows) * unit.T @ unit + EVEN / HIDDEN * np.eye(HIDDEN)


def test_the_spread_of_texts_is_that_of_the_rows_of_the_head_and_a_part_in_all_directions() -> None:
    found = analytic.spread(GOOD["classifier.weight"])
    np.testing.assert_allclose(found, covariance_of(GOOD["classifier.weight"]), atol=1e-12)
    assert np.trace(found) == pytest.approx(1)
    np.testing.assert_allclose(analytic.spread(np.zeros((LABELS, HIDDEN))), EVEN / HIDDEN * np.eye(HIDDEN))


def test_a_contribution_is_what_the_head_gets_wrong_where_texts_are_spread_evenly() -> None:
    rows, labels = texts(12, 0)
    logits = rows @ GOOD["classifier.weight"].T.astype(float) + GOOD["classifier.bias"]
    powers = np.exp(logits)
    wrong = np.eye(LABELS)[labels] - powers / powers.sum(axis=1, keepdims=True)
    lower = np.linalg.cholesky(covariance_of(GOOD["classifier.weight"]) + FLOOR * np.eye(HIDDEN))
    expected = np.linalg.solve(lower, rows.T @ wrong / 12)
    np.testing.assert_allclose(analytic.contributed(3 * rows, labels, GOOD).reshape(HIDDEN, LABELS), expected)


def test_a_head_that_is_right_leaves_next_to_nothing_to_contribute() -> None:
    sure = GOOD | {"classifier.weight": 100 * GOOD["classifier.weight"]}
    rows = CENTERS / np.linalg.norm(CENTERS, axis=1, keepdims=True)
    found = [np.linalg.norm(analytic.contributed(rows, np.arange(LABELS), head)) for head in (BEFORE, sure)]
    assert found[1] < 1e-3 * found[0]


def test_the_number_of_examples_counts_for_nothing() -> None:
    rows, labels = texts(5, 1)
    once = analytic.contributed(rows, labels, GOOD)
    thrice = analytic.contributed(np.tile(rows, (3, 1)), np.tile(labels, 3), GOOD)
    np.testing.assert_allclose(once, thrice, atol=1e-12)


def test_without_examples_a_device_contributes_zeros() -> None:
    found = analytic.contributed(*texts(0, 1), GOOD)
    assert (found.shape, found.any()) == ((HIDDEN * LABELS,), False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_embedding_that_is_not_finite_makes_no_contribution(value: float) -> None:
    with refused(DataError, "embeddings"):
        analytic.contributed(np.full((2, HIDDEN), value), np.zeros(2, np.int64), GOOD)


def test_a_head_that_is_not_finite_makes_no_contribution() -> None:
    odd = GOOD | {"classifier.weight": np.full((LABELS, HIDDEN), np.nan, np.float32)}
    with refused(DataError, "classifier.weight"):
        analytic.contributed(*texts(2, 1), odd)


def test_with_little_noise_the_head_moves_by_a_newton_step_on_the_mean_of_the_clipped_contributions() -> None:
    after = solved(1e-5, GOOD)["classifier.weight"]
    covariance = covariance_of(GOOD["classifier.weight"])
    lower = np.linalg.cholesky(covariance + FLOOR * np.eye(HIDDEN))
    clipped = [each * min(1, CLIP / np.linalg.norm(each)) for each in (mean_of(k, GOOD) for k in range(DEVICES))]
    mean = np.mean(clipped, axis=0).reshape(HIDDEN, LABELS)
    step = np.linalg.solve(covariance + LEAST_DAMPING * np.eye(HIDDEN), lower @ mean)
    moved = after - GOOD["classifier.weight"]
    assert np.abs(moved).max() > 0.5
    np.testing.assert_allclose(moved, 8.0 * step.T, atol=8.0 * NOISE * UNIFORMS / 2)  # what hides nothing


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.02, 0.3, 7.0])
def test_the_damping_is_the_least_with_which_the_noise_in_a_score_is_calm(noise: float) -> None:
    covariance = covariance_of(GOOD["classifier.weight"])
    lower = np.linalg.cholesky(covariance + FLOOR * np.eye(HIDDEN))

    def deviation(damping: float) -> float:
        """Of the score of texts that are spread as the covariance says, by drawn noise."""
        drawn = noise * np.random.default_rng(0).standard_normal((HIDDEN, 4000))
        step = np.linalg.solve(covariance + damping * np.eye(HIDDEN), lower @ drawn)
        return math.sqrt(float(np.einsum("ik,ij,jk->k", step, covariance, step).mean()))

    found = analytic.damping(covariance, noise)
    at = analytic.DAMPINGS.index(found)
    assert deviation(found) < 1.03 * CALM
    assert at == 0 or deviation(analytic.DAMPINGS[at - 1]) > 0.97 * CALM


def test_noise_beyond_all_dampings_leaves_the_head() -> None:
    assert analytic.damping(covariance_of(GOOD["classifier.weight"]), math.inf) == analytic.DAMPINGS[-1]


@pytest.mark.parametrize("least", [0.001, 0.3])
def test_a_number_as_ridge_is_the_least_damping(least: float) -> None:
    moved = [np.linalg.norm(solved(1e-5, GOOD, ridge=ridge)["classifier.weight"]) for ridge in ("gcv", least)]
    assert (moved[0] == pytest.approx(moved[1], abs=1e-6)) == (least == 0.001)


def test_a_step_that_does_not_allow_for_the_noise_is_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {**GOOD, "classifier.weight": START}
    allowed = accuracy(solved(0.5, before))
    assert allowed > accuracy(before) - 0.01
    monkeypatch.setattr(analytic, "damping", lambda covariance, noise: LEAST_DAMPING)
    assert accuracy(solved(0.5, before)) < allowed - 0.05


def test_a_sum_makes_a_poor_head_better_and_noise_that_drowns_it_does_not_lose_it() -> None:
    before = {**GOOD, "classifier.weight": START}
    assert accuracy(solved(0.02, before)) > accuracy(before) + 0.05
    assert accuracy(solved(30.0, before)) > accuracy(before) - 0.02


def test_a_sum_that_counts_as_zero_changes_the_head_by_small_noise_alone() -> None:
    task = task_of()
    spec = spec_of(task, 0.01)
    after = analytic.noisy_solved(spec, task, GOOD, spec.vector.zeros(), DEVICES, ADAPTER)
    assert 0 < np.abs(after["classifier.weight"] - GOOD["classifier.weight"]).max() < 0.1


def test_sums_of_another_size_and_sums_out_of_reach_make_no_head() -> None:
    task = task_of()
    spec = spec_of(task, 0.01)
    sums, narrow = summed(spec), {**GOOD, "classifier.weight": GOOD["classifier.weight"][:, :-1]}
    with refused(DataError, "vector.segments"):
        analytic.noisy_solved(spec, task, narrow, sums, DEVICES, ADAPTER)
    with refused(DataError, "vector.corrections"):
        analytic.noisy_solved(spec, task, BEFORE, {"corrections": 1e3 * sums["corrections"]}, DEVICES, ADAPTER)
