"""The container of an adapter file, ``.onnx_adapter``: ONNX Runtime's own format of named tensors.

It holds names, shapes and numbers, and checks nothing: everything else about an adapter is in its signed manifest.
A file of 32-bit floats also works with ONNX Runtime's ``LoraAdapter``.
"""

import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np  # before onnxruntime, whose C code prints and forgets a Ctrl-C while it imports numpy
import onnxruntime as ort
from numpy.typing import NDArray

from aggregation.errors import DataError

Stored = dict[str, NDArray[Any]]


def pack(stored: Stored) -> bytes:
    """The file of ``stored``. Equal tensors give equal bytes. Law: ``unpack(pack(stored))`` equals ``stored``."""
    container = ort.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(1)
    # Sorted, because the container keeps the order in which it is filled.
    container.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(np.asarray(stored[n])) for n in sorted(stored)})
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:  # the library writes and reads paths only
        path = Path(folder) / "adapter"
        container.export_adapter(str(path))
        return path.read_bytes()


def unpack(blob: bytes) -> Stored:
    """The tensors in a file.

    Raises:
        DataError: It is not such a file, or names a tensor twice.
        OSError: The temporary folder is full.
    """
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        path = Path(folder) / "adapter"
        path.write_bytes(blob)
        try:
            values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        except Exception as error:  # onnxruntime raises several classes of its own, with no common base
            raise DataError("not a sound .onnx_adapter file: export it again", about=".onnx_adapter") from error
        if len(values) != _count(blob):
            raise DataError("the .onnx_adapter file names a tensor twice: export it again", about=".onnx_adapter")
        try:
            # A copy: ``numpy()`` is a view of memory that is freed with ``values``.
            return {name: value.numpy().copy() for name, value in values.items()}
        except ValueError as error:  # an empty tensor may have a dimension that is too large for numpy
            raise DataError(
                "the .onnx_adapter file has an impossible shape: export it again", about=".onnx_adapter"
            ) from error


def _count(blob: bytes) -> int:
    """The tensors in a sound file: the length of the root table's fourth field (docs/reference/bundle-format.md)."""
    (root,) = struct.unpack_from("<I", blob)
    (back,) = struct.unpack_from("<i", blob, root)
    (size,) = struct.unpack_from("<H", blob, root - back)
    (distance,) = struct.unpack_from("<H", blob, root - back + 10) if size >= 12 else (0,)
    if not distance:
        return 0
    at = root + distance
    (reference,) = struct.unpack_from("<I", blob, at)
    (count,) = struct.unpack_from("<I", blob, at + reference)
    return int(count)
