"""A decoder that goes on from the states below all slots: a chat that changes its adapter keeps what is below.

The layers below become a branch. Where ``KEPT_RANGE`` is not empty, the other branch returns these states, and the KV
cache of these layers as it is: the runtime writes it into one buffer, which still has the tokens that were read before.
"""

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgeadapt.bases.states import KEPT_RANGE, KEPT_STATES, STATES
from export.onnx import cut
from export.onnx.graph import ANSWER
from export.onnx.segments import reads

PAST, PRESENT = "past_key_values", "present"  # begin the names of the KV cache before a run, and after it
# Adds two inputs, and normalizes; the last one of its four outputs is the sum.
FUSED, FUSED_OUTPUTS = "SkipSimplifiedLayerNormalization", 4
BEGIN, END, SOME, ZERO, ONE = (f"{KEPT_RANGE}/{name}" for name in ("begin", "end", "some", "0", "1"))


def keep_states(graph: onnx.ModelProto, slots: Collection[str], width: int) -> bool:
    """Let ``graph`` return ``STATES`` of its tokens, ``(batch, sequence, width)``, and go on from ``KEPT_STATES`` of
    ``(1, kept, width)``, in place. Its other outputs are the same bit for bit.

    Its KV cache has to be one buffer. Returns False, and changes nothing, if the graph cannot be cut.
    """
    inner, nodes = graph.graph, list(graph.graph.node)
    fused = _last_fused(nodes, slots)
    values = {name for node in nodes for name in node.output}
    best = min(cut.cuts(_split(nodes, fused), slots, [ANSWER], values), default=None)
    if best is None or best[0]:
        return False
    states = best[2]
    if fused is not None and states != fused.output[-1]:
        fused = None
    passed = [states] if fused is None else [states, fused.output[0]]  # to the upper layers
    outputs = {value.name: value for value in inner.output}
    above = outputs.keys() & set[str]().union(*(cut.reached(nodes, name) for name in passed))
    if not (cache := [name for name in outputs if name not in above]):
        return False
    upper = cut.needed(nodes, above, passed)
    of_both = {node.output[0] for node in upper}
    lower = [node for node in cut.needed(nodes, [*passed, *cache]) if node.output[0] not in of_both]
    sizes = [size.dim_param or size.dim_value for size in inner.input[0].type.tensor_type.shape.dim]
    types = outputs | {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [*sizes, width]) for name in passed}
    kept = [
        helper.make_node("Slice", [KEPT_STATES, BEGIN, END, ONE], [states]),
        *(helper.make_node("Identity", [name.replace(PRESENT, PAST, 1)], [name]) for name in cache),
    ]
    if fused is not None:  # of a sum with zeros, so that it rounds as below
        again = onnx.NodeProto()
        again.CopyFrom(fused)
        again.input[:] = [states, f"{STATES}/zeros", *fused.input[2:]]
        again.output[:] = [fused.output[0]]
        kept += [helper.make_node("Sub", [states, states], [f"{STATES}/zeros"]), again]
    results = [*passed, *cache]
    branches = {
        "then_branch": _branch("kept", kept, results, types),
        "else_branch": _branch("below", lower, results, types),
    }
    public = {states: STATES}
    chosen = [
        helper.make_node("Gather", [KEPT_RANGE, ZERO], [BEGIN]),
        helper.make_node("Gather", [KEPT_RANGE, ONE], [END]),
        helper.make_node("Less", [BEGIN, END], [SOME]),
        helper.make_node("If", [SOME], [public.get(name, name) for name in results], STATES, **branches),
    ]
    later = set[str]().union(*(cut.reached(upper, name) for name in passed))
    del inner.node[:]
    inner.node.extend(node for node in upper if later.isdisjoint(node.output))
    inner.node.extend(chosen)
    inner.node.extend(_renamed((node for node in upper if not later.isdisjoint(node.output)), public))
    inner.initializer.extend(numpy_helper.from_array(np.array([at]), name) for at, name in enumerate((ZERO, ONE)))
    inner.input.append(helper.make_tensor_value_info(KEPT_STATES, TensorProto.FLOAT, [1, "kept", width]))
    inner.input.append(helper.make_tensor_value_info(KEPT_RANGE, TensorProto.INT64, [2]))
    inner.output.append(helper.make_tensor_value_info(STATES, TensorProto.FLOAT, [*sizes, width]))
    return True


def _last_fused(nodes: Iterable[onnx.NodeProto], slots: Collection[str]) -> onnx.NodeProto | None:
    """Find the last normalization before the first slot that also returns what it normalizes."""
    last = None
    for node in nodes:
        if not reads(node).isdisjoint(slots):
            return last
        if node.op_type == FUSED and len(node.output) == FUSED_OUTPUTS:
            last = node
    return None


def _split(nodes: Iterable[onnx.NodeProto], fused: onnx.NodeProto | None) -> list[onnx.NodeProto]:
    """Write ``fused`` as two nodes, of which the second reads the sum, to find the values on which others depend."""
    if fused is None:
        return list(nodes)
    total = fused.output[-1]
    added = helper.make_node("Add", fused.input[:2], [total])
    normal = helper.make_node("Mul", [total, fused.input[2]], fused.output[:1])
    return [part for node in nodes for part in ([added, normal] if node is fused else [node])]


def _branch(
    name: str, nodes: Iterable[onnx.NodeProto], results: Iterable[str], types: Mapping[str, onnx.ValueInfoProto]
) -> onnx.GraphProto:
    """Make a branch, whose results have other names than those outside."""
    names = {result: f"{name}/{result}" for result in results}
    values = []
    for result, own in names.items():
        value = onnx.ValueInfoProto()
        value.CopyFrom(types[result])
        value.name = own
        values.append(value)
    return helper.make_graph(_renamed(nodes, names), name, [], values)


def _renamed(nodes: Iterable[onnx.NodeProto], names: Mapping[str, str]) -> list[onnx.NodeProto]:
    result = []
    for node in nodes:
        renamed = onnx.NodeProto()
        renamed.CopyFrom(node)
        for values in (renamed.input, renamed.output):
            values[:] = [names.get(value, value) for value in values]
        result.append(renamed)
    return result
