"""The MatMuls of a graph, by their weights: normalized, found by layer, given a LoRA pair, merged.

Quantization and slots expect one form: an activation times a stored weight of shape ``(in, out)``. ``normalize`` brings
what torch exports to that form, and ``share_embedding`` lets an output layer read the embedding. A layer's MatMul is
found by its weight (``find``), not by a node's name, which depends on the exporter."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from aggregation.errors import ConfigError
from edgeadapt.formats.graphinputs import LORA_A, LORA_B
from edgeadapt.formats.layout import Floats
from export.onnx.tensorstore import MEMORY, TensorStore

CONTRIB = "com.microsoft"  # the domain of ONNX Runtime's own operators
ROWS = 256  # compared at a time
USUAL_RANK = 3  # dimensions of a MatMul's input, (rows, tokens, width), where the graph states none


@dataclass(frozen=True, slots=True)
class LayerMatMul:
    """The MatMul of one layer: the names of its input and output (before the bias), and their widths. ``bias`` is the
    stored bias, and ``end`` the output after it; without a bias, ``end`` is ``y``."""

    x: str
    y: str
    width: int
    out: int
    end: str
    bias: str | None = None


def normalize(graph: onnx.ModelProto, store: TensorStore = MEMORY) -> None:
    """Store weights transposed instead of transposing them at run time, and split Gemm into MatMul and Add, in place.
    The graph computes the same function."""
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    transposed: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if node.op_type == "Transpose" and node.input[0] in stored and _transposes_matrix(node, stored):
            transposed[node.output[0]] = node.input[0]
        elif node.op_type == "Gemm" and _is_linear(node) and node.input[1] in stored:
            weight = f"{node.input[1]}_transposed"
            transposed[weight] = node.input[1]
            nodes.extend(_linear(node, weight))
        else:
            nodes.append(node)
    for name, source in transposed.items():
        graph.graph.initializer.append(store.tensor(store.array(stored[source]).T.copy(), name))
    replace_nodes(graph.graph, nodes)


def share_embedding(graph: onnx.ModelProto, store: TensorStore = MEMORY) -> None:
    """Let an output layer whose weight is the embedding, transposed, read the embedding, which is then stored once."""
    for node in graph.graph.node:
        if node.op_type != "MatMul" or (name := embedding_of(graph.graph, node.input[1], store)) is None:
            continue
        x, weight, output = node.input[0], node.input[1], node.output[0]
        node.CopyFrom(helper.make_node("FusedMatMul", [x, name], [output], node.name, domain=CONTRIB, transB=1))
        graph.graph.initializer.remove(next(tensor for tensor in graph.graph.initializer if tensor.name == weight))
        import_contrib(graph)


def embedding_of(graph: onnx.GraphProto, weight: str, store: TensorStore = MEMORY) -> str | None:
    """Find the embedding that the stored weight of a MatMul is, transposed; None if it is another weight."""
    values = {tensor.name: tensor for tensor in graph.initializer}
    embeddings = {node.input[0] for node in graph.node if node.op_type == "Gather" and node.input[0] in values}
    stored = values.get(weight)
    same = (name for name in sorted(embeddings) if stored and _is_transposed(stored, values[name], store))
    return next(same, None)


def find(graph: onnx.ModelProto, weights: Mapping[str, Floats], store: TensorStore = MEMORY) -> dict[str, LayerMatMul]:
    """Find the MatMul of each layer by its path, in float32. ``weights``: by path, shape ``(out, in)``. Raises
    ConfigError: no MatMul or several MatMuls have a layer's weight, or two layers have equal weights."""
    values = {tensor.name: tensor for tensor in graph.graph.initializer}
    matmuls = [node for node in graph.graph.node if _weight_name(node) in values]
    layers = {}
    for path, weight in weights.items():
        same = [node for node in matmuls if _has_weight(node, values[_weight_name(node)], weight, store)]
        if len(same) != 1:
            reason = f"{path}: its weight is in {len(same)} MatMuls of the exported graph, not in one"
            raise ConfigError(reason, about=path)
        (out, width), y = weight.shape, same[0].output[0]
        end, bias = _end(graph.graph, y, values, int(out))
        layers[path] = LayerMatMul(same[0].input[0], y, int(width), int(out), end, bias)
    if len({layer.y for layer in layers.values()}) != len(layers):
        raise ConfigError("two layers with equal weights cannot be distinguished in the graph", about="weights")
    return layers


