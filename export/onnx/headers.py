"""One graph as two small headers over one file of weights.

ONNX Runtime maps the file of weights into memory, so every process that opens the base by its path shares one copy. The
native header gives each slot an empty default, because ONNX Runtime checks required inputs before it applies an
adapter; onnxruntime-web refuses defaults for inputs, so its header has none.

Slots declare no rank. ``x @ A @ B`` therefore takes one adapter for all rows of a batch (A of shape ``(in, rank)``) or
one for each row (A of shape ``(rows, in, rank)``): MatMul broadcasts.
"""

import copy
import hashlib
from collections.abc import Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from adapters.bundle import MODEL, WEB_MODEL, WEIGHTS

INLINE = 1024  # bytes; smaller tensors stay in the header, where shape inference looks for constants
PAGE = 4096  # bytes; a memory mapping starts at a page

Slots = Mapping[str, tuple[str, ...]]


def split(graph: onnx.ModelProto, slots: Slots) -> dict[str, bytes]:
    """The three files of ``graph``, which itself loses its weights, so that they are in memory only once.

    Args:
        graph: Its slots are inputs without defaults.
        slots: The dimensions of each slot: digits for a fixed one, else the name of a symbolic one.
    """
    data = _externalize(graph)
    for value in graph.graph.input:
        if value.name in slots:
            value.type.tensor_type.ClearField("shape")
    return {
        MODEL: _with_defaults(graph, slots).SerializeToString(deterministic=True),
        WEB_MODEL: graph.SerializeToString(deterministic=True),
        WEIGHTS: data,
    }


def _with_defaults(header: onnx.ModelProto, slots: Slots) -> onnx.ModelProto:
    result = copy.deepcopy(header)
    for name, dimensions in slots.items():
        empty = np.zeros([int(text) if text.isdigit() else 0 for text in dimensions], dtype=np.float32)
        result.graph.initializer.append(numpy_helper.from_array(empty, name))
    return result


def _externalize(graph: onnx.ModelProto) -> bytes:
    """Move the large tensors out, in their order, each to a page of its own; equal bytes are stored once."""
    data = bytearray()
    offsets: dict[bytes, int] = {}
    for tensor in graph.graph.initializer:
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        if (length := len(tensor.raw_data)) < INLINE:
            continue
        digest = hashlib.sha256(tensor.raw_data).digest()
        if digest not in offsets:
            data.extend(bytes(-len(data) % PAGE))
            offsets[digest] = len(data)
            data.extend(tensor.raw_data)
        for key, text in (("location", WEIGHTS), ("offset", offsets[digest]), ("length", length)):
            tensor.external_data.add(key=key, value=str(text))
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
    return bytes(data)
