"""The weights of a graph in the form of a ``Profile``. docs/decisions/0010-profiles-of-a-base.md has the measurements
behind them."""

import copy
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.onnx.blocks import BLOCK, Blocks, eight_bits, four_bits, four_bits_exactly
from export.onnx.calibrate import feeds_for, lossy_matmuls, quantized_weight
from export.onnx.exported import Profile
from export.onnx.matmuls import CONTRIB, USUAL_RANK, import_contrib, replace_nodes
from export.onnx.tensorstore import MEMORY, TensorStore

WEB_LIMIT = 0.01  # limit for lossy_matmuls; docs/decisions/0010 shows what other limits give
INT8_MATH = 4  # MatMulNBits' accuracy level: activations become int8; without it ONNX Runtime unpacks to float32
FLOAT = 32  # bits of a MatMul that is left alone
FLOATS = "_in_float"  # suffix of a weight's name: the weight as the graph computes it from bytes
SUMS = "_with_sums"  # suffix of an input's name: the input with the sums of its blocks appended


def quantize(
    graph: onnx.ModelProto, profile: Profile, ids: Sequence[int], store: TensorStore = MEMORY
) -> onnx.ModelProto:
    """Copy ``graph`` in ``profile``, with the same inputs and the same names of the MatMuls' outputs. ``graph`` is in
    float32, without defaults for slots, which would be mistaken for weights. ``ids`` are tokens of a plain text, to
    measure which MatMuls ``web-int8`` must leave in float."""
    if profile is Profile.FP32:
        return copy.deepcopy(graph)
    if profile is Profile.WEB_INT8:
        return in_integers(graph, set(lossy_matmuls(graph, feeds_for(graph, ids), WEB_LIMIT, store)), store)
    return in_blocks(graph, 8 if profile is Profile.NATIVE_INT8 else 4, {}, store)


def in_blocks(
    graph: onnx.ModelProto, bits: int, other: Mapping[str, int], store: TensorStore = MEMORY
) -> onnx.ModelProto:
    """Copy ``graph`` (as for ``quantize``) with weights in blocks of 32, of ``bits`` 4 or 8; 32 leaves them in float.
    Weights whose width is not divisible by 32 stay in float, those that come in symmetric four bits keep them, and
    embeddings have 8. ``other`` has other bits by the name of a MatMul's output."""
    result = copy.deepcopy(graph)
    values = {tensor.name: tensor for tensor in result.graph.initializer}
    ranks = _ranks(graph.graph)
    quantized: dict[tuple[str, int], Blocks] = {}
    readers = Counter(filter(None, (_weight(node, values) for node in result.graph.node)))
    nodes: list[onnx.NodeProto] = []
    summed: dict[str, int] = {}
    for node in result.graph.node:
        if (name := _weight(node, values)) is not None:
            chosen = other.get(node.output[0], bits)
            if node.op_type == "Gather" or (node.op_type == "FusedMatMul" and chosen != FLOAT):  # an embedding
                chosen = 8
            if (key := (name, chosen)) not in quantized and chosen != FLOAT:
                matrix = store.array(values[name])
                rows = matrix.T if node.op_type == "MatMul" else matrix
                quantized[key] = four_bits_exactly(rows) or (eight_bits(rows) if chosen == 8 else four_bits(rows))
            readers[name] -= 1
            if (blocks := quantized.get(key) if readers[name] else quantized.pop(key, None)) is not None:
                if blocks.sums and (x := node.input[0]) not in summed:
                    summed[x] = ranks.get(x, USUAL_RANK)
                    nodes.extend(_sums(x, summed[x]))
                _replace(result.graph, node, blocks, f"{name}_{blocks.bits}bit", store)
        nodes.append(node)
    for rank in sorted(set(summed.values())):
        parts = {f"blocks_of_{rank}": [0] * (rank - 1) + [-1, BLOCK], f"axis_of_{rank}": [rank]}
        result.graph.initializer.extend(numpy_helper.from_array(np.array(v), name) for name, v in parts.items())
    if any(node.domain == CONTRIB for node in nodes):
        import_contrib(result)
    replace_nodes(result.graph, nodes)
    return result


