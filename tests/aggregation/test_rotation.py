"""The rotation is orthogonal, has the inverse that it names, and spreads every vector within the bound."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregation import rotation
from aggregation.rotation import peak, rotate, rotate_back

SEED = bytes(range(32))
sizes = st.integers(1, 600)
seeds = st.binary(min_size=32, max_size=32)


def drawn(size: int, number: int) -> rotation.Vector:
    return np.random.default_rng(number).standard_normal(size)


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 2**32))
def test_norms_and_angles_stay_and_the_inverse_gives_the_vector_back(size: int, seed: bytes, number: int) -> None:
    a, b = drawn(size, number), drawn(size, number + 1)
    turned = rotate(a, seed)
    assert abs(np.linalg.norm(turned) / np.linalg.norm(a) - 1) < size * 2.0**-50
    assert np.dot(turned, rotate(b, seed)) == pytest.approx(np.dot(a, b), abs=1e-12 * size)
    for back in (rotate_back(turned, seed), rotate(rotate_back(a, seed), seed)):
        assert np.abs(back - a).max() <= 4 * size * 2.0**-53 * np.abs(a).max() * math.sqrt(size)


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 2**32))
def test_the_sum_of_rotated_vectors_is_the_rotated_sum(size: int, seed: bytes, number: int) -> None:
    vectors = [drawn(size, number + i) for i in range(3)]
    total = np.sum([rotate(vector, seed) for vector in vectors], axis=0)
    assert np.allclose(rotate_back(total, seed), np.sum(vectors, axis=0), atol=1e-12)


@pytest.mark.parametrize("kind", ["normal", "constant", "alternating", "one large", "subnormal"])
def test_every_order_of_the_sums_gives_the_same_bits(kind: str) -> None:
    """Whole numbers of 64 bits, added by pairs, against the library's products of matrices."""
    order = 2**13
    vector = {
        "normal": drawn(order, 5),
        "constant": np.full(order, np.nextafter(1.0, 0.0)),  # its sum is the greatest of all
        "alternating": np.resize([0.75, -0.75], order),
        "one large": np.concatenate([[1e300], drawn(order - 1, 6)]),
        "subnormal": drawn(order, 7) * 1e-310,
    }[kind]
    shift = 53 - math.frexp(np.abs(vector).max())[1] - 13
    whole = np.rint(np.ldexp(vector, shift)).astype(np.int64)
    for h in (1 << bit for bit in range(13)):
        pairs = whole.reshape(-1, 2, h)
        whole = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1).reshape(-1)
    assert np.abs(whole).max() <= 2**53
    expected = np.ldexp(whole.astype(np.float64), -shift) * math.sqrt(1 / order) + 0.0
    found = vector.copy()
    rotation._hadamard(found, np.empty(order))
    assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("size", [5_000, 84_864])
@pytest.mark.parametrize("kind", ["one coordinate", "one block", "constant", "normal", "the end"])
def test_every_kind_of_vector_is_spread_within_the_bound(size: int, kind: str) -> None:
    vector = {
        "one coordinate": np.eye(1, size, 17)[0],
        "one block": np.repeat([1.0, 0.0], [64, size - 64]),
        "constant": np.ones(size),
        "normal": drawn(size, 1),
        "the end": np.repeat([0.0, 1.0], [size - 3, 3]),
    }[kind]
    unit = vector / np.linalg.norm(vector)
    for number in range(20):
        assert np.abs(rotate(unit, bytes([number]) * 32)).max() <= peak(size)


def test_the_bound_is_the_quantile_of_hoeffding_and_no_wider() -> None:
    """A bound for a probability of 2^-8 is exceeded by some of 2,000 rotations; that for 2^-40 by none."""
    size, found = 4096, []
    unit = drawn(size, 3) / np.linalg.norm(drawn(size, 3))
    for number in range(2_000):
        found.append(np.abs(rotate(unit, number.to_bytes(32, "big"))).max())
    probability = 2 * size * math.exp(-((peak(size) * 64) ** 2) / 2)
    assert 2.0**-41 < probability <= 2.0**-40
    assert max(found) < peak(size)
    # Tails are thinner than Hoeffding's by about t √(2π) / 2; the fraction that exceeds t = 4.4 is known within it.
    exceeding = np.mean(np.array(found) > 4.4 / 64)
    assert 0.25 * size * 2 * math.exp(-(4.4**2) / 2) / (4.4 * math.sqrt(2 * math.pi)) < exceeding
    assert exceeding < size * 2 * math.exp(-(4.4**2) / 2)


@pytest.mark.parametrize(("size", "bits"), [(1, 41), (2, 42), (3, 43), (4, 43), (5, 44)])
def test_a_small_vector_is_bounded_by_its_norm(size: int, bits: int) -> None:
    assert peak(size) == 1.0
    assert 2 * math.log(2) * bits > size


def test_it_changes_neither_its_argument_nor_zero() -> None:
    vector = drawn(100, 0)
    kept = vector.copy()
    rotate(vector, SEED), rotate_back(vector, SEED)
    assert np.array_equal(vector, kept)
    assert not rotate(np.zeros(100), SEED).any()


def test_other_seeds_are_other_rotations() -> None:
    vector, other = drawn(1_000, 0), rotation.seed(bytes(32))
    assert abs(np.corrcoef(rotate(vector, SEED), rotate(vector, other))[0, 1]) < 0.2
