"""Every product of an activation and a weight as one MatMul whose weight is stored as it is multiplied.

Quantization and slots look for that form (``quantize.py``, ``causal/slots.py``); what torch exports has others too.
"""

from collections.abc import Mapping

import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn
from transformers.pytorch_utils import Conv1D


def replace_conv1d(root: nn.Module) -> None:
    """Put a Linear in the place of each Conv1D, in place: GPT-2's name for a linear layer with its weight turned."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Conv1D:
                setattr(parent, name, as_linear(child))


def as_linear(layer: Conv1D) -> nn.Linear:
    """The same layer as torch has it. Shares the bias, and copies the weight."""
    wide, out = layer.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(wide, out)
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear


def normalize(graph: onnx.ModelProto) -> None:
    """Turn weights once instead of at each start, and Gemm into MatMul and Add, in place; the answers stay the same."""
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    turned: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.graph.node:
        if node.op_type == "Transpose" and node.input[0] in stored and _turns_a_matrix(node, stored):
            turned[node.output[0]] = node.input[0]
        elif node.op_type == "Gemm" and _is_layer(node) and node.input[1] in stored:
            weight = f"{node.input[1]}_turned"
            turned[weight] = node.input[1]
            nodes.extend(_layer(node, weight))
        else:
            nodes.append(node)
    for name, source in turned.items():
        graph.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(stored[source]).T.copy(), name))
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.graph.initializer if tensor.name in used]
    del graph.graph.initializer[:]
    graph.graph.initializer.extend(kept)


def _turns_a_matrix(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    order = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return len(stored[node.input[0]].dims) == 2 and order in ([], [[1, 0]])


def _is_layer(node: onnx.NodeProto) -> bool:
    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    settings = plain | {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return settings == plain | {"transB": 1}


def _layer(node: onnx.NodeProto, weight: str) -> list[onnx.NodeProto]:
    result = node.output[0]
    if len(node.input) == 2:
        return [helper.make_node("MatMul", [node.input[0], weight], [result], node.name)]
    bare = f"{result}_product"
    return [
        helper.make_node("MatMul", [node.input[0], weight], [bare], f"{node.name}_product"),
        helper.make_node("Add", [bare, node.input[2]], [result], node.name),
    ]
