"""The weights of a training graph, read as the answering graph stores them: bytes, which a pass turns into floats. Each
form is what one ``DequantizeLinear`` reads, so the file of weights has no weight twice. Where a matrix is in four bits
with residuals (``blocks.py``), these are the last blocks of its rows, and are added to the others."""

from collections.abc import Callable, Collection, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.formats.files import sha256
from edgeadapt.formats.layout import Floats
from export.onnx.blocks import BLOCK, MIDDLE4, ZERO8, Blocks, eight_bits, four_bits, four_bits_exactly
from export.onnx.calibrate import quantized_weight
from export.onnx.exported import Profile
from export.onnx.matmuls import embedding_of, replace_nodes
from export.onnx.tensorstore import TensorStore, in_four_bits

BLOCKWISE_OPSET = 21  # the first with DequantizeLinear by blocks, and of four bits
ROWS, COLUMNS = "_in_rows", "_in_columns"  # end the names of a weight: an output of the layer in each


@dataclass(frozen=True, slots=True)
class Stored:
    """A matrix as a graph stores it, in shape ``(out, in)`` in blocks, ``(in, out)`` with a scale for each output.
    ``zeros``: the zero point of each scale, stored as ``codes`` are; None: 0."""

    codes: NDArray[Any] = field(repr=False)  # the bytes; two numbers of four bits are in one
    shape: tuple[int, int]
    scales: Floats = field(repr=False)  # one for each block, or for each output
    zeros: NDArray[Any] | None = field(default=None, repr=False)
    bits: int = 8
    block: int = BLOCK  # numbers that share a scale; 0: those of an output
    residuals: int = 0  # the blocks of a row that have them; the blocks with the residuals follow


FormOf = Callable[[str, Floats], Stored | None]  # name and weight (in, out) → None: it is stored in float


def forms_of(graph: onnx.ModelProto, answering: onnx.ModelProto, profile: Profile, store: TensorStore) -> FormOf:
    """Find how ``answering``, the graph with which devices answer, stores the weight of each MatMul of ``graph``.
    ``graph`` is the training graph in float32, and ``store`` has the tensors of both."""
    read = {node.input[1] for node in graph.graph.node if node.op_type == "MatMul"}
    embeddings = {name for name in sorted(read) if embedding_of(graph.graph, name, store)}
    integers = integer_weights(answering, store)

    def form_of(name: str, weight: Floats) -> Stored | None:
        if profile is Profile.FP32:
            return None
        exact = four_bits_exactly(weight.T)
        if profile is Profile.WEB_INT8:
            if (integer := in_integers(weight, integers)) is not None:
                return Stored(integer[0], integer[0].shape, integer[1], block=0)
            return Stored(exact.steps, exact.shape, exact.scales) if exact and name not in embeddings else None
        if exact:
            return _four_bits(exact)
        if profile is Profile.NATIVE_INT4 and name not in embeddings:
            return _four_bits(four_bits(weight.T))
        blocks = eight_bits(weight.T)
        return Stored(blocks.codes, blocks.shape, blocks.scales, np.full(blocks.scales.shape, ZERO8, np.uint8))

    return form_of


def integer_weights(answering: onnx.ModelProto, store: TensorStore) -> set[str]:
    """Digest (SHA-256, hex) each weight that a MatMulInteger reads."""
    names = {node.input[1] for node in answering.graph.node if node.op_type == "MatMulInteger"}
    return {_digest(store.array(tensor)) for tensor in answering.graph.initializer if tensor.name in names}


def float_weights(answering: onnx.ModelProto, store: TensorStore) -> set[str]:
    """Digest (SHA-256, hex) each matrix that a graph has in floats, such as that of a Gemm."""
    matrices = (t for t in answering.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2)
    return {_digest(store.array(tensor)) for tensor in matrices}


def is_among(weight: Floats, digests: Set[str]) -> bool:
    """Whether a weight, or its transpose, is among ``float_weights``."""
    return not digests.isdisjoint((_digest(weight), _digest(weight.T)))


def in_integers(weight: Floats, integers: Collection[str]) -> tuple[NDArray[np.int8], Floats] | None:
    """Split a weight ``(in, out)`` into codes and scales, if it is among ``integer_weights``."""
    if not integers:
        return None
    codes, scales = quantized_weight(weight)
    return (codes, scales) if _digest(codes) in integers else None


def read_stored(graph: onnx.ModelProto, form_of: FormOf, store: TensorStore, once: Collection[str] | None) -> None:
    """Let the MatMuls of both passes of a training graph read their weights in stored form, in place. ``once``: the
    outputs of layers whose weight is made floats once for both passes, which keeps it in memory between them; None:
    all."""
    inner, nodes = graph.graph, list[onnx.NodeProto]()
    values = {tensor.name: tensor for tensor in inner.initializer}
    floats = {name for node in inner.node if node.op_type == "Gemm" for name in node.input}  # also of the answers
    layers = [
        node
        for node in inner.node
        if node.op_type == "MatMul" and node.input[1] not in floats and _is_weight(values.get(node.input[1]))
    ]
    shared = {node.input[1] for node in layers if once is None or node.output[0] in once}
    wanted, done = {node.input[1] for node in layers}, set[str]()
    for node in inner.node:
        for name in sorted(wanted.intersection(node.input)):
            if name not in done:
                if (stored := form_of(name, store.array(values[name]))) is None:
                    wanted.remove(name)
                    continue
                nodes.extend(_floats(inner, name, stored, store, once=name in shared))
                done.add(name)
            if node.op_type == "MatMul" and node.input[1] == name:
                node.input[1] = name + COLUMNS
            elif node.op_type == "Transpose":  # its reader takes a row for each output
                node.CopyFrom(helper.make_node("Identity", [name + ROWS], list(node.output), node.name))
        nodes.append(node)
    replace_nodes(inner, nodes)
    for entry in graph.opset_import:
        entry.version = entry.version if entry.domain else max(entry.version, BLOCKWISE_OPSET)


