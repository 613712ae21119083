"""The profiles of an exported base: what its weights are stored and multiplied in. A closed choice.

docs/decisions/0003-int8-on-a-device.md has the measurements behind ``native-int8``.
"""

import copy
import logging
from enum import StrEnum
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from aggregation.errors import ConfigError

BLOCK = 32  # weights that share a scale
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
ZERO = 128  # the stored byte of a weight that is 0


class Profile(StrEnum):
    """How the base is stored.

    ``native-int8``: the weights of matrix products and embeddings in eight bits with a scale for each 32; activations
    are quantized as they come, likewise in blocks, so that no phrase of a batch changes the answer to another.
    """

    FP32 = "fp32"
    NATIVE_INT8 = "native-int8"


def quantize(graph: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """A copy of the graph in ``profile``, with the same inputs.

    Args:
        graph: From ``graph.trace``, without defaults: a default would make the quantizer take an adapter for a weight.
        profile: The choice.
    """
    result = copy.deepcopy(graph)
    if profile is Profile.FP32:
        return result
    _quantize_embeddings(result)
    # Level 4 multiplies in int8; without it ONNX Runtime unpacks to float32 first, six times slower.
    quantizer = quantizer_class()(result, bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=4)
    quantizer.process()
    result = quantizer.model.model
    before, after = ([value.name for value in g.graph.input] for g in (graph, result))
    if before != after:
        raise ConfigError("quantization removed inputs of the graph; this version of onnxruntime cannot be used")
    return result


def _quantize_embeddings(model: onnx.ModelProto) -> None:
    """Turn each look-up in a float table into one in a table of bytes (GatherBlockQuantized), in place.

    The library's quantizer does this for four bits only.
    """
    graph = model.graph
    tables = {tensor.name: tensor for tensor in graph.initializer if _is_table(tensor)}
    looked_up = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in tables]
    for name in sorted({node.input[0] for node in looked_up}):
        stored, scales = _blocks(numpy_helper.to_array(tables[name]))
        graph.initializer.extend(
            [numpy_helper.from_array(stored, f"{name}_q8"), numpy_helper.from_array(scales, f"{name}_scales")]
        )
    for node in looked_up:
        table, indices = node.input
        settings = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": 8}
        names = [f"{table}_q8", indices, f"{table}_scales"]
        node.CopyFrom(
            helper.make_node("GatherBlockQuantized", names, node.output, node.name, domain=CONTRIB, **settings)
        )
    used = {name for node in graph.node for name in node.input}
    for name in tables.keys() - used:
        graph.initializer.remove(tables[name])
    if CONTRIB not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def _is_table(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[1] % BLOCK == 0


def _blocks(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the table's shape ``(rows, width)``, and scales of shape ``(rows, width / BLOCK)``."""
    rows = table.reshape(len(table), -1, BLOCK)
    largest = np.abs(rows).max(axis=2, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    stored = (np.rint(rows / scales) + ZERO).astype(np.uint8)
    return stored.reshape(table.shape), scales[:, :, 0]


def quantizer_class() -> Any:
    """ONNX Runtime's quantizer by blocks. Its module sets up logging for the whole process; that is undone here."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.quantization import matmul_nbits_quantizer
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    logging.getLogger(matmul_nbits_quantizer.__name__).setLevel(logging.ERROR)  # it reports every node otherwise
    return matmul_nbits_quantizer.MatMulNBitsQuantizer
