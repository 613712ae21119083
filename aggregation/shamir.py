"""Shamir's secret sharing (1979) of 32-byte secrets over the integers mod p = 2^256 + 297, a prime. Any ``t`` shares
determine the secret; fewer say nothing about it. The Lagrange coefficients of a set of holders are computed once and
serve every secret that the set reconstructs."""

import itertools
import math
from collections.abc import Sequence

from aggregation.entropy import Entropy
from aggregation.errors import ConfigError, ProtocolError

PRIME = 2**256 + 297
SECRET = 32  # bytes
SHARE = 33  # bytes: a value mod p may need 257 bits
_DRAW = 48  # bytes: reduced mod p, 384 bits are uniform to within a distance of 2^-127


def split(secret: bytes, threshold: int, points: Sequence[int], entropy: Entropy) -> list[bytes]:
    """Share ``secret`` among the holders at ``points``.

    Guarantee: any ``threshold`` shares reconstruct the secret; fewer are consistent with every secret alike.

    >>> from aggregation.entropy import SystemEntropy
    >>> shares = split(bytes(range(32)), 2, [1, 2, 3], SystemEntropy())
    >>> combine(lagrange([1, 3]), [shares[0], shares[2]]) == bytes(range(32))
    True

    Args:
        secret: 32 bytes.
        threshold: Shares that reconstruct it, between 1 and ``len(points)``.
        points: Distinct positive x-coordinates, one for each holder.
        entropy: Draws the coefficients, 48 bytes each, the highest power first.

    Returns:
        One share of 33 bytes for each point, big-endian, in the order of ``points``.

    Raises ConfigError: the secret has another length, or threshold and points do not allow sharing."""
    if not 1 <= threshold <= len(set(points)) == len(points) or min(points) < 1 or len(secret) != SECRET:
        raise ConfigError(
            f"cannot share {len(secret)} bytes among {len(points)} points with threshold {threshold}",
            about="shamir.split",
        )
    drawn = entropy.bytes(_DRAW * (threshold - 1))
    higher = [int.from_bytes(drawn[i : i + _DRAW], "big") % PRIME for i in range(0, len(drawn), _DRAW)]
    coefficients = [*higher, int.from_bytes(secret, "big")]
    return [_evaluate(coefficients, x).to_bytes(SHARE, "big") for x in points]


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    """Horner's rule, highest coefficient first. One reduction at the end: ``x`` is small, so numbers grow slowly."""
    value = 0
    for coefficient in coefficients:
        value = value * x + coefficient
    return value % PRIME


def lagrange(points: Sequence[int], at: int = 0) -> list[int]:
    """Coefficients that combine the shares at ``points`` into the polynomial's value at ``at``.

    >>> [coefficient - PRIME if coefficient > PRIME // 2 else coefficient for coefficient in lagrange([1, 2, 3])]
    [3, -3, 1]

    Returns:
        One coefficient mod ``PRIME`` for each point, in the order of ``points``.

    ``points``: distinct x-coordinates, none equal to ``at``; below 2^64, or the products grow long. ``at``: where to
    evaluate; the secret is at 0. Raises ProtocolError: a point is repeated."""
    if len(set(points)) != len(points):
        raise ProtocolError("two shares are of the same holder", about="shamir.points")
    # Points are small, so products over them stay short, and all of them share one inverse (Montgomery 1987, 10.3.1).
    above = math.prod(at - x for x in points)
    below = [(at - x) * math.prod([x - other for other in points if other != x]) for x in points]
    before = list(itertools.accumulate(below, lambda product, under: product * under % PRIME, initial=1))
    rest, coefficients = above * pow(before[-1], -1, PRIME), []
    for under, product in zip(below[::-1], before[-2::-1], strict=True):
        coefficients.append(product * rest % PRIME)
        rest = rest * under % PRIME
    return coefficients[::-1]


def combine(coefficients: Sequence[int], shares: Sequence[bytes]) -> bytes | None:
    """The secret that ``shares`` reconstruct, or None where they are not canonical shares of a 32-byte secret.

    A wrong share yields another value, not an error: the caller compares the secret with its commitment.
    ``coefficients``: ``lagrange`` of the holders' points. ``shares``: one for each coefficient, in the same order; a
    share of ``PRIME`` or more is not canonical."""
    values = [int.from_bytes(share, "big") for share in shares]
    if max(values) >= PRIME:
        return None
    value = sum(coefficient * y for coefficient, y in zip(coefficients, values, strict=True)) % PRIME
    return value.to_bytes(SECRET, "big") if value < 1 << 8 * SECRET else None
