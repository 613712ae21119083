"""Reverse-mode differentiation of an ONNX graph, into an ONNX graph of ordinary operators.

The nodes of the forward pass stay, and those of the backward pass follow over the same initializers (Griewank and
Walther 2008, "Evaluating Derivatives", section 3.2). Shapes may be symbolic: where two cannot be shown to agree, the
graph computes at run time along which dimensions a gradient is summed. Each result is held to torch's gradients
(``export.parity.training``).
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from aggregation.errors import ConfigError
from edgeadapt.bases.traininggraph import GRADIENT
from export.onnx.backward import Backward
from export.onnx.derivatives import CONSTANT, rule_of
from export.onnx.matmuls import replace_nodes


def differentiate(graph: onnx.ModelProto, value: str, by: Sequence[str]) -> onnx.ModelProto:
    """Copy ``graph``, in float32 and of ONNX's default domain, with a scalar ``value`` and its gradients as outputs.

    The gradient by each input in ``by``, on which ``value`` depends, is named after it, with ``GRADIENT``, and has its
    shape. Raises ConfigError: an operator between them has no derivative here, or ``value`` does not depend on an
    input.
    """
    result = shape_inference.infer_shapes(graph, data_prop=True)
    inner = result.graph
    _slice(inner)
    gradients, to = _gradients(inner, value, by)
    if missing := [name for name in by if name not in gradients]:
        raise ConfigError(f"the answer does not depend on {missing[0]!r}, so it has no gradient", about=missing[0])
    for name in by:
        to.named("Identity", name + GRADIENT, gradients[name])
    inner.node.extend(to.nodes)
    inner.initializer.extend(to.constants.values())
    stated = {each.name: each.type.tensor_type.shape.dim for each in inner.input}
    outputs: list[tuple[str, list[int | str]]] = [(value, [])]
    outputs += [(name + GRADIENT, [d.dim_param or d.dim_value for d in stated[name]]) for name in by]
    del inner.output[:], inner.value_info[:]
    inner.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs)
    return result


def _slice(graph: onnx.GraphProto) -> None:
    """Replace each split into parts of inferred sizes by slices, in place: a rule is of one output."""
    dims = {value.name: value.type.tensor_type.shape.dim for value in graph.value_info}
    nodes = list[onnx.NodeProto]()
    for node in graph.node:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        is_sized = node.op_type == "Split" and all(name in dims for name in node.output)
        sizes = [dims[name][axis].dim_value for name in node.output] if is_sized else []
        if not all(sizes) or not sizes:
            nodes.append(node)
            continue
        for output, end, size in zip(node.output, np.cumsum(sizes), sizes, strict=True):
            places = {"start": end - size, "end": end, "axis": axis}
            names = [f"{output}_{name}" for name in places]
            values = (np.array([place], np.int64) for place in places.values())
            graph.initializer.extend(map(numpy_helper.from_array, values, names))
            nodes.append(helper.make_node("Slice", [node.input[0], *names], [output], output))
    replace_nodes(graph, nodes)


def _gradients(graph: onnx.GraphProto, value: str, by: Sequence[str]) -> tuple[dict[str, str], Backward]:
    """Name the gradient of each value that depends on ``by``, and add the nodes that compute them."""
    to, active = Backward(graph), set(by)
    for node in graph.node:
        if node.op_type not in CONSTANT and active.intersection(node.input):
            active.update(node.output)
    gradients = {value: to.constant(np.float32(1))} if value in active else {}
    for node in reversed(graph.node):
        wanted = {number for number, source in enumerate(node.input) if source in active}
        if not wanted or node.output[0] not in gradients:
            continue
        for number, gradient in rule_of(node)(to, node, gradients[node.output[0]], wanted).items():
            source = node.input[number]
            gradients[source] = to.add("Add", gradients[source], gradient) if source in gradients else gradient
    return gradients, to
