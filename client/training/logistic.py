"""Linear heads with the least loss on embeddings, by L-BFGS in NumPy: a device that answers has no library for it."""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import DataError

Matrix = NDArray[np.float64]
# Outputs, shape (rows, outputs), and targets → the loss of each row, and its gradient by each output.
Loss = Callable[[Matrix, NDArray[Any]], tuple[Matrix, Matrix]]

MOST_ITERATIONS = 200
FLATNESS = 1e-3  # largest coordinate of a gradient that is taken for zero
REMEMBERED = 10  # steps from which the curvature is estimated
LEAST_DECREASE = 1e-4  # share of what the gradient promises that a step must bring (Armijo)
SHORTEST = 2.0**-40  # share of a step below which no shorter one is tried


def cross_entropy(outputs: Matrix, labels: NDArray[Any]) -> tuple[Matrix, Matrix]:
    """Compute the loss of each row in nats, and its gradient. ``labels`` are numbers of columns."""
    rows = np.arange(len(outputs))
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    totals = exponentials.sum(axis=1)
    gradient = exponentials / totals[:, None]
    gradient[rows, labels] -= 1
    return np.log(totals) - shifted[rows, labels], gradient


def with_constant(embeddings: NDArray[np.floating]) -> Matrix:
    """Append a 1 to embeddings: shape ``(texts, hidden)`` to ``(texts, hidden + 1)``, in float64."""
    return np.concatenate([embeddings.astype(np.float64), np.ones((len(embeddings), 1))], axis=1)


def logistic_head(  # two of them by name
    x: Matrix,
    labels: NDArray[Any],
    weights: Matrix,
    count: int,
    penalty: float,
    *,
    prior: Matrix | None = None,
    loss_of: Loss = cross_entropy,
) -> Matrix:
    """Return the head of multinomial logistic regression: argmin of Σ wᵢ lossᵢ + penalty / 2 ‖W - prior‖².

    With a convex loss the problem is strictly convex, and it starts at the prior, by default zeros: equal arguments
    give equal heads on one machine.

    Returns shape ``(features, count)``. Raises DataError if the loss is not finite. ``x``: shape ``(rows, features)``.
    A constant feature makes a bias. ``labels``: the number of each row's label, or what another loss takes.
    ``penalty``: above 0."""

    start = np.zeros(x.shape[1] * count) if prior is None else prior.ravel()

    def objective(flat: Matrix) -> tuple[float, Matrix]:
        losses, by_output = loss_of(x @ flat.reshape(x.shape[1], count), labels)
        change = flat - start
        total = float(weights @ losses) + penalty / 2 * _dot(change, change)
        return total, (x.T @ (weights[:, None] * by_output)).ravel() + penalty * change

    return minimized(objective, start).reshape(x.shape[1], count)


def minimized(objective: Callable[[Matrix], tuple[float, Matrix]], start: Matrix) -> Matrix:
    """Minimize a smooth function by L-BFGS (Nocedal and Wright 2006, algorithm 7.5), with steps by Armijo's rule.
    ``objective`` gives value and gradient. Ends after ``MOST_ITERATIONS``, or where the gradient is flat or no step
    helps. Raises DataError if the value at the start is not finite."""
    at, (value, gradient) = start, objective(start)
    if not np.isfinite(value):
        raise DataError("the loss of the logistic head is not finite", about="training.loss")
    pairs: deque[tuple[Matrix, Matrix, float]] = deque(maxlen=REMEMBERED)  # steps, changes of the gradient, 1 / product
    for _ in range(MOST_ITERATIONS):
        if np.abs(gradient).max(initial=0.0) <= FLATNESS:
            break
        direction = _direction(gradient, pairs)
        slope, share = _dot(gradient, direction), 1.0
        while True:
            after = at + share * direction
            value_after, gradient_after = objective(after)
            if value_after <= value + LEAST_DECREASE * share * slope:
                break
            share /= 2
            if share < SHORTEST:
                return at
        step, change = after - at, gradient_after - gradient
        if (product := _dot(step, change)) > 0:
            pairs.append((step, change, 1 / product))
        at, value, gradient = after, value_after, gradient_after
    return at


def _direction(gradient: Matrix, pairs: "deque[tuple[Matrix, Matrix, float]]") -> Matrix:
    """Multiply the negative gradient by the estimate of the inverse Hessian (algorithm 7.4)."""
    if not pairs:
        first: Matrix = -gradient / max(_dot(gradient, gradient) ** 0.5, 1.0)
        return first
    direction, factors = -gradient, []
    for step, change, inverse in reversed(pairs):
        factors.append(inverse * _dot(step, direction))
        direction = direction - factors[-1] * change
    _, change, inverse = pairs[-1]
    direction = direction / (inverse * _dot(change, change))
    for (step, change, inverse), factor in zip(pairs, reversed(factors), strict=True):
        direction = direction + (factor - inverse * _dot(change, direction)) * step
    return direction


def _dot(one: Matrix, other: Matrix) -> float:
    """Return Σ a b in this thread: a library that starts others waits longer for them than it takes."""
    return float(np.einsum("i,i", one, other))