def _four_bits(blocks: Blocks) -> Stored:
    rows, scales = blocks.shape[0], blocks.scales
    count = scales.shape[1]
    zeros = np.full((rows * count + 1) // 2, MIDDLE4 * 17, np.uint8) if blocks.zeros is None else blocks.zeros
    if blocks.zeros is not None and count % 2:  # a row of a MatMulNBits ends with an unused half
        zeros = _packed(np.stack([zeros & 15, zeros >> 4], axis=2).reshape(rows, -1)[:, :count])
    return Stored(blocks.codes, (rows, count * BLOCK), scales, zeros, 4, residuals=blocks.sums)


def _packed(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Without a gap between rows."""
    flat = np.append(codes.reshape(-1), np.zeros(codes.size % 2, np.uint8))
    return (flat[::2] | (flat[1::2] << 4)).astype(np.uint8)


def _floats(
    graph: onnx.GraphProto, name: str, stored: Stored, store: TensorStore, *, once: bool
) -> list[onnx.NodeProto]:
    """Make a weight of its bytes, as stored and transposed; ``once`` for both, or for each."""
    as_stored, turned = (name + ROWS, name + COLUMNS) if stored.block else (name + COLUMNS, name + ROWS)
    source = as_stored if once else f"{turned}_stored"
    nodes = _of_bytes(graph, name, stored, store, as_stored)
    if not once:
        nodes += _of_bytes(graph, name, stored, store, source)
    return [*nodes, helper.make_node("Transpose", [source], [turned], turned, perm=[1, 0])]


def _of_bytes(graph: onnx.GraphProto, name: str, stored: Stored, store: TensorStore, made: str) -> list[onnx.NodeProto]:
    """Make ``made``, a weight as it is stored. ONNX Runtime repeats a DequantizeLinear for each of its readers, and
    makes one of equal nodes. So its only reader is a Reshape to the shape that there is, which no other value has as an
    input."""
    parts = {f"{name}_codes": stored.codes, f"{name}_scales": stored.scales}
    if stored.zeros is not None:
        middle = stored.bits == 8 or bool(np.all(stored.zeros == MIDDLE4 * 17))
        shared = "zeros_{}_{}_{}".format(stored.bits, *stored.scales.shape)
        parts[shared if middle else f"{name}_zeros"] = stored.zeros
    for part, values in parts.items():
        tensor = store.tensor(values, part)
        if stored.bits == 4 and values.dtype == np.uint8:
            in_four_bits(tensor, stored.shape if values is stored.codes else stored.scales.shape)
        _add(graph, tensor)
    floats, shape = f"{made}_floats", f"{made}_shape"
    _add(graph, numpy_helper.from_array(np.array(stored.shape), shape))
    settings = {"block_size": stored.block} if stored.block else {}
    nodes = [helper.make_node("DequantizeLinear", list(parts), [floats], floats, axis=1, **settings)]
    if not stored.residuals:
        return [*nodes, helper.make_node("Reshape", [floats, shape], [made], made)]
    whole = f"{made}_whole"
    nodes.append(helper.make_node("Reshape", [floats, shape], [whole], whole))
    return [*nodes, *_with_residuals(graph, whole, made, stored.shape[0], stored.residuals)]


def _with_residuals(graph: onnx.GraphProto, whole: str, made: str, rows: int, blocks: int) -> list[onnx.NodeProto]:
    """Add to each block of ``whole`` its residual, which is after all blocks of the row."""
    width = blocks * BLOCK

    def integers(*values: int) -> str:
        name = "_".join(["integers", *map(str, values)])
        _add(graph, numpy_helper.from_array(np.array(values), name))
        return name

    steps = (
        ("Slice", "own", [whole, integers(0), integers(width), integers(1)]),
        ("Reshape", "blocks", [f"{made}_own", integers(rows, blocks, BLOCK)]),
        ("Slice", "residuals", [whole, integers(width), integers(width + blocks), integers(1)]),
        ("Reshape", "columns", [f"{made}_residuals", integers(rows, blocks, 1)]),
        ("Add", "sums", [f"{made}_blocks", f"{made}_columns"]),
    )
    nodes = [helper.make_node(kind, read, [f"{made}_{name}"], f"{made}_{name}") for kind, name, read in steps]
    return [*nodes, helper.make_node("Reshape", [f"{made}_sums", integers(rows, width)], [made], made)]


def _add(graph: onnx.GraphProto, tensor: TensorProto) -> None:
    if all(tensor.name != present.name for present in graph.initializer):
        graph.initializer.append(tensor)


def _digest(values: NDArray[Any]) -> str:
    return sha256(np.ascontiguousarray(values).tobytes())


def _is_weight(tensor: TensorProto | None) -> bool:
    """Whether a MatMul multiplies with it, and its input has whole blocks."""
    if tensor is None or tensor.data_type != TensorProto.FLOAT:
        return False
    return len(tensor.dims) == 2 and tensor.dims[0] % BLOCK == 0
