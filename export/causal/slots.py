"""Slots in a finished graph: which product of matrices is which layer of the model, and the LoRA pair beside it.

A layer's product is found by its weight, not by a name: whatever an exporter calls its nodes, the matrix that it
multiplies with is the layer's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from adapters.layout import Floats
from adapters.ondevice import LORA_A, LORA_B
from aggregation.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Product:
    """Where a layer multiplies: what it reads, what it gives before its bias, and the widths of both."""

    x: str
    y: str
    wide: int
    out: int


def find(graph: onnx.ModelProto, weights: Mapping[str, Floats]) -> dict[str, Product]:
    """The product of each layer, by the layer's path.

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
        out, wide = weight.shape
        found[path] = Product(same[0].input[0], same[0].output[0], int(wide), int(out))
    if len({product.y for product in found.values()}) != len(found):
        raise ConfigError("two layers with equal weights cannot be told apart in the exported graph")
    return found


def insert(graph: onnx.ModelProto, products: Mapping[str, Product]) -> dict[str, tuple[str, ...]]:
    """Add ``(x @ A) @ B`` to each layer's product, in place, A and B being inputs of the graph.

    Args:
        graph: May be quantized; what products read and give keeps its names.
        products: What ``find`` returned.

    Returns:
        The slots with their dimensions as text, A's and B's rank free, in the order of ``products``.
    """
    paths = {product.y: path for path, product in products.items()}
    nodes = []
    for node in graph.graph.node:
        nodes.append(node)
        if node.output and (path := paths.get(node.output[0])) is not None:
            nodes.extend(_pair(node, path, products[path].x))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    slots: dict[str, tuple[str, ...]] = {}
    for number, (path, product) in enumerate(products.items()):
        slots[path + LORA_A] = (str(product.wide), f"rank_{number}")
        slots[path + LORA_B] = (f"rank_{number}", str(product.out))
    graph.graph.input.extend(_input(name, dimensions) for name, dimensions in slots.items())
    return slots


def _pair(node: onnx.NodeProto, path: str, x: str) -> list[onnx.NodeProto]:
    """The nodes behind ``node``, whose own output is renamed in place."""
    result, bare = node.output[0], f"{path}.base"
    node.output[0] = bare
    low, update = f"{path}.lora_A", f"{path}.lora_B"
    return [
        helper.make_node("MatMul", [x, path + LORA_A], [low], low),
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
