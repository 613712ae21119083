"""The profiles of an exported base: what its weights are stored and multiplied in. A closed choice.

docs/decisions/0003-int8-on-a-device.md and 0010-profiles-of-a-language-model.md have the measurements behind them.
"""

import copy
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from adapters.layout import Floats
from export.blocks import BLOCK, Blocks, eight_bits, four_bits

CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
INT8_MATH = 4  # MatMulNBits' accuracy level: activations become int8; without it ONNX Runtime unpacks to float32


class Profile(StrEnum):
    """How the base is stored.

    ``native-int8``: the weights of matrix products and embeddings in eight bits with a scale for each 32; activations
    are quantized as they come, likewise in blocks, so that no phrase of a batch changes the answer to another.
    ``native-int4``: the same in four bits with a zero point, but for tables, which stay in eight.
    """

    FP32 = "fp32"
    NATIVE_INT8 = "native-int8"
    NATIVE_INT4 = "native-int4"


def quantize(graph: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """A copy of the graph in ``profile``, with the same inputs, and the same names of what its products give.

    Args:
        graph: In float32, without defaults for slots: an adapter would be taken for a weight.
        profile: The choice.
    """
    if profile is Profile.FP32:
        return copy.deepcopy(graph)
    return in_blocks(graph, 8 if profile is Profile.NATIVE_INT8 else 4, {})


def in_blocks(graph: onnx.ModelProto, bits: int, other: Mapping[str, int]) -> onnx.ModelProto:
    """A copy of the graph with its weights in blocks.

    Args:
        graph: As for ``quantize``.
        bits: Four or eight, of every product's weight. Tables have eight.
        other: Other bits by what a product gives, its output's name; 32 leaves it in float.
    """
    result = copy.deepcopy(graph)
    values = {tensor.name: tensor for tensor in result.graph.initializer}
    made: dict[tuple[str, int], Blocks] = {}
    for node in result.graph.node:
        if (name := _weight(node, values)) is None:
            continue
        table = node.op_type != "MatMul"
        chosen = other.get(node.output[0], 8 if table else bits)
        if chosen == 32:
            continue
        key = (name, chosen)
        if key not in made:
            matrix = numpy_helper.to_array(values[name])
            made[key] = _blocks(matrix if table else matrix.T, chosen)
        _replace(result.graph, node, made[key], f"{name}_{chosen}bit")
    used = {name for node in result.graph.node for name in node.input}
    kept = [tensor for tensor in result.graph.initializer if tensor.name in used]
    del result.graph.initializer[:]
    result.graph.initializer.extend(kept)
    if made and CONTRIB not in {entry.domain for entry in result.opset_import}:
        result.opset_import.append(helper.make_opsetid(CONTRIB, 1))
    return result


def _weight(node: onnx.NodeProto, values: Mapping[str, TensorProto]) -> str | None:
    """The name of the matrix that a node multiplies with or looks up in, if it can be stored in blocks."""
    place = {"MatMul": 1, "FusedMatMul": 1, "Gather": 0}.get(node.op_type)
    if place is None or (tensor := values.get(node.input[place])) is None:
        return None
    along = 0 if node.op_type == "MatMul" else 1
    fits = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[along] % BLOCK == 0
    return tensor.name if fits else None


def _blocks(matrix: Floats, bits: int) -> Blocks:
    return eight_bits(matrix) if bits == 8 else four_bits(matrix)


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, blocks: Blocks, name: str) -> None:
    """Let a node read ``blocks``, which are added to the graph once for products and once for look-ups."""
    rows, width = blocks.shape
    settings: dict[str, Any] = {"bits": blocks.bits, "block_size": BLOCK}
    if node.op_type == "Gather":
        codes, kind, first = blocks.codes, "GatherBlockQuantized", [f"{name}_rows", node.input[1]]
        settings |= {"gather_axis": 0, "quantize_axis": 1}
    else:
        # The same bytes in another shape: the file holds them once.
        codes, kind, first = blocks.codes.reshape(rows, width // BLOCK, -1), "MatMulNBits", [node.input[0], name]
        settings |= {"K": width, "N": rows, "accuracy_level": INT8_MATH}
    stored = {first[0] if node.op_type == "Gather" else name: codes, f"{name}_scales": blocks.scales}
    if blocks.zeros is not None:
        stored[f"{name}_zeros"] = blocks.zeros
    present = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in stored.items() if n not in present)
    names = [*first, *list(stored)[1:]]
    node.CopyFrom(helper.make_node(kind, names, list(node.output), node.name, domain=CONTRIB, **settings))
