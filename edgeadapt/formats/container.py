"""The container of an adapter file, ``.onnx_adapter``: ONNX Runtime's own format of named tensors.

It holds names, shapes and numbers: everything else about an adapter is in its signed manifest. ONNX Runtime writes the
file, and one of 32-bit floats also works with its ``LoraAdapter``. It is read here, by the rules of
docs/reference/bundle-format.md: docs/decisions/0018-own-readers.md says why."""

import math
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np  # before onnxruntime, whose C code prints and forgets a Ctrl-C while it imports numpy
import onnxruntime as ort
from numpy.typing import NDArray

from aggregation.errors import DataError

Stored = dict[str, NDArray[Any]]

IDENTIFIER, FORMAT = b"TORT", 1
TYPES = {1: "<f4", 2: "u1", 3: "i1", 10: "<f2"}  # ONNX's number of a type → numpy's name
MAX_DIMENSIONS, MAX_DIMENSION = 8, 2**31
FORMAT_VERSION, PARAMETERS = 0, 3  # fields of the table of an adapter
NAME, DIMENSIONS, DATA_TYPE, RAW_DATA = range(4)  # fields of the table of a tensor


def pack(stored: Stored) -> bytes:
    """Write the file of ``stored``. Equal tensors give equal bytes. Law: ``unpack(pack(stored))`` equals ``stored``."""
    container = ort.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(1)
    # Sorted, because the container keeps the order in which it is filled.
    container.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(np.asarray(stored[n])) for n in sorted(stored)})
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:  # the library writes paths only
        path = Path(folder) / "adapter"
        container.export_adapter(str(path))
        return path.read_bytes()


def unpack(blob: bytes) -> Stored:
    """Read the tensors in a file, each in memory of its own. Raises DataError if it names one twice or is damaged."""
    try:
        return _read(blob)
    except (struct.error, ValueError) as error:
        raise DataError(f"not a sound .onnx_adapter file ({error}): export it again", about=".onnx_adapter") from error


def _read(blob: bytes) -> Stored:
    if blob[4:8] != IDENTIFIER:
        raise ValueError("it begins otherwise")
    root = _fields(blob, _number(blob, "<I", 0))
    if (place := root(FORMAT_VERSION)) is None or _number(blob, "<i", place) != FORMAT:
        raise ValueError("it is of another version of the format")
    tensors: Stored = {}
    left = len(blob)
    for at in _elements(blob, root(PARAMETERS), 4):
        name, value = _tensor(blob, _fields(blob, at + _number(blob, "<I", at)))
        if name in tensors:
            raise ValueError("it names a tensor twice")
        if (left := left - value.nbytes) < 0:
            raise ValueError("two tensors share their bytes")
        tensors[name] = value
    return tensors


def _tensor(blob: bytes, place: Callable[[int], int | None]) -> tuple[str, NDArray[Any]]:
    name, data = (_elements(blob, place(field), 1) for field in (NAME, RAW_DATA))
    sizes = _elements(blob, place(DIMENSIONS), 8)
    shape = [_number(blob, "<q", at) for at in sizes[: MAX_DIMENSIONS + 1]]
    type_at = place(DATA_TYPE)
    kind = TYPES.get(0 if type_at is None else _number(blob, "<i", type_at))
    if kind is None or len(shape) > MAX_DIMENSIONS or not all(0 <= size <= MAX_DIMENSION for size in shape):
        raise ValueError("a tensor has a type or shape that no adapter has")
    if math.prod(shape) * np.dtype(kind).itemsize != len(data):
        raise ValueError("a tensor is not of its size")
    values = np.frombuffer(blob[data.start : data.stop], kind).reshape(shape).copy()
    return blob[name.start : name.stop].decode(), values


def _fields(blob: bytes, table: int) -> Callable[[int], int | None]:
    vtable = table - _number(blob, "<i", table)
    size = _number(blob, "<H", vtable)

    def place(field: int) -> int | None:
        entry = 4 + 2 * field
        distance = _number(blob, "<H", vtable + entry) if entry + 2 <= size else 0
        return table + distance if distance else None

    return place


def _elements(blob: bytes, reference: int | None, width: int) -> range:
    """Return the positions of the elements, ``width`` bytes each, of the vector that a field refers to."""
    if reference is None:
        return range(0)
    vector = reference + _number(blob, "<I", reference)
    start = vector + 4
    stop = start + width * _number(blob, "<I", vector)
    if stop > len(blob):
        raise ValueError("a list ends outside of it")
    return range(start, stop, width)


def _number(blob: bytes, form: str, at: int) -> int:
    if at < 0:  # struct would count from the end
        raise ValueError("an offset points outside of it")
    (value,) = struct.unpack_from(form, blob, at)
    return int(value)
