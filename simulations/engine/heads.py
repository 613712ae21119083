"""Linear heads on frozen embeddings: least squares and logistic regression, each with an L2 penalty and weights."""

import numpy as np
import torch
from numpy.typing import NDArray

from aggregation.errors import DataError

MOST_ITERATIONS = 200  # of L-BFGS; it stops before where the gradient is small
FLATNESS = 1e-6  # largest coordinate of a gradient that is taken for zero

Matrix = NDArray[np.float64]


def with_bias(embeddings: NDArray[np.float32]) -> Matrix:
    """Embeddings with a 1 appended: shape ``(texts, hidden)`` to ``(texts, hidden + 1)``, in float64."""
    return np.concatenate([embeddings.astype(np.float64), np.ones((len(embeddings), 1))], axis=1)


def ridge_head(x: Matrix, labels: NDArray[np.int64], weights: Matrix, count: int, penalty: float) -> Matrix:
    """The head that least squares gives: argmin of Σ wᵢ ‖xᵢ W - yᵢ‖² + penalty ‖W‖², with one-hot y.

    It needs Σ w x xᵀ and Σ w x yᵀ only, which add up over clients (Hoerl and Kennard 1970, "Ridge Regression").

    Args:
        x: Shape ``(texts, features)``, with a row for each of ``labels`` and of ``weights``, which are not negative.
        count: Labels in all; the head has the shape ``(features, count)``.
        penalty: Positive, so that there is one solution.
    """
    weighted = x * weights[:, None]
    moments = weighted.T @ x + penalty * np.eye(x.shape[1])
    return np.linalg.solve(moments, weighted.T @ np.eye(count)[labels]).astype(np.float64)


def logistic_head(x: Matrix, labels: NDArray[np.int64], weights: Matrix, count: int, penalty: float) -> Matrix:
    """The head of multinomial logistic regression: argmin of Σ wᵢ crossentropyᵢ + penalty / 2 ‖W‖².

    The problem is strictly convex, and L-BFGS with a strong Wolfe line search starts at zero: equal arguments, which
    are those of ``ridge_head``, give equal heads.

    Raises:
        DataError: The loss is not finite.
    """
    inputs, targets, each = torch.from_numpy(x), torch.from_numpy(labels), torch.from_numpy(weights)
    head = torch.zeros((x.shape[1], count), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [head], max_iter=MOST_ITERATIONS, tolerance_grad=FLATNESS, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = torch.nn.functional.cross_entropy(inputs @ head, targets, reduction="none")
        loss = (each * losses).sum() + penalty / 2 * head.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    loss = optimizer.step(closure)  # type: ignore[no-untyped-call]
    if not torch.isfinite(loss):
        raise DataError("the loss of the logistic head is not finite", about="training.loss")
    fitted: Matrix = head.detach().numpy()
    return fitted
