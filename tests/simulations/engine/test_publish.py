"""A personal adapter gets its own temperature from enough phrases only; reliability is that of what is stated; what is
confused is shown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeadapt.bases.sounds import RATE, signal
from export.parity.compare import FEWEST
from simulations.engine.publish import PERSONAL, _confused, _Exported, personal_temperature, reliability

RNG = np.random.default_rng(5)
LOGITS = (3 * RNG.standard_normal((400, 5))).astype(np.float32)
WEIGHTS = np.exp(LOGITS / 3)  # their labels are as probable as the logits say at temperature 3
LABELS = np.array([RNG.choice(5, p=row / row.sum()) for row in WEIGHTS.astype(np.float64)])


@pytest.mark.parametrize("shared", [1.0, 2.0])
def test_a_personal_temperature_is_fitted_to_enough_phrases_and_inherited_with_fewer(shared: float) -> None:
    assert personal_temperature(LOGITS, LABELS, shared) == pytest.approx(3, rel=0.2)
    assert personal_temperature(LOGITS[:FEWEST], LABELS[:FEWEST], shared) != shared
    assert personal_temperature(LOGITS[: FEWEST - 1], LABELS[: FEWEST - 1], shared) == shared
    assert personal_temperature(np.zeros((0, 0), np.float32), LABELS[:0], shared) == shared


def test_reliability_is_measured_with_the_temperature_of_each_answer() -> None:
    uncalibrated = reliability(LOGITS, LABELS, np.ones(400))
    assert uncalibrated.before == uncalibrated.after > 0.2
    calibrated = reliability(LOGITS, LABELS, np.full(400, 3.0))
    assert calibrated.before == uncalibrated.before
    assert calibrated.after < uncalibrated.after / 2
    half = reliability(LOGITS, LABELS, np.where(np.arange(400) < 200, 3.0, 1.0))
    assert calibrated.after < half.after < uncalibrated.after


def test_the_answers_at_ninety_percent_are_counted_and_none_has_no_share() -> None:
    sure = np.float32([[np.log(9), 0], [np.log(9), 0], [np.log(9), 0], [9, 0], [0, 0]])
    found = reliability(sure, np.array([0, 0, 1, 0, 0]), np.ones(5))
    assert (found.near_ninety, found.right_near_ninety) == (3, pytest.approx(2 / 3))
    assert np.isnan(reliability(sure[3:], np.array([0, 0]), np.ones(2)).right_near_ninety)


def answered(logits: list[list[int]], right: list[int], text: str = "data:image/png;base64,") -> Any:
    answers = {PERSONAL: (np.float32(logits), np.array(right), np.ones(len(right), np.float32))}
    texts = [text] * len(right)
    return _Exported(Path(), None, ("<b>coat", "shirt"), answers, {}, None, texts)  # type: ignore[arg-type]


def test_examples_of_what_is_confused_are_in_a_private_page(tmp_path: Path) -> None:
    path = tmp_path / "confused.html"
    assert _confused([answered([[1, 0], [0, 1]], [0, 1])], path) == ""
    assert not path.exists()
    assert _confused([answered([[1, 0], [0, 1], [0, 1]], [0, 0, 0]), answered([[1, 0]], [1])], path) == str(path)
    page = path.read_text()
    assert "&lt;b&gt;coat taken for shirt: 2" in page
    assert "shirt taken for &lt;b&gt;coat: 1" in page
    assert page.count("<img") == 3
    assert "<b>" not in page
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_window_of_sensors_that_is_confused_is_drawn_and_a_sound_is_played(tmp_path: Path) -> None:
    window = signal(np.array([[0, 100], [50, -100], [-50, 100]]), 50)
    path, wrong = tmp_path / "confused.html", ([[1, 0]], [1])
    _confused([answered(*wrong, window), answered(*wrong, signal(np.array([[1], [2]]), RATE))], path)
    page = path.read_text()
    assert (page.count("<polyline"), page.count("<audio")) == (2, 1)
    assert 'points="0.0,2.0 120.0,94.0 240.0,2.0"' in page
    assert 'points="0.0,48.0 120.0,25.0 240.0,71.0"' in page
