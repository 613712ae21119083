"""A temperature is the one that examples were drawn with, and the calibration error is measured on other examples."""

import numpy as np
import pytest

from edgeadapt.formats.calibration import FOLDS, PRIOR, Labels, calibrate, confidences, expected_calibration_error, fit
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.manifest import MAX_TEMPERATURE, MIN_TEMPERATURE


def probabilities(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Floats = weights / weights.sum(axis=1, keepdims=True)
    return result


def drawn(temperature: float, count: int, seed: int = 0, labels: int = 6) -> tuple[Floats, Labels]:
    """Logits, and labels whose probabilities are those of the logits at this temperature."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((count, labels))).astype(np.float32)
    return logits, np.array([rng.choice(labels, p=p / p.sum()) for p in probabilities(logits / temperature)])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_of_many_examples_is_the_one_that_they_were_drawn_with(temperature: float) -> None:
    assert fit(*drawn(temperature, 4000)) == pytest.approx(temperature, rel=0.06)


@pytest.mark.parametrize(("count", "start"), [(1, 1.0), (20, 1.0), (20, 3.0), (200, 0.5)])
def test_no_other_temperature_has_a_smaller_loss(count: int, start: float) -> None:
    logits, labels = drawn(1.8, count)

    def objective(temperature: float) -> float:
        loss = -np.log(probabilities(logits.astype(np.float64) / temperature)[np.arange(count), labels]).sum()
        return float(loss + PRIOR * (start / temperature + np.log(temperature / start)))

    found = fit(logits, labels, start)
    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 2000)
    best = min(grid, key=objective)
    assert found == pytest.approx(best, rel=0.01)
    assert objective(found) <= objective(best) + 1e-6


def test_without_examples_the_temperature_is_the_one_to_start_from() -> None:
    for start in (1.0, 2.2):
        assert fit(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), start) == start


def test_answers_that_are_all_right_or_all_wrong_give_a_temperature_within_the_bounds() -> None:
    logits = np.tile(np.float32([[6, 0, 0]]), (80, 1))
    right, wrong = fit(logits, np.zeros(80, np.int64)), fit(logits, np.ones(80, np.int64))
    assert MIN_TEMPERATURE < right < 1
    assert 1 < wrong <= MAX_TEMPERATURE
    # Without the prior the first would be 0: nothing is as likely as to be always certain.
    assert confidences(logits[:1] / np.float32(right))[0] < 0.9999999


def test_confidences_are_those_of_the_softmax_also_for_large_logits() -> None:
    logits = drawn(1.0, 50)[0]
    np.testing.assert_allclose(confidences(logits), probabilities(logits).max(axis=1), rtol=1e-6)
    assert confidences(np.float32([[10_000, 10_000]])).tolist() == [0.5]


def test_the_calibration_error_is_the_mean_difference_of_accuracy_and_confidence_over_bins() -> None:
    # Two bins of two: confidences .5 and .5, of which one is right; .9 and .9, of which none is.
    even, sure = [0.0, 0.0], [float(np.log(9)), 0.0]
    logits = np.array([even, sure, even, sure], np.float32)
    assert expected_calibration_error(logits, np.array([0, 1, 1, 1]), bins=2) == pytest.approx((0 + 0.9) / 2)
    assert expected_calibration_error(logits, np.array([0, 1, 0, 1]), bins=2) == pytest.approx((0.5 + 0.9) / 2)
    assert expected_calibration_error(logits[:1], np.array([0])) == pytest.approx(0.5)


def test_examples_drawn_from_their_probabilities_have_a_small_error_and_others_a_large_one() -> None:
    assert expected_calibration_error(*drawn(1.0, 5000)) < 0.025
    assert expected_calibration_error(*drawn(3.0, 5000)) > 0.2


def test_a_temperature_is_measured_on_examples_that_it_was_not_fitted_on() -> None:
    logits, labels = drawn(3.0, 400)
    found = calibrate(logits, labels)
    assert (found.count, found.correct) == (400, int((logits.argmax(axis=1) == labels).sum()))
    assert found.temperature == fit(logits, labels)
    assert found.before == expected_calibration_error(logits, labels)
    assert found.after < found.before / 2
    # A temperature fitted on the example itself follows its label; one that was not does not.
    few, right = np.float32([[4, 0]] * FOLDS), np.zeros(FOLDS, np.int64)
    wrong = right.copy()
    wrong[0] = 1
    own = expected_calibration_error(few / np.float32(fit(few, wrong)), wrong)
    assert calibrate(few, wrong).after > own


def test_the_order_of_the_examples_does_not_put_a_label_into_one_fold() -> None:
    logits, labels = drawn(2.0, 500, labels=FOLDS)
    turns = np.argsort(np.argsort(labels, kind="stable") % 100, kind="stable")
    for order in (np.argsort(labels, kind="stable"), turns):
        assert calibrate(logits[order], labels[order]).after < calibrate(logits[order], labels[order]).before / 2