def insert_lora(graph: onnx.ModelProto, layers: Mapping[str, LayerMatMul]) -> dict[str, tuple[str, ...]]:
    """Add ``(x @ A) @ B`` to the output of each layer's MatMul, in place; A and B are inputs of the graph. ``graph``
    may be quantized, which keeps the names of what MatMuls read and return. Returns the slots with their dimensions as
    text, the rank of A and B being symbolic, in the order of ``layers``."""
    paths = {layer.y: path for path, layer in layers.items()}
    nodes = []
    for node in graph.graph.node:
        nodes.append(node)
        if node.output and (path := paths.get(node.output[0])) is not None:
            nodes.extend(_lora_nodes(node, path, layers[path].x))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    slots: dict[str, tuple[str, ...]] = {}
    for number, (path, layer) in enumerate(layers.items()):
        slots[path + LORA_A] = (str(layer.width), f"rank_{number}")
        slots[path + LORA_B] = (f"rank_{number}", str(layer.out))
    graph.graph.input.extend(slot_input(name, dimensions) for name, dimensions in slots.items())
    return slots


def merge(graph: onnx.ModelProto, store: TensorStore = MEMORY) -> dict[str, list[int]]:
    """Merge the blockwise MatMuls that read the same input with the same settings, in place; every output stays equal.

    Queries, keys and values, or the two halves of a gated layer, become one MatMulNBits and a Split. Each MatMul starts
    all threads, which takes a good part of the time of a single token. Blockwise weights are stored row by row, so
    their rows are concatenated and each output keeps its exact value and name. Returns for each concatenated
    initializer the rows of its parts."""
    values = {tensor.name: tensor for tensor in graph.graph.initializer}
    groups: dict[object, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits" and all(name in values for name in node.input[1:]):
            key = node.input[0], len(node.input), tuple(sorted((a.name, a.i) for a in node.attribute if a.name != "N"))
            groups.setdefault(key, []).append(node)
    merged = {group[0].output[0]: group for group in groups.values() if len(group) > 1}
    removed = {node.output[0] for group in merged.values() for node in group[1:]}
    nodes, parts = [], dict[str, list[int]]()
    for node in graph.graph.node:
        if node.output[0] in merged:
            nodes.extend(_merged(graph.graph, group := merged[node.output[0]], values, store))
            rows = [next(a.i for a in each.attribute if a.name == "N") for each in group]
            parts |= dict.fromkeys(nodes[-2].input[1:], rows)
        elif node.output[0] not in removed:
            nodes.append(node)
    replace_nodes(graph.graph, nodes)
    return parts


def import_contrib(graph: onnx.ModelProto) -> None:
    if CONTRIB not in {entry.domain for entry in graph.opset_import}:
        graph.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def replace_nodes(graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto]) -> None:
    """Give ``graph`` these nodes, in place, and remove the initializers that none of them reads."""
    copies = [copy.deepcopy(node) for node in nodes]  # the originals may belong to the list that is cleared
    del graph.node[:]
    graph.node.extend(copies)
    used = {name for node in copies for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _transposes_matrix(node: onnx.NodeProto, stored: Mapping[str, TensorProto]) -> bool:
    order = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return len(stored[node.input[0]].dims) == 2 and order in ([], [[1, 0]])


def _is_linear(node: onnx.NodeProto) -> bool:
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    settings = plain | {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return settings == plain | {"transB": 1}


def _linear(node: onnx.NodeProto, weight: str) -> list[onnx.NodeProto]:
    result = node.output[0]
    if len(node.input) == 2:
        return [helper.make_node("MatMul", [node.input[0], weight], [result], node.name)]
    product = f"{result}_matmul"
    return [
        helper.make_node("MatMul", [node.input[0], weight], [product], f"{node.name}_matmul"),
        helper.make_node("Add", [product, node.input[2]], [result], node.name),
    ]


def _is_transposed(weight: TensorProto, embedding: TensorProto, store: TensorStore) -> bool:
    if list(weight.dims) != list(embedding.dims)[::-1]:
        return False
    return equal(store.array(weight).T, store.array(embedding))


def _weight_name(node: onnx.NodeProto) -> str:
    return str(node.input[1]) if node.op_type in ("MatMul", "FusedMatMul") else ""


def _has_weight(node: onnx.NodeProto, stored: TensorProto, weight: Floats, store: TensorStore) -> bool:
    expected = weight if node.op_type == "FusedMatMul" else weight.T
    if tuple(stored.dims) != expected.shape:
        return False
    return equal(store.array(stored), expected)


def equal(one: Floats, other: Floats) -> bool:
    """Compare two matrices of one shape some rows at a time: most differ in the first ones."""
    starts = range(0, len(one), ROWS)
    return all(np.array_equal(one[start : start + ROWS], other[start : start + ROWS]) for start in starts)


def _end(graph: onnx.GraphProto, y: str, values: Mapping[str, TensorProto], out: int) -> tuple[str, str | None]:
    """Find the output of a layer, and its bias, if only the addition of one reads the MatMul's output ``y``."""
    readers = [node for node in graph.node if y in node.input]
    if len(readers) == 1 and readers[0].op_type == "Add":
        for name in readers[0].input:
            if name in values and list(values[name].dims) == [out]:
                return readers[0].output[0], name
    return y, None


def _lora_nodes(node: onnx.NodeProto, path: str, x: str) -> list[onnx.NodeProto]:
    """Make the nodes that follow ``node``, whose output is renamed in place."""
    result, base = node.output[0], f"{path}.base"
    node.output[0] = base
    low, update = f"{path}.lora_A", f"{path}.lora_B"
    return [
        helper.make_node("MatMul", [x, path + LORA_A], [low], low),
        helper.make_node("MatMul", [low, path + LORA_B], [update], update),
        helper.make_node("Add", [base, update], [result], f"{path}.add"),
    ]


def slot_input(name: str, dimensions: Sequence[str]) -> onnx.ValueInfoProto:
    sizes = [int(text) if text.isdigit() else text for text in dimensions]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def _merged(
    graph: onnx.GraphProto, group: Sequence[onnx.NodeProto], values: Mapping[str, TensorProto], store: TensorStore
) -> list[onnx.NodeProto]:
    """Replace ``group`` by one MatMulNBits and a Split behind it; adds their initializers to ``graph``."""
    settings = {a.name: a.i for a in group[0].attribute}
    rows = [next(a.i for a in node.attribute if a.name == "N") for node in group]
    outputs = [node.output[0] for node in group]
    joined = "+".join(outputs)
    inputs = range(1, len(group[0].input))
    stored = [_concatenated(graph, [values[node.input[i]] for node in group], store) for i in inputs]
    graph.initializer.append(numpy_helper.from_array(np.array(rows), f"{joined}_rows"))
    product = helper.make_node(
        "MatMulNBits", [group[0].input[0], *stored], [joined], joined, domain=CONTRIB, **settings | {"N": sum(rows)}
    )
    return [product, helper.make_node("Split", [joined, f"{joined}_rows"], outputs, f"{joined}_split", axis=-1)]


def _concatenated(graph: onnx.GraphProto, parts: Sequence[TensorProto], store: TensorStore) -> str:
    """Concatenate the rows of all ``parts`` under one name; layers that share weights share these rows too."""
    name = "+".join(part.name for part in parts)
    if all(tensor.name != name for tensor in graph.initializer):
        graph.initializer.append(store.tensor(np.concatenate([store.array(part) for part in parts]), name))
    return name
