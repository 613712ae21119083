"""One temperature that makes a classifier's probabilities mean what they say (Guo et al. 2017, arXiv:1706.04599).

A device divides the logits by it before the softmax; no answer changes. Guo et al. minimize the negative log likelihood
of held-out examples, which has no minimum or a far too confident one if these are few or all answered right. So a prior
on the inverse temperature weighs as much as a few examples (docs/decisions/0027-calibrated-probabilities.md)."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeadapt.formats.layout import Floats
from edgeadapt.formats.manifest import MAX_TEMPERATURE, MIN_TEMPERATURE

BINS = 15  # Guo et al. 2017
FOLDS = 5
PRIOR = 4.0  # the standard deviation of the inverse temperature is half of its most likely value
STEPS = 60  # halvings of the interval in which the minimum is
DECIMALS = 4  # more would differ from machine to machine
Labels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Holds a temperature, and what it does to examples that it was not fitted on."""

    temperature: float
    count: int  # examples
    correct: int  # of them, answered right
    before: float  # expected calibration error without a temperature
    after: float  # and with it, by cross-validation


def fit(logits: Floats, labels: Labels, start: float = 1.0) -> float:
    """Fit the temperature of held-out examples.

    The objective in the inverse temperature b is ``-log p(labels) + PRIOR * (b / b0 - log(b / b0))``, with b0 the
    inverse of ``start``: a gamma prior whose most likely value is b0. It is convex; bisection finds its minimum.

    Returns:
        From ``MIN_TEMPERATURE`` to ``MAX_TEMPERATURE``, to ``DECIMALS`` decimals.

    ``logits``: shape ``(examples, labels)``; no example gives ``start``. ``start``: the temperature that is most likely
    without examples, such as that of the adapter that was fine-tuned."""
    wide = logits.astype(np.float64)
    right = wide[np.arange(len(wide)), labels]

    def slope(inverse: float) -> float:
        weights = np.exp(inverse * (wide - wide.max(axis=1, keepdims=True)))
        means = (weights * wide).sum(axis=1) / weights.sum(axis=1)
        return float((means - right).sum()) + PRIOR * (start - 1 / inverse)

    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(STEPS if len(wide) else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) > 0 else (middle, high)
    return round(min(max(2 / (low + high) if len(wide) else start, MIN_TEMPERATURE), MAX_TEMPERATURE), DECIMALS)


def expected_calibration_error(logits: Floats, labels: Labels, bins: int = BINS) -> float:
    """Return the mean of |accuracy - confidence| over bins of equal mass, which are less biased than those of equal
    width (Roelofs et al. 2022, arXiv:2012.08668). ``logits``: shape ``(examples, labels)``, divided by their
    temperature; at least one example. ``bins``: at most as many as examples."""
    confident, right = confidences(logits), logits.argmax(axis=1) == labels
    parts = np.array_split(np.argsort(confident, kind="stable"), min(bins, len(confident)))
    return float(sum(abs(right[part].sum() - confident[part].sum()) for part in parts) / len(confident))


def confidences(logits: Floats) -> NDArray[np.float64]:
    """Return the probability of each example's most likely label, shape ``(examples,)``."""
    wide = logits.astype(np.float64)
    result: NDArray[np.float64] = 1 / np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)
    return result


def calibrate(logits: Floats, labels: Labels, start: float = 1.0) -> Calibration:
    """Fit a temperature to all examples, at least ``FOLDS``, and measure the gain on examples that it was not fitted
    on: those of each of ``FOLDS`` random folds, by the temperature of the others. Arguments are those of ``fit``."""
    folds = np.random.default_rng(0).permutation(len(labels)) % FOLDS  # always the same ones
    temperatures = np.array([fit(logits[folds != fold], labels[folds != fold], start) for fold in range(FOLDS)])
    calibrated = (logits / temperatures[folds][:, None]).astype(logits.dtype)
    return Calibration(
        temperature=fit(logits, labels, start),
        count=len(labels),
        correct=int((logits.argmax(axis=1) == labels).sum()),
        before=expected_calibration_error(logits, labels),
        after=expected_calibration_error(calibrated, labels),
    )
