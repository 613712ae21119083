"""Ridge regression on unit embeddings, from two sums that add up over devices: its moments and its solution.

The linear head that a ridge regression fits to embeddings x and one-hot labels y depends on nothing but S = Σ x xᵀ and
T = Σ x yᵀ. So a sum of these two over devices gives the head that all their examples together would give, exactly and
at once (AFL: He et al. 2025, "Analytic Federated Learning"). No constant is appended to x: its products with y would be
the number of examples of each label. ``edgeadapt.rounds.analytic`` says how the sums travel."""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import DataError

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
# Strengths for each example that ``cross_validated`` chooses from, the largest first: 1 to 1e-5 by quarter decades.
# Literals, because a power differs between C libraries.
QUARTERS = (1.0, 0.5623413251903491, 0.31622776601683794, 0.1778279410038923)
STRENGTHS: tuple[float, ...] = (*(quarter / 10**decade for decade in range(5) for quarter in QUARTERS), 1e-5)
_SMALLEST_MEAN = 2.0**-30  # of squared errors; less is rounding
_INFLATION = 1.4  # of dof: with 1, one strength in some is far too low (Kim and Gu 2004)
_LEAST_FREEDOM = 1 / 3  # 1 - 1.4 dof / W


@dataclass(frozen=True, slots=True, eq=False)
class EmbeddingMoments:
    """Holds the sums of some examples with embeddings of ``d`` numbers and ``k`` labels. ``xx``: Σ x xᵀ, shape ``(d,
    d)``, symmetric. Honest ones are positive semidefinite, with a trace of ``weight``. ``xy``: Σ x yᵀ, shape ``(d,
    k)``. The sum of its columns is Σ x. ``weight``: number of examples."""

    xx: Matrix
    xy: Matrix
    weight: float


def moments_of(embeddings: NDArray[np.floating], labels: NDArray[np.integer], count: int) -> EmbeddingMoments:
    """Sum the moments of examples.

    Args:
        embeddings: Shape ``(n, d)``, finite. Scaled to L2 norm 1 here; a row of zeros stays one.
        labels: Shape ``(n,)``, each at least 0 and below ``count``.

    Returns:
        Guarantee: no entry of ``xx`` and ``xy`` exceeds n in absolute value. Law: up to rounding, those of two sets of
        examples add up to those of both together, whatever their order.

    Raises:
        DataError: A number is not finite.

    >>> found = moments_of(np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([1, 0]), 2)
    >>> found.xx.round(2).tolist(), found.xy.round(2).tolist(), found.weight
    ([[0.36, 0.48], [0.48, 1.64]], [[0.0, 0.6], [1.0, 0.8]], 2.0)
    """
    return moments_of_rows(unit_rows(embeddings), labels, count)


def unit_rows(embeddings: NDArray[np.floating]) -> Matrix:
    """Scale embeddings of shape ``(n, d)`` to L2 norm 1; a row of zeros stays one. Raises DataError if not finite."""
    rows = embeddings.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(lengths).all():
        raise DataError("an embedding is not finite: the base or its adapter overflows", about="embeddings")
    return rows / np.where(lengths > 0, lengths, 1.0)


def moments_of_rows(rows: Matrix, labels: NDArray[np.integer], count: int) -> EmbeddingMoments:
    """Sum the moments of rows that have norm 1 at most already, as ``moments_of`` does."""
    targets = np.zeros((len(rows), count))
    targets[np.arange(len(rows)), labels] = 1.0
    most = float(len(rows))  # rounding could take a sum of equal rows past it, which the codec would refuse
    xx, xy = np.clip(rows.T @ rows, -most, most), np.clip(rows.T @ targets, -most, most)
    return EmbeddingMoments((xx + xx.T) / 2, xy, most)


def pack(symmetric: Matrix) -> Vector:
    """Return the upper triangle of a symmetric matrix, row by row: shape ``(packed_size(d),)``.

    Law: ``unpack(pack(a), d)`` equals ``a``, bit for bit.

    >>> pack(np.array([[1.0, 2.0], [2.0, 3.0]])).tolist()
    [1.0, 2.0, 3.0]
    """
    packed: Vector = symmetric[np.triu_indices(len(symmetric))]
    return packed


def unpack(packed: Vector, d: int) -> Matrix:
    """Return the symmetric matrix of shape ``(d, d)`` with the upper triangle ``packed``."""
    matrix = np.zeros((d, d))
    matrix[np.triu_indices(d)] = packed
    return matrix + np.triu(matrix, 1).T


def packed_size(d: int) -> int:
    """Count the numbers in the upper triangle of a matrix of shape ``(d, d)``."""
    return d * (d + 1) // 2


def ridge(moments: EmbeddingMoments, prior: Matrix, strength: float) -> Matrix:
    """Return the head H that minimizes Σ ‖xᵀ H - y‖² + strength · ‖H - prior‖².

    With a prior of zeros this is plain ridge regression. With the head of another task or of all devices, it is biased
    regularization (Kuzborskij and Orabona 2013, "Stability and Hypothesis Transfer Learning"), by which a device
    adapts a shared head to its own examples.

    Args:
        moments: ``xx`` may lack a little to being semidefinite, from the rounding of a sum; then ``strength`` is
            doubled until the equations have a solution.
        prior: Shape ``(d, k)``.
        strength: As many examples as the prior counts for in each direction; above 0.

    Returns:
        Shape ``(d, k)``. Guarantee: equal arguments give equal bits on every machine, because only operations whose
        result IEEE 754 defines are used, in a fixed order.

    Raises DataError: ``xx`` is far from semidefinite, or a number is not finite."""
    while strength <= 2.0**64:
        if (lower := cholesky(moments.xx, strength)) is not None:
            return solve(lower, moments.xy + strength * prior)
        strength *= 2.0
    raise DataError("the second moments are not those of embeddings", about="moments.xx")


