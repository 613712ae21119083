"""The container of an adapter file."""

import struct

import numpy as np

from adapters import container
from aggregation.errors import DataError
from tests.support import refused


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
