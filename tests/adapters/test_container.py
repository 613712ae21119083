"""The container of an adapter file."""

import numpy as np

from adapters import container


def test_unpacked_tensors_own_their_memory() -> None:
    stored = {"w": np.arange(6, dtype=np.int8).reshape(2, 3), "w#scale": np.ones((2, 1), np.float32)}
    unpacked = container.unpack(container.pack(stored))
    assert all(value.flags.owndata for value in unpacked.values())  # a view of freed memory would change later
    for name, value in stored.items():
        np.testing.assert_array_equal(unpacked[name], value)