def cross_validated(moments: EmbeddingMoments) -> float:
    """Return the strength of the plain ridge regression with the least error by generalized cross-validation, without
    an example.

    The score of a strength λ is (RSS / W) / (1 - 1.4 dof / W)² with the residual sum of squares RSS, W examples and
    dof = tr(S (S + λ I)⁻¹) degrees of freedom. With 1 instead of 1.4 it estimates the error on the examples, each left
    out once (Golub, Heath and Wahba 1979); the factor keeps it from nearly interpolating them (Kim and Gu 2004,
    "Smoothing spline Gaussian regression: more scalable computation via efficient approximation"). A prior has no part
    in it: one that was trained on the same examples fits them too well, and would get too high a strength. From the
    largest on, whole decades of ``STRENGTHS`` times W are tried as long as the score falls, because a second minimum
    among small ones is chance; then halves and quarters of one around the best. A strength with 1.4 dof above 2 W / 3
    is not a candidate.

    Returns:
        A positive, finite number, whatever the moments are; the largest of equally good ones. Guarantee as of
        ``ridge``: equal bits on every machine. It takes 0.8 s for d = 384, 6 s for 768.
    """
    weight = moments.weight

    @cache
    def score(place: int) -> float:
        strength = STRENGTHS[place] * weight
        if (lower := cholesky(moments.xx, strength)) is None:
            return math.inf
        half = forward(lower, moments.xy)
        head, inverse = _back(lower, half), _inverse(lower)
        error = max((weight - _inner(half, half) - strength * _inner(head, head)) / weight, _SMALLEST_MEAN)
        freedom = 1 - _INFLATION * (len(lower) - strength * _inner(inverse, inverse)) / weight
        return error / (freedom * freedom) if _LEAST_FREEDOM <= freedom <= 1 and math.isfinite(error) else math.inf

    with np.errstate(all="ignore"):
        best = 0
        while best + 4 < len(STRENGTHS) and score(best + 4) < score(best):
            best += 4
        for step in (2, 1):
            places = (best, best - step, best + step)
            best = min((place for place in places if 0 <= place < len(STRENGTHS)), key=score)
    return STRENGTHS[best] * weight


def cholesky(symmetric: Matrix, shift: float = 0.0) -> Matrix | None:
    """Return the lower triangle L with L Lᵀ = symmetric + shift · I, ``(d, d)``; None if that is not positive definite.
    LAPACK's result depends on the processor and the number of threads; this one does not (see ``ridge``). It takes 30
    ms for d = 384."""
    left = symmetric.copy()
    left[np.diag_indices_from(left)] += shift
    lower = np.zeros_like(left)
    for j in range(len(left)):
        pivot = left[j, j]
        if not (pivot > 0 and np.isfinite(pivot)):
            return None
        column = left[j:, j] / np.sqrt(pivot)
        lower[j:, j] = column
        left[j + 1 :, j + 1 :] -= column[1:, None] * column[None, 1:]
    return lower


def forward(lower: Matrix, right: Matrix) -> Matrix:
    """Solve L Z = right, shape ``(d, k)``, for a lower triangle L of shape ``(d, d)``."""
    left = right.copy()
    for j in range(len(lower)):
        left[j] /= lower[j, j]
        left[j + 1 :] -= lower[j + 1 :, j, None] * left[None, j]
    return left


def solve(lower: Matrix, right: Matrix) -> Matrix:
    """Solve L Lᵀ Z = right, shape ``(d, k)``, for a lower triangle L of shape ``(d, d)``."""
    return _back(lower, forward(lower, right))


def traces_of_inverse(lower: Matrix) -> tuple[float, float]:
    """Return the traces of A⁻¹ and A⁻² for A = L Lᵀ, added up in a fixed order.

    >>> traces_of_inverse(np.diag([1.0, 2.0]))
    (1.25, 1.0625)
    """
    inverse = _inverse(lower)
    squared = _back(lower, inverse)
    return _inner(inverse, inverse), _inner(squared, squared)


def multiplied(left: Matrix, right: Matrix) -> Matrix:
    """Return the product of two matrices, to the same bits on every machine, which a library's is not."""
    total = np.zeros((len(left), right.shape[1]))
    for column, row in zip(left.T, right, strict=True):
        total += column[:, None] * row[None, :]
    return total


def _back(lower: Matrix, right: Matrix) -> Matrix:
    left = right.copy()
    for j in range(len(lower) - 1, -1, -1):
        left[j] /= lower[j, j]
        left[:j] -= lower[j, :j, None] * left[None, j]
    return left


def _inverse(lower: Matrix) -> Matrix:
    """Return L⁻¹, as ``forward(lower, I)`` in half the time."""
    left = np.eye(len(lower))
    for j in range(len(lower)):
        left[j, : j + 1] /= lower[j, j]
        left[j + 1 :, : j + 1] -= lower[j + 1 :, j, None] * left[None, j, : j + 1]
    return left


def _inner(one: Matrix, other: Matrix) -> float:
    """Return Σ a b over all entries, added up in a fixed order."""
    return float(np.add.accumulate((one * other).ravel())[-1])
