"""A round of the analytic head with noise: the moments of one device within a norm, and the head that their sum gives.

A device contributes the mean of its examples' moments, clipped in L2, so that its number of examples counts for
nothing. The fewer the numbers, the less their noise weighs: embeddings are rotated at random (``aggregation.rotation``,
seeded by the adapter) and the first ``AnalyticTask.dimensions`` coordinates are kept, a random projection that needs no
data. ``docs/decisions/0038-privacy-of-a-session.md`` has the measurements.

Vector: Σ x xᵀ as its upper triangle, row by row, with the entries off the diagonal times √2, so that its L2 norm is
that of the matrix; then Σ x yᵀ row by row. The whole is rotated as an update is, which makes its coordinates small.
"""

import math

import numpy as np
from numpy.typing import NDArray

from adapters.analytic import AnalyticTask, ClassifierHead, dithered, refit
from adapters.layout import Layout, Tensors
from adapters.noisysum import require_reach
from adapters.ridge import (
    EmbeddingMoments,
    Matrix,
    Vector,
    moments_of_rows,
    pack,
    packed_size,
    positive_part,
    unit_rows,
    unpack,
)
from adapters.task import Sums
from aggregation import rotation
from aggregation.errors import DataError
from aggregation.spec import SessionSpec

MOMENTS = "moments"  # the segment
_ISOMETRY = math.sqrt(2.0)  # each entry off the diagonal stands for two


def dimensions(head: ClassifierHead, task: AnalyticTask) -> int:
    """Coordinates of an embedding that are kept: those of the task, or all if it has fewer."""
    return min(task.dimensions, head.hidden)


def moments_size(head: ClassifierHead, task: AnalyticTask) -> int:
    """Numbers of a contribution: d (d + 1) / 2 + d k for d kept coordinates and k labels."""
    kept = dimensions(head, task)
    return packed_size(kept) + kept * head.labels


def projected(embeddings: Matrix, kept: int, adapter: bytes) -> Matrix:
    """The first ``kept`` coordinates of rotated embeddings.

    Args:
        embeddings: Shape ``(n, d)``.
        kept: 1 to d.
        adapter: SHA-256 of the adapter's file, which seeds the rotation.

    Returns:
        Shape ``(n, kept)``. No row is longer than before, up to rounding.
    """
    seed = rotation.seed(adapter)
    rows = [rotation.rotate(row, seed)[:kept] for row in embeddings]
    return np.array(rows).reshape(len(embeddings), kept)


def contributed(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    head: ClassifierHead,
    task: AnalyticTask,
    adapter: bytes,
) -> Vector:
    """What one device contributes, before it is clipped.

    Args:
        embeddings: Of its examples, shape ``(n, head.hidden)``; n may be 0.
        labels: Shape ``(n,)``.
        head: Of the adapter with which they were embedded.
        task: Of the round.
        adapter: SHA-256 of the adapter's file.

    Returns:
        Shape ``(moments_size(head, task),)``.

    Raises:
        DataError: A number is not finite.
    """
    rows = projected(unit_rows(embeddings), dimensions(head, task), adapter)
    return flattened(moments_of_rows(rows, labels, head.labels))


def flattened(found: EmbeddingMoments) -> Vector:
    """The mean moments of one device as a vector, before it is clipped; zeros without examples.

    >>> flattened(EmbeddingMoments(np.array([[2.0, 2.0], [2.0, 4.0]]), np.ones((2, 1)), 2.0)).round(3).tolist()
    [1.0, 1.414, 2.0, 0.5, 0.5]
    """
    mean = np.concatenate([pack(found.xx) * _weights(len(found.xx)), found.xy.ravel()])
    return mean / found.weight if found.weight else mean


def _weights(kept: int) -> Vector:
    return pack(np.full((kept, kept), _ISOMETRY) - np.diag(np.full(kept, _ISOMETRY - 1)))


def solved(
    spec: SessionSpec, task: AnalyticTask, tensors: Tensors, sums: Sums, survivors: int, digest: bytes
) -> Tensors:
    """The next adapter: the one before with the head that the sum gives.

    With S and T the sums, d kept coordinates, k labels, n survivors, and τ = √n times the noise of one device:

    - The noise in S is nearly a symmetric Gaussian matrix: its eigenvalues fill the semicircle of
      radius τ √(2 d) (Wigner), and their root mean square is τ √(d / 2). S is projected on the positive semidefinite
      matrices, which removes about half of it.
    - The ridge regression towards the head before has the strength ``task.ridge`` · n + τ √(d / 2) · max(1, τ / C),
      with the clip norm C. So a direction in which the embeddings of all devices count for less than the noise keeps
      the head before. Where the noise is longer than a whole contribution, the strength is in proportion to its
      variance, as that of the posterior mean of a regression with Gaussian noise and a Gaussian prior.
    - Directions that were not kept do not change.

    Args:
        spec, sums, survivors: As of ``noisysum.require_reach``.
        task: Of the round's plan.
        tensors: Of the adapter with which devices embedded.
        digest: SHA-256 of its file.

    Returns:
        float32 tensors. Guarantee: as of ``analytic.solved``.

    Raises:
        DataError: As ``noisysum.require_reach`` and ``ClassifierHead.of``, or the sum has another size.
    """
    require_reach(spec, sums, survivors)
    head = ClassifierHead.of(Layout.of(tensors))
    (segment,) = spec.vector.segments
    vector, kept = sums[segment.name], dimensions(head, task)
    if vector.shape != (moments_size(head, task),):
        raise DataError("the sums are not those of this adapter's head", about="vector.segments")
    flat, seed = rotation.rotate_back(vector, rotation.seed(digest)), rotation.seed(digest)
    split = packed_size(kept)
    second = positive_part(unpack(flat[:split] / _weights(kept), kept))
    found = EmbeddingMoments(second, flat[split:].reshape(kept, head.labels), float(survivors))
    noise = segment.noise * math.sqrt(survivors)
    strength = task.ridge * survivors + noise * math.sqrt(kept / 2) * max(1.0, noise / spec.clip_norm)
    weight = tensors[head.weight].astype(np.float64)
    rotated = np.array([rotation.rotate(row, seed) for row in weight])
    small = {head.weight: rotated[:, :kept].astype(np.float32), head.bias: tensors[head.bias]}
    rotated[:, :kept] = refit(small, found, strength=strength, scale=task.scale)[head.weight]
    fitted = np.array([rotation.rotate_back(row, seed) for row in rotated])
    return dithered(spec, task, tensors | {head.weight: fitted.astype(np.float32)}, sums, digest)