def in_integers(graph: onnx.ModelProto, kept: Container[str], store: TensorStore = MEMORY) -> onnx.ModelProto:
    """Copy ``graph`` with each MatMul a MatMulInteger, except those whose output's name is in ``kept``. The latter
    compute in float. Where their weights come in symmetric four bits, the graph stores a byte of each, which ONNX
    Runtime turns into the same floats when it loads the graph."""
    result = copy.deepcopy(graph)
    values = {tensor.name: tensor for tensor in result.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    rounded: set[str] = set()
    for node in result.graph.node:
        if node.op_type not in ("MatMul", "FusedMatMul") or (name := _weight(node, values)) is None:
            nodes.append(node)
            continue
        if node.output[0] in kept:
            if node.op_type == "MatMul" and (blocks := four_bits_exactly(store.array(values[name]).T)):
                nodes.extend(_stored_in_bytes(result.graph, blocks, name, store))
                node.input[1] = name + FLOATS
            nodes.append(node)
            continue
        x, stored = node.input[0], store.array(values[node.input[1]])
        if x not in rounded:
            outputs = [f"{x}_{part}" for part in ("int8", "scale", "zero")]
            nodes.append(helper.make_node("DynamicQuantizeLinear", [x], outputs, f"{x}_rounded"))
            rounded.add(x)
        codes, scales = quantized_weight(stored.T if node.op_type == "FusedMatMul" else stored)
        name = node.output[0]
        parts: dict[str, NDArray[Any]] = {f"{name}_weight": codes, f"{name}_scales": scales}
        result.graph.initializer.extend(store.tensor(v, n) for n, v in parts.items())
        nodes.extend(_integer_matmul(x, name))
    replace_nodes(result.graph, nodes)
    return in_blocks(result, FLOAT, {}, store)  # quantizes the embeddings and removes unused initializers


def _ranks(graph: onnx.GraphProto) -> dict[str, int]:
    stated = [(value.name, value.type.tensor_type) for value in (*graph.value_info, *graph.input)]
    return {name: len(kind.shape.dim) for name, kind in stated if kind.HasField("shape")}


def _stored_in_bytes(graph: onnx.GraphProto, blocks: Blocks, name: str, store: TensorStore) -> list[onnx.NodeProto]:
    """Make ``name + FLOATS``, shape ``(in, out)``, of bytes and the scales of their blocks."""
    rows, width = blocks.shape
    parts: dict[str, NDArray[Any]] = {
        "_bytes": blocks.steps.reshape(rows, -1, BLOCK),
        "_byte_scales": blocks.scales[:, :, np.newaxis],
        "_shape": np.array([rows, width]),
    }
    graph.initializer.extend(store.tensor(value, name + part) for part, value in parts.items())
    return [
        helper.make_node("Cast", [f"{name}_bytes"], [f"{name}_steps"], f"{name}_steps", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_steps", f"{name}_byte_scales"], [f"{name}_blocks"], f"{name}_blocks"),
        helper.make_node("Reshape", [f"{name}_blocks", f"{name}_shape"], [f"{name}_rows"], f"{name}_rows"),
        helper.make_node("Transpose", [f"{name}_rows"], [name + FLOATS], name + FLOATS, perm=[1, 0]),
    ]


def _integer_matmul(x: str, name: str) -> list[onnx.NodeProto]:
    return [
        helper.make_node(
            "MatMulInteger", [f"{x}_int8", f"{name}_weight", f"{x}_zero"], [f"{name}_sum"], f"{name}_int8"
        ),
        helper.make_node("Cast", [f"{name}_sum"], [f"{name}_float"], f"{name}_cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{x}_scale", f"{name}_scales"], [f"{name}_step"], f"{name}_steps"),
        helper.make_node("Mul", [f"{name}_float", f"{name}_step"], [name], name),
    ]


def _weight(node: onnx.NodeProto, values: Mapping[str, TensorProto]) -> str | None:
    """Name the matrix that a node multiplies with or looks up in, if it can be stored in blocks."""
    place = {"MatMul": 1, "FusedMatMul": 1, "Gather": 0}.get(node.op_type)
    if place is None or (tensor := values.get(node.input[place])) is None:
        return None
    along = 0 if node.op_type == "MatMul" else 1
    fits = tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2 and tensor.dims[along] % BLOCK == 0
    return tensor.name if fits else None


def _sums(x: str, rank: int) -> list[onnx.NodeProto]:
    """Append the sums of its blocks to ``x`` of shape ``(…, width)``, as ``x + SUMS``."""
    shape, axis, blocks, sums = f"blocks_of_{rank}", f"axis_of_{rank}", f"{x}_blocks", f"{x}_sums"
    return [
        helper.make_node("Reshape", [x, shape], [blocks], blocks),
        helper.make_node("ReduceSum", [blocks, axis], [sums], sums, keepdims=0),
        helper.make_node("Concat", [x, sums], [x + SUMS], x + SUMS, axis=-1),
    ]


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, blocks: Blocks, name: str, store: TensorStore) -> None:
    """Let ``node`` read ``blocks``, which are added to the graph once for MatMuls and once for look-ups."""
    rows, width = blocks.shape
    settings: dict[str, Any] = {"bits": blocks.bits, "block_size": BLOCK}
    if node.op_type == "Gather":
        codes, kind, first = blocks.codes, "GatherBlockQuantized", [f"{name}_rows", node.input[1]]
        settings |= {"gather_axis": 0, "quantize_axis": 1}
    else:
        # The same bytes in another shape: headers.split stores them once.
        codes, kind = blocks.codes.reshape(*blocks.scales.shape, -1), "MatMulNBits"
        first = [node.input[0] + (SUMS if blocks.sums else ""), name]
        settings |= {"K": width + blocks.sums, "N": rows, "accuracy_level": INT8_MATH}
    stored: dict[str, NDArray[Any]] = {first[0] if node.op_type == "Gather" else name: codes}
    stored[f"{name}_scales"] = blocks.scales
    if blocks.zeros is not None:
        stored[f"{name}_zeros"] = blocks.zeros
    present = {tensor.name for tensor in graph.initializer}
    graph.initializer.extend(store.tensor(v, n) for n, v in stored.items() if n not in present)
    names = [*first, *list(stored)[1:]]
    node.CopyFrom(helper.make_node(kind, names, list(node.output), node.name, domain=CONTRIB, **settings))
