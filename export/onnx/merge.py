"""Products of one input made one product: queries, keys and values, or the two halves of a gated layer.

Each product starts all threads, which for one token is a good part of its time; the parts are split off behind it. Only
products by blocks are merged: their weights lie row by row, so rows are put one after another and keep their numbers.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from export.onnx.quantize import CONTRIB, put_nodes


def merge(graph: onnx.ModelProto) -> None:
    """Merge products by blocks that read the same input with the same settings, in place; the answers stay the same.

    What products read and give keeps its names.
    """
    values = {tensor.name: tensor for tensor in graph.graph.initializer}
    groups: dict[object, list[onnx.NodeProto]] = {}
    for node in graph.graph.node:
        if node.op_type == "MatMulNBits" and all(name in values for name in node.input[1:]):
            groups.setdefault(_kind(node), []).append(node)
    merged = {group[0].output[0]: group for group in groups.values() if len(group) > 1}
    gone = {node.output[0] for group in merged.values() for node in group[1:]}
    nodes = []
    for node in graph.graph.node:
        if node.output[0] in merged:
            nodes.extend(_one(graph.graph, merged[node.output[0]], values))
        elif node.output[0] not in gone:
            nodes.append(node)
    put_nodes(graph.graph, nodes)


def _kind(node: onnx.NodeProto) -> object:
    """What products must have in common: the input, its width and the form of the weights."""
    return node.input[0], len(node.input), tuple(sorted((a.name, a.i) for a in node.attribute if a.name != "N"))


def _one(
    graph: onnx.GraphProto, group: Sequence[onnx.NodeProto], values: Mapping[str, TensorProto]
) -> list[onnx.NodeProto]:
    """The product of a group and the node that splits it, whose constants are added to ``graph``."""
    settings = {a.name: a.i for a in group[0].attribute}
    rows = [next(a.i for a in node.attribute if a.name == "N") for node in group]
    whole = "+".join(node.output[0] for node in group)
    stored = [_joined(graph, [values[node.input[place]] for node in group]) for place in range(1, len(group[0].input))]
    graph.initializer.append(numpy_helper.from_array(np.array(rows), f"{whole}_rows"))
    product = helper.make_node(
        "MatMulNBits", [group[0].input[0], *stored], [whole], whole, domain=CONTRIB, **settings | {"N": sum(rows)}
    )
    outputs = [node.output[0] for node in group]
    return [product, helper.make_node("Split", [whole, f"{whole}_rows"], outputs, f"{whole}_split", axis=-1)]


def _joined(graph: onnx.GraphProto, parts: Sequence[TensorProto]) -> str:
    """The name of the rows of all ``parts``, which layers that share weights share again."""
    name = "+".join(part.name for part in parts)
    if all(tensor.name != name for tensor in graph.initializer):
        rows = np.concatenate([numpy_helper.to_array(part) for part in parts])
        graph.initializer.append(numpy_helper.from_array(rows, name))
    return name
