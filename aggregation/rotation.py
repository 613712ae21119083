"""A public random rotation of an update: it spreads the norm over all coordinates, so that each has a small bound.

The rotation is a randomized Hadamard transform (Ailon and Chazelle 2009, "The Fast Johnson-Lindenstrauss Transform";
before quantization: Suresh et al. 2017, "Distributed Mean Estimation with Limited Communication", section 3). For d
coordinates let P be the greatest power of two that is not above d. The first P coordinates are multiplied by random
signs and then by the Hadamard matrix of order P over √P; then the last P coordinates likewise, with fresh signs. Both
steps are orthogonal, so no coordinate is added, as padding to a power of two would.

The rotation hides nothing: its seed is public. It is computed in float64 by additions in a fixed order, so that a
coordinator and an auditor invert it to the same bits.
"""

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from aggregation.keystream import Keystream

Vector = NDArray[np.float64]
EXCESS_BITS = 40  # the bound ``peak`` fails with a probability of at most 2^-EXCESS_BITS
_SEED = b"edgeadapt/rotation/1\x00"


def seed(adapter: bytes) -> bytes:
    """The seed (32 bytes) of the rotation of all updates of an adapter. ``adapter``: SHA-256 of the adapter's file."""
    return hashlib.sha256(_SEED + adapter).digest()


def peak(size: int) -> float:
    """Bound on the coordinates of a rotated vector of norm 1 and ``size`` coordinates, 1 or more.

    Guarantee: for every vector that was chosen without knowledge of the seed, all coordinates are within the bound
    with a probability of at least 1 - 2^-``EXCESS_BITS``; and the value is the same on every machine.

    A rotated coordinate is a sum over P coordinates x[i] with independent signs, over √P, in which Σ x[i]² ≤ 1. By
    Hoeffding (1963, theorem 2) it exceeds t / √P with a probability of at most 2 exp(-t² / 2). With
    t² = 2 ln 2 · (``EXCESS_BITS`` + 1 + ⌈log2 size⌉), that is at most 2^-``EXCESS_BITS`` / size. No coordinate exceeds
    the norm, 1.

    >>> round(peak(10**6), 5), peak(10)
    (0.0127, 1.0)
    """
    exponent = EXCESS_BITS + 1 + (size - 1).bit_length()
    return min(1.0, math.sqrt(2 * math.log(2) * exponent / _order(size)))


def rotate(vector: Vector, seed: bytes) -> Vector:
    """Rotate a vector.

    >>> rotate(np.array([4.0, 0.0, 0.0, 0.0]), bytes(32)).tolist()
    [0.0, -4.0, 0.0, 0.0]
    >>> rotate(np.array([3.0, 0.0, 4.0]), bytes(32)).round(3).tolist()
    [2.121, 1.328, -4.328]

    Args:
        vector: Shape ``(d,)``, d at least 1; unchanged.
        seed: 32 bytes.

    Returns:
        Shape ``(d,)``, of the same norm, up to a relative error below 2^-45.
    """
    out, scratch = vector.astype(np.float64), np.empty(_order(vector.size))
    for block, signs in _steps(vector.size, seed):
        out[block] *= signs
        _hadamard(out[block], scratch)
    return out


def rotate_back(vector: Vector, seed: bytes) -> Vector:
    """The inverse of ``rotate``, up to rounding. Guarantee: equal arguments give equal bits on every machine.

    Args:
        vector: Shape ``(d,)``, d at least 1; unchanged.
        seed: As of ``rotate``.
    """
    out, scratch = vector.astype(np.float64), np.empty(_order(vector.size))
    for block, signs in reversed(_steps(vector.size, seed)):
        _hadamard(out[block], scratch)
        out[block] *= signs
    return out


def _order(size: int) -> int:
    """The greatest power of two that is not above ``size``."""
    return 1 << (size.bit_length() - 1)


def _steps(size: int, seed: bytes) -> list[tuple[slice, NDArray[np.int8]]]:
    """The coordinates of each of the two steps, and their signs: a bit of the keystream each, 1 for minus."""
    order, stream = _order(size), Keystream(seed)
    steps = []
    for block in (slice(0, order), slice(size - order, size)):
        drawn = bytearray(-(-order // 8))
        stream.read_into(memoryview(drawn))
        bits = np.unpackbits(np.frombuffer(drawn, np.uint8), count=order, bitorder="little")
        steps.append((block, 1 - 2 * bits.astype(np.int8)))
    return steps


def _hadamard(vector: Vector, scratch: Vector) -> None:
    """Multiply by the Hadamard matrix of order P (Sylvester's construction), then by the float64 next to 1 / √P.

    In place. The butterflies (x[i], x[i + h]) → (x[i] + x[i + h], x[i] - x[i + h]) are done for h = 1, 2, 4, …, P / 2.
    Additions of long rows are several times as fast as those of neighbors. So the vector is transposed as a matrix,
    first with the lower half of the bits of the index along its rows, then back.
    """
    found, other, half = vector, scratch, (vector.size.bit_length() - 1) // 2
    for columns in (1 << half, vector.size >> half):
        np.copyto(other.reshape(columns, -1), found.reshape(-1, columns).T)
        found, other, width = other, found, vector.size // columns
        while width < vector.size:
            pairs, out = found.reshape(-1, 2, width), other.reshape(-1, 2, width)
            np.add(pairs[:, 0], pairs[:, 1], out=out[:, 0])
            np.subtract(pairs[:, 0], pairs[:, 1], out=out[:, 1])
            found, other, width = other, found, 2 * width
    np.multiply(found, math.sqrt(1 / vector.size), out=vector)
