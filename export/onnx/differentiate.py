"""Reverse-mode differentiation of an ONNX graph, into an ONNX graph of ordinary operators.

The nodes of the forward pass stay, and those of the backward pass follow over the same initializers (Griewank and
Walther 2008, "Evaluating Derivatives", section 3.2). Shapes may be symbolic: where two cannot be shown to agree, the
graph computes at run time along which dimensions a gradient is summed. Each result is held to torch's gradients
(``export.parity.training``).
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, shape_inference

from adapters.traininggraph import GRADIENT
from aggregation.errors import ConfigError
from export.onnx.backward import Backward
from export.onnx.derivatives import CONSTANT, rule_of


def differentiate(graph: onnx.ModelProto, value: str, by: Sequence[str]) -> onnx.ModelProto:
    """A copy of ``graph`` that returns a value and its gradients.

    Args:
        graph: In float32 and of ONNX's default domain, with its weights.
        value: The name of a scalar that it computes.
        by: Inputs on which ``value`` depends.

    Returns:
        A graph whose outputs are ``value`` and, for each input in ``by``, its gradient: named after the input, with
        ``GRADIENT``, and of its shape.

    Raises:
        ConfigError: An operator between them has no derivative here, or ``value`` does not depend on an input.
    """
    result = shape_inference.infer_shapes(graph, data_prop=True)
    inner = result.graph
    found, to = _gradients(inner, value, by)
    if missing := [name for name in by if name not in found]:
        raise ConfigError(f"the answer does not depend on {missing[0]!r}, so it has no gradient", about=missing[0])
    for name in by:
        to.named("Identity", name + GRADIENT, found[name])
    inner.node.extend(to.nodes)
    inner.initializer.extend(to.constants.values())
    stated = {each.name: each.type.tensor_type.shape.dim for each in inner.input}
    outputs: list[tuple[str, list[int | str]]] = [(value, [])]
    outputs += [(name + GRADIENT, [d.dim_param or d.dim_value for d in stated[name]]) for name in by]
    del inner.output[:], inner.value_info[:]
    inner.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs)
    return result


def _gradients(graph: onnx.GraphProto, value: str, by: Sequence[str]) -> tuple[dict[str, str], Backward]:
    """The name of the gradient of each value that depends on ``by``, and the nodes that compute them."""
    to, active = Backward(graph), set(by)
    for node in graph.node:
        if node.op_type not in CONSTANT and active.intersection(node.input):
            active.update(node.output)
    found = {value: to.constant(np.float32(1))} if value in active else {}
    for node in reversed(graph.node):
        wanted = {number for number, source in enumerate(node.input) if source in active}
        if not wanted or node.output[0] not in found:
            continue
        for number, gradient in rule_of(node)(to, node, found[node.output[0]], wanted).items():
            source = node.input[number]
            found[source] = to.add("Add", found[source], gradient) if source in found else gradient
    return found, to
