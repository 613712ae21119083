"""A traced graph in two parts: the layers below all slots, whose states no adapter changes, and the layers above them.
The states are one value that every way from the tokens to the first slot passes. What depends on the mask alone is in
both parts. Token ids that the upper part reads otherwise, such as those of lexical features, stay its input."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import reduce

import onnx
from onnx import TensorProto, helper, shape_inference

from aggregation.errors import ConfigError
from edgeadapt.bases.states import STATES
from export.onnx.peftmodel import TOKENS
from export.onnx.segments import reads

IDS, MASK = TOKENS
SIZES = ("Shape", "Size")  # operators whose output does not depend on the values that they read


def states_of(graph: onnx.ModelProto, slots: Collection[str]) -> tuple[str, int]:
    """Find the value at which ``graph`` is cut below the first of ``slots``, and its width. It is the highest of those
    with which the upper part computes least of the ids. Raises ConfigError: there is none."""
    widths, answers = dict(_widths(graph)), [value.name for value in graph.graph.output]
    best = min(cuts(graph.graph.node, slots, answers, widths), default=None)
    if best is None:
        raise ConfigError(
            "the layers below those with slots cannot be separated in this base's graph: export it with --layers 0",
            about="--layers",
        )
    return best[2], widths[best[2]]


def cuts(
    nodes: Sequence[onnx.NodeProto], slots: Collection[str], outputs: Collection[str], values: Collection[str]
) -> Iterator[tuple[int, int, str]]:
    """Yield each of ``values`` at which nodes can be cut, after two numbers: the nodes above it that compute of the
    ids otherwise, and its rank among those values, the nearest to the slots first."""
    for rank, name in enumerate(name for name in _passed(nodes, slots) if name in values):
        again = reached(nodes, IDS, without=name)
        yield sum(not again.isdisjoint(node.output) for node in needed(nodes, outputs, [name])), rank, name


def lower(graph: onnx.ModelProto, states: tuple[str, int]) -> onnx.ModelProto:
    """Return the part of ``graph``, which may be quantized, that computes ``STATES`` from token ids and mask."""
    name, width = states
    inputs = [value for value in graph.graph.input if value.name in TOKENS]
    return _part(graph, needed(graph.graph.node, [name]), {name: STATES}, inputs, [_value(width, inputs[0])])


def upper(graph: onnx.ModelProto, states: tuple[str, int]) -> onnx.ModelProto:
    """Return the part of ``graph`` that computes its outputs from ``STATES``, with its other inputs."""
    name, width = states
    nodes = needed(graph.graph.node, [value.name for value in graph.graph.output], [name])
    sized = [(node, node.op_type == "Shape" and node.input[0] == IDS) for node in nodes]
    kept = {value for node, of_ids in sized if not of_ids for value in reads(node)}
    inputs = [_value(width, {value.name: value for value in graph.graph.input}[IDS])]
    inputs += [value for value in graph.graph.input if value.name != IDS or IDS in kept]
    return _part(graph, nodes, {name: STATES} | ({} if IDS in kept else {IDS: MASK}), inputs, graph.graph.output)


def needed(
    nodes: Sequence[onnx.NodeProto], outputs: Iterable[str], given: Collection[str] = ()
) -> list[onnx.NodeProto]:
    """List the nodes that compute ``outputs`` where the values ``given`` are there, in their order."""
    wanted, kept = set(outputs).difference(given), []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(reads(node).difference(given))
    return kept[::-1]


def _passed(nodes: Sequence[onnx.NodeProto], slots: Collection[str]) -> Iterator[str]:
    """Yield the values that every way from the ids to the first node with a slot passes, the nearest first: the
    dominators of what it reads (Lengauer and Tarjan 1979; in an acyclic graph one pass finds them)."""
    above: dict[str, str] = {}  # value → the nearest that every way to it passes
    depths, slotted = {IDS: 0}, set(slots)

    def common(one: str, other: str) -> str:
        while one != other:
            one, other = (above[one], other) if depths[one] > depths[other] else (one, above[other])
        return one

    for node in nodes:
        read = reads(node)
        passed = [name for name in sorted(read) if name in depths]
        if not slotted.isdisjoint(read):
            if passed:
                name = reduce(common, passed)
                while name != IDS:
                    yield name
                    name = above[name]
                return
            slotted.update(node.output)
        elif passed and node.op_type not in SIZES:
            nearest = reduce(common, passed)
            for output in node.output:
                above[output], depths[output] = nearest, depths[nearest] + 1


def reached(nodes: Sequence[onnx.NodeProto], source: str, without: str = "") -> set[str]:
    """List the values that depend on ``source`` otherwise than through one value."""
    values = {source}
    for node in nodes:
        if node.op_type not in SIZES and not values.isdisjoint(reads(node)):
            values.update(name for name in node.output if name not in ("", without))
    return values


def _widths(graph: onnx.ModelProto) -> Iterator[tuple[str, int]]:
    """Yield the values of three dimensions whose last one is fixed, such as (texts, tokens, width), with that one."""
    for value in shape_inference.infer_shapes(graph, data_prop=True).graph.value_info:
        kind = value.type.tensor_type
        if kind.elem_type == TensorProto.FLOAT and len(kind.shape.dim) == 3 and kind.shape.dim[2].dim_value:
            yield value.name, kind.shape.dim[2].dim_value


def _value(width: int, ids: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    # Pictures have a fixed number of tokens, and states for places.
    sizes = [size.dim_param or "places" for size in ids.type.tensor_type.shape.dim]
    return helper.make_tensor_value_info(STATES, TensorProto.FLOAT, [*sizes, width])


def _part(
    graph: onnx.ModelProto,
    nodes: Iterable[onnx.NodeProto],
    names: dict[str, str],
    inputs: Iterable[onnx.ValueInfoProto],
    outputs: Iterable[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    result = onnx.ModelProto(ir_version=graph.ir_version, opset_import=graph.opset_import, functions=graph.functions)
    result.graph.name = graph.graph.name
    result.graph.node.extend(nodes)
    for node in result.graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(value, value) for value in values]
    used = {name for node in result.graph.node for name in reads(node)}
    result.graph.initializer.extend(tensor for tensor in graph.graph.initializer if tensor.name in used)
    result.graph.input.extend(inputs)
    result.graph.output.extend(outputs)
    result.graph.value_info.extend(value for value in graph.graph.value_info if value.name in used)
    return result
