"""Where the tensors of a graph are while it is exported: in the graph, or in files of a folder, for large bases. A
graph whose tensors are in files takes no memory for them: its initializers have ONNX's external data. A tensor is
mapped when it is read, and written as soon as it is computed."""

import errno
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

INLINE = 1024  # bytes; smaller tensors stay in the graph, where shape inference finds constants


class TensorStore:
    folder: Path | None = None  # of the external data

    def array(self, tensor: TensorProto) -> NDArray[Any]:
        """Read a tensor, not to be written to; of one in four bits its bytes."""
        return _held(tensor)

    def tensor(self, values: NDArray[Any], name: str) -> TensorProto:
        return numpy_helper.from_array(values, name)

    def keep(self, graphs: Iterable[onnx.ModelProto]) -> None:
        """Forget every tensor that none of these graphs has."""


class OnDisk(TensorStore):
    """Store tensors of ``INLINE`` bytes and more in files of a new folder, ``place``, and read any file there."""

    def __init__(self, place: Path) -> None:
        place.mkdir()
        self.place = place
        self.folder = place
        self._numbers = itertools.count()
        self._report: Callable[[int], object] = lambda _: None

    def reports(self, report: Callable[[int], object]) -> None:
        self._report = report

    def take(self, file: Path, graph: onnx.ModelProto) -> None:
        """Move into the folder the file of the tensors of ``graph``, which itself gets the small ones."""
        file.rename(self.place / file.name)
        for tensor in graph.graph.initializer:
            if (values := self.array(tensor)).nbytes < INLINE:
                tensor.CopyFrom(numpy_helper.from_array(np.array(values), tensor.name))

    def array(self, tensor: TensorProto) -> NDArray[Any]:
        """Map the tensor from its file, whose pages leave memory with the last reference."""
        if tensor.data_location != TensorProto.EXTERNAL:
            return _held(tensor)
        stated = {entry.key: entry.value for entry in tensor.external_data}
        kind, shape = helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims)
        if tensor.data_type == TensorProto.UINT4:
            kind, shape = np.dtype(np.uint8), (int(stated["length"]),)
        self._report(int(stated.get("length", "0")))
        if 0 in shape:
            return np.zeros(shape, kind)
        place, offset = self.place / stated["location"], int(stated.get("offset", "0"))
        return np.asarray(np.memmap(place, dtype=kind, mode="r", offset=offset, shape=shape))

    def tensor(self, values: NDArray[Any], name: str) -> TensorProto:
        """Write a tensor. Raises OSError, which names the file, if the disk is full."""
        if values.nbytes < INLINE:
            return numpy_helper.from_array(values, name)
        file = f"{next(self._numbers):06d}.tensor"
        try:
            values.tofile(self.place / file)  # in C order, whatever the order in memory
        except OSError as error:
            if error.errno is not None:
                raise
            # NumPy says how much it wrote, and not why it was less.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.place / file)) from error
        return external(name, values, file)

    def keep(self, graphs: Iterable[onnx.ModelProto]) -> None:
        entries = (entry for graph in graphs for tensor in graph.graph.initializer for entry in tensor.external_data)
        kept = {entry.value for entry in entries if entry.key == "location"}
        for file in self.place.iterdir():
            if file.name not in kept:
                file.unlink()


def size_of(graph: onnx.ModelProto) -> int:
    entries = (entry for tensor in graph.graph.initializer for entry in tensor.external_data)
    return sum(int(entry.value) for entry in entries if entry.key == "length")


def external(name: str, values: NDArray[Any], file: str, offset: int = 0) -> TensorProto:
    """Refer to a tensor whose values are in a file, in C order."""
    tensor = TensorProto(
        name=name,
        dims=values.shape,
        data_type=helper.np_dtype_to_tensor_dtype(values.dtype),
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(values.nbytes))):
        tensor.external_data.add(key=key, value=value)
    return tensor


def in_four_bits(tensor: TensorProto, shape: Sequence[int]) -> TensorProto:
    """Declare a tensor of bytes one of unsigned four bits, two in a byte, in place. ``shape``: of the numbers."""
    tensor.data_type = TensorProto.UINT4
    tensor.dims[:] = shape
    return tensor


def _held(tensor: TensorProto) -> NDArray[Any]:
    if tensor.data_type == TensorProto.UINT4:
        return np.frombuffer(tensor.raw_data, np.uint8)
    values: NDArray[Any] = numpy_helper.to_array(tensor)
    return values


MEMORY = TensorStore()
