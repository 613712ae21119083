"""A public random rotation of an update: it spreads the norm over all coordinates, so that each has a small bound.

The rotation is a randomized Hadamard transform (Ailon and Chazelle 2009, "The Fast Johnson-Lindenstrauss Transform";
before quantization: Suresh et al. 2017, "Distributed Mean Estimation with Limited Communication", section 3). For d
coordinates let P be the greatest power of two that is not above d. The first P coordinates are multiplied by random
signs and then by the Hadamard matrix of order P over √P; then the last P coordinates likewise, with fresh signs. Both
steps are orthogonal, so no coordinate is added, as padding to a power of two would.

The rotation hides nothing: its seed is public. It is computed in float64 by exact sums of rounded numbers, so that a
coordinator and an auditor invert it to the same bits."""

import hashlib
import math
from functools import cache

import numpy as np
from numpy.typing import NDArray

from aggregation.keystream import Keystream

Vector = NDArray[np.float64]
EXCESS_BITS = 40  # the bound ``peak`` fails with a probability of at most 2^-EXCESS_BITS
_ORDER = 16  # of the small matrices: 4.5 ms for 2^19 numbers; 6.0 with 32, 7.2 with 64, 18.8 by additions
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

    Returns:
        Shape ``(d,)``. Each of the two steps rounds coordinates to P · 2^-53 of the greatest one or finer, and then by
        three roundings of float64 at most.

    ``vector``: shape ``(d,)``, d at least 1; unchanged."""
    out, scratch = vector.astype(np.float64), np.empty(_order(vector.size))
    for block, signs in _steps(vector.size, seed):
        out[block] *= signs
        _hadamard(out[block], scratch)
    return out


def rotate_back(vector: Vector, seed: bytes) -> Vector:
    """The inverse of ``rotate``, up to rounding. Guarantee: equal arguments give equal bits on every machine.
    ``vector``: shape ``(d,)``, d at least 1; unchanged. ``seed``: as of ``rotate``."""
    out, scratch = vector.astype(np.float64), np.empty(_order(vector.size))
    for block, signs in reversed(_steps(vector.size, seed)):
        _hadamard(out[block], scratch)
        out[block] *= signs
    return out


def _order(size: int) -> int:
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

    In place. Numbers are first rounded to multiples of 2^(e - 53) P, all of them being below 2^e. Then no sum of P of
    them, with any signs, needs more than 53 bits: all sums are exact, in any order, by any library of matrix products.
    The matrix is the Kronecker product of small ones, which are applied to one axis after the other."""
    found, other, left = vector, scratch, vector.size
    exponent = 54 - left.bit_length() - math.frexp(max(vector.max(), -vector.min()))[1]
    np.rint(np.ldexp(vector, exponent, out=scratch), out=vector)
    while left > 1:
        order = min(left, _ORDER)
        np.matmul(found.reshape(order, -1).T, _matrix(order), out=other.reshape(-1, order))
        found, other, left = other, found, left // order
    np.multiply(np.ldexp(found, -exponent, out=other), math.sqrt(1 / vector.size), out=vector)
    vector += 0.0  # no negative zeros: their sign would depend on the order


@cache
def _matrix(order: int) -> Vector:
    """Sylvester's Hadamard matrix. ``order``: a power of two.

    >>> _matrix(2).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    """
    matrix: Vector = np.ones((1, 1))
    while len(matrix) < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
