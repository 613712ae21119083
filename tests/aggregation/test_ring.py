"""Packing: exact sizes, a round trip for every width, and one encoding."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import envelope, ring
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.messages import MaskedInput
from aggregation.pki.identity import IdentityKey
from tests.support import refused


def by_hand(values: list[int], bits: int) -> bytes:
    """The packing in one big integer: slow, and independent of the code under test."""
    total = sum((value % 2**bits) << (i * bits) for i, value in enumerate(values))
    return total.to_bytes((len(values) * bits + 7) // 8, "little")


@given(bits=st.integers(1, 64), data=st.data())
def test_packing_equals_one_big_integer_and_round_trips(bits: int, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=150))
    vector = np.array(values, ring.dtype(bits))
    raw = ring.pack(vector, bits)
    assert raw == by_hand(values, bits)
    assert len(raw) == ring.packed_size(len(values), bits)
    assert np.array_equal(ring.unpack(raw, len(values), bits), vector)


@pytest.mark.parametrize("bits", [1, 7, 8, 11, 16, 17, 22, 24, 31, 32, 33, 48, 63, 64])
def test_vectors_of_many_blocks_round_trip(bits: int) -> None:
    size = 3 * ring.BLOCK + 13
    rng = np.random.default_rng(bits)
    vector = rng.integers(0, 2**bits, size, dtype=np.uint64).astype(ring.dtype(bits))
    assert np.array_equal(ring.unpack(ring.pack(vector, bits), size, bits), vector)


@pytest.mark.parametrize("bits", [5, 24, 32, 40])
def test_bits_above_the_ring_do_not_travel(bits: int) -> None:
    vector = np.full(9, np.iinfo(ring.dtype(bits)).max, ring.dtype(bits))
    assert np.array_equal(ring.unpack(ring.pack(vector, bits), 9, bits), vector & (2**bits - 1))


@given(size=st.integers(0, 40), bits=st.integers(1, 64), extra=st.sampled_from([-1, 1, 8]))
def test_another_length_is_refused(size: int, bits: int, extra: int) -> None:
    length = ring.packed_size(size, bits) + extra
    if length >= 0:
        with refused(ProtocolError, "vector.length"):
            ring.unpack(bytes(length), size, bits)


@pytest.mark.parametrize(("size", "bits", "unused"), [(1, 1, 7), (3, 22, 6), (7, 31, 7), (1, 63, 1)])
def test_unused_bits_must_be_zero(size: int, bits: int, unused: int) -> None:
    raw = bytearray(ring.packed_size(size, bits))
    raw[-1] = 1 << (8 - unused)
    with refused(ProtocolError, "vector.unused-bits"):
        ring.unpack(bytes(raw), size, bits)
    raw[-1] >>= 1
    ring.unpack(bytes(raw), size, bits)


@pytest.mark.parametrize("bits", [0, -1, 65])
def test_a_ring_without_bits_or_above_64_does_not_exist(bits: int) -> None:
    with pytest.raises(ConfigError):
        ring.dtype(bits)


@pytest.mark.parametrize("vector", [np.zeros(3, np.uint64), np.zeros((1, 4), np.uint32), np.zeros(4, np.int32)])
def test_a_vector_of_another_shape_or_type_is_refused(vector: ring.Ring) -> None:
    with refused(DataError, "ring.vector"):
        ring.require_vector(vector, 4, 24)


@pytest.mark.parametrize("bits", [24, 32])
def test_a_vector_of_another_type_is_not_packed(bits: int) -> None:
    for vector in (np.zeros(4, np.uint64), np.zeros((2, 2), np.uint32)):
        with refused(DataError, "ring.vector"):
            ring.pack(vector, bits)


def test_the_element_type_is_the_smallest_that_holds_the_ring() -> None:
    assert np.dtype(ring.dtype(16)) == np.dtype("<u2")
    assert np.dtype(ring.dtype(17)) == np.dtype(ring.dtype(32)) == np.dtype("<u4")
    assert np.dtype(ring.dtype(33)) == np.dtype("<u8")


def test_the_digest_is_of_the_packed_vector_reduced_to_the_ring() -> None:
    vector = np.array([1, 2, 3], ring.dtype(20))
    assert ring.digest(vector, 20) == hashlib.sha256(ring.pack(vector, 20)).digest()
    assert ring.digest(vector + (1 << 20), 20) == ring.digest(vector, 20)
    assert ring.digest(vector + 1, 20) != ring.digest(vector, 20)


@pytest.mark.parametrize("bits", [3, 7, 16, 22, 24, 31, 32, 33, 40, 64])
@pytest.mark.parametrize("size", [1, 13, ring.BLOCK + 13, 2 * ring.BLOCK])
def test_adding_a_packed_vector_is_unpacking_and_adding(bits: int, size: int) -> None:
    rng = np.random.default_rng(bits)
    first, second = (rng.integers(0, 2**bits, size, dtype=np.uint64).astype(ring.dtype(bits)) for _ in range(2))
    total = first.copy()
    ring.add(total, ring.pack(second, bits), bits)
    assert np.array_equal(total, first + second)


def test_bytes_that_cannot_be_unpacked_are_not_added() -> None:
    total = ring.zeros(2 * ring.BLOCK + 1, 22)
    raw = bytearray(b"\xff" * ring.packed_size(total.size, 22))
    with refused(ProtocolError, "vector.unused-bits"):
        ring.add(total, bytes(raw), 22)
    with refused(ProtocolError, "vector.length", value=360450):
        ring.add(total, bytes(raw[:-1]), 22)
    assert not total.any()


@pytest.mark.parametrize(("bits", "moves"), [(16, False), (32, False), (64, False), (13, True), (24, True), (40, True)])
def test_packing_without_a_copy_shares_memory_where_nothing_has_to_move(bits: int, moves: bool) -> None:
    vector = np.arange(1000).astype(ring.dtype(bits))
    view = ring.packed_view(vector, bits)
    assert view == ring.pack(vector, bits)
    vector[0] = 77
    assert (view[0] == 77) is not moves


@pytest.mark.parametrize(("bits", "size"), [(29, 10**6), (24, 10**6), (22, 999_983), (17, 10**5), (32, 10**6)])
def test_an_upload_is_less_than_a_hundredth_larger_than_its_bits(bits: int, size: int) -> None:
    key, packed = IdentityKey.generate(SystemEntropy()), ring.packed_view(ring.zeros(size, bits), bits)
    header = MaskedInput(bytes(32), "device-" + 40 * "0", hashlib.sha256(packed).digest())
    body = envelope.sign_vector(key, header, packed)
    assert len(body) <= 1.01 * size * bits / 8
    found, _ = envelope.split_vector(body)
    assert np.frombuffer(found[: 4 * (len(found) // 4)], np.uint32).flags.aligned  # else adding takes twice as long
