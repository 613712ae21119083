"""The container of an adapter file."""

import struct

import numpy as np

from aggregation.errors import DataError
from edgeadapt.formats import container
from tests.support import refused
from tests.support.limits import limited


def test_unpacked_tensors_own_their_memory() -> None:
    stored = {"w": np.arange(6, dtype=np.int8).reshape(2, 3), "w#scale": np.ones((2, 1), np.float32)}
    unpacked = container.unpack(container.pack(stored))
    assert all(value.flags.owndata for value in unpacked.values())  # a view of freed memory would change later
    for name, value in stored.items():
        np.testing.assert_array_equal(unpacked[name], value)


def test_a_shape_that_no_memory_has_is_refused() -> None:
    """tests/vectors/test_bundle.py tries the other ways in which a signer can damage a file."""
    blob = container.pack({"e": np.zeros((5, 0), np.float32)})
    dimension, too_large = struct.pack("<q", 5), struct.pack("<q", 2**61)
    assert blob.count(dimension) == 1
    with refused(DataError, ".onnx_adapter"):
        container.unpack(blob.replace(dimension, too_large))


def shared(size: int, others: int) -> bytes:
    """A file of which ``others`` tensors refer to the shape and the bytes of one of ``size`` numbers."""
    one = container.pack({f"t{n:04}": np.zeros(1 if n else size, np.int8) for n in range(others + 1)})
    blob = bytearray(one)
    root = container._fields(one, container._number(one, "<I", 0))
    places = container._elements(one, root(container.PARAMETERS), 4)
    first, *rest = (container._fields(one, at + container._number(one, "<I", at)) for at in places)
    for fields in rest:
        for field in (container.DIMENSIONS, container.RAW_DATA):
            origin, place = first(field), fields(field)
            assert origin is not None
            assert place is not None
            struct.pack_into("<I", blob, place, origin + container._number(one, "<I", origin) - place)
    return bytes(blob)


def test_tensors_that_share_their_bytes_are_refused_before_they_are_copied() -> None:
    """300 kB would be 200 MB."""
    blob = shared(200_000, 1000)
    assert len(blob) < 300_000
    with limited(5, 2**26), refused(DataError, ".onnx_adapter"):
        container.unpack(blob)
