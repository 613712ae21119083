"""Each head minimizes what it says, and a weight counts like repetitions."""

from collections.abc import Callable

import numpy as np
import pytest

from client.training.logistic import logistic_head, with_constant
from simulations.engine.provision import Matrix, ridge_head

RNG = np.random.default_rng(3)
X = with_constant(RNG.standard_normal((60, 8)).astype(np.float32))
LABELS = RNG.integers(0, 3, 60)
ONES = np.ones(60)
Head = Callable[..., Matrix]


def squares(head: Matrix, weights: Matrix, penalty: float) -> float:
    errors = ((X @ head - np.eye(4)[LABELS]) ** 2).sum(axis=1)
    return float((weights * errors).sum() + penalty * (head**2).sum())


def logistic(head: Matrix, weights: Matrix, penalty: float) -> float:
    scores = X @ head
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(60), LABELS]
    return float((weights * losses).sum() + penalty / 2 * (head**2).sum())


@pytest.mark.parametrize(("fit", "objective"), [(ridge_head, squares), (logistic_head, logistic)])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_a_head_is_the_minimum_of_its_objective(
    fit: Head, objective: Callable[[Matrix, Matrix, float], float], penalty: float
) -> None:
    weights = RNG.uniform(0.5, 5, 60)
    best = fit(X, LABELS, weights, 4, penalty)
    assert best.shape == (9, 4)
    least = objective(best, weights, penalty)
    for _ in range(50):
        assert objective(best + 0.01 * RNG.standard_normal(best.shape), weights, penalty) > least
    assert objective(best, weights, penalty) < objective(fit(X, LABELS, weights, 4, 3 * penalty), weights, penalty)


@pytest.mark.parametrize("fit", [ridge_head, logistic_head])
def test_a_weight_counts_like_repetitions_and_equal_inputs_give_equal_heads(fit: Head) -> None:
    repeated = np.concatenate([np.arange(60), np.arange(10), np.arange(10)])
    weighted = fit(X, LABELS, np.where(np.arange(60) < 10, 3.0, 1.0), 3, 0.5)
    assert fit(X[repeated], LABELS[repeated], np.ones(80), 3, 0.5) == pytest.approx(weighted, abs=1e-5)
    assert (fit(X, LABELS, ONES, 3, 0.5) == fit(X, LABELS, ONES, 3, 0.5)).all()
