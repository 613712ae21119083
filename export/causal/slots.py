"""Slots in a finished graph: which product of matrices is which layer of the model, and the LoRA pair beside it.

A layer's product is found by its weight, not by a name: whatever an exporter calls its nodes, the matrix that it
multiplies with is the layer's own.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from adapters.layout import Floats
from adapters.ondevice import LORA_A, LORA_B
from aggregation.errors import ConfigError


def find(graph: onnx.ModelProto, weights: Mapping[str, Floats]) -> dict[str, str]:
    """The output of each layer's product, without its bias.

    Args:
        graph: In float32, its weights in it.
        weights: The weight of each layer by its path, shape ``(out, in)``.

    Raises:
        ConfigError: A layer's weight is multiplied nowhere, or in several places.
    """
    values = {tensor.name: tensor for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if _weight_of(node) in values]
    found = {}
    for path, weight in weights.items():
        same = [node for node in products if _is(node, values[_weight_of(node)], weight)]
        if len(same) != 1:
            raise ConfigError(f"{path}: its weight is in {len(same)} products of the exported graph, not in one")
        found[path] = same[0].output[0]
    if len(set(found.values())) != len(found):
        raise ConfigError("two layers with equal weights cannot be told apart in the exported graph")
    return found


def insert(graph: onnx.ModelProto, outputs: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Add ``(x @ A) @ B`` to each layer's product, in place, A and B being inputs of the graph.

    Args:
        graph: May be quantized; the outputs keep their names.
        outputs: What ``find`` returned.

    Returns:
        The slots with their dimensions as text, A's and B's rank free, in the order of ``outputs``.
    """
    paths = {output: path for path, output in outputs.items()}
    widths = {path: _widths(graph, output) for path, output in outputs.items()}
    nodes = []
    for node in graph.graph.node:
        nodes.append(node)
        if node.output and (path := paths.get(node.output[0])) is not None:
            nodes.extend(_pair(node, path))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    slots: dict[str, tuple[str, ...]] = {}
    for number, (path, (wide, out)) in enumerate(widths.items()):
        slots[path + LORA_A] = (str(wide), f"rank_{number}")
        slots[path + LORA_B] = (f"rank_{number}", str(out))
    graph.graph.input.extend(_input(name, dimensions) for name, dimensions in slots.items())
    return slots


def _pair(node: onnx.NodeProto, path: str) -> list[onnx.NodeProto]:
    """The nodes behind ``node``, whose own output is renamed in place."""
    result, bare = node.output[0], f"{path}.base"
    node.output[0] = bare
    low, update = f"{path}.lora_A", f"{path}.lora_B"
    return [
        helper.make_node("MatMul", [node.input[0], path + LORA_A], [low], low),
        helper.make_node("MatMul", [low, path + LORA_B], [update], update),
        helper.make_node("Add", [bare, update], [result], f"{path}.add"),
    ]


def _input(name: str, dimensions: Sequence[str]) -> onnx.ValueInfoProto:
    sizes = [int(text) if text.isdigit() else text for text in dimensions]
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes)


def _weight_of(node: onnx.NodeProto) -> str:
    return str(node.input[1]) if node.op_type in ("MatMul", "FusedMatMul") else ""


def _is(node: onnx.NodeProto, stored: onnx.TensorProto, weight: Floats) -> bool:
    turned = node.op_type == "FusedMatMul"
    if tuple(stored.dims) != (weight.shape if turned else weight.shape[::-1]):
        return False
    value = numpy_helper.to_array(stored)
    return bool(np.array_equal(value if turned else value.T, weight))


def _widths(graph: onnx.ModelProto, output: str) -> tuple[int, int]:
    """What goes into a product and what comes out of it."""
    node = next(node for node in graph.graph.node if output in node.output)
    if node.op_type == "MatMulNBits":
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        return attributes["K"], attributes["N"]
    dims = next(tensor.dims for tensor in graph.graph.initializer if tensor.name == node.input[1])
    return (dims[1], dims[0]) if node.op_type == "FusedMatMul" else (dims[0], dims[1])
