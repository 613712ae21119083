"""Slots for vectors in a graph without them: scales and offsets at layers, and parameters that an adapter may replace.
They are for language models, whose graphs are built before they get slots. ``peftmodel.py`` does the same for
classifiers."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from aggregation.errors import ConfigError
from edgeadapt.formats.graphinputs import (
    ACTIVATIONS,
    BOTTLENECK,
    INPUT_SCALE,
    OFFSET,
    OUTPUT_SCALE,
    RANKED,
    REPLACED,
    dimensions_of,
    layer_of,
    vector_site,
)
from edgeadapt.formats.layout import Floats
from export.onnx.matmuls import LayerMatMul, replace_nodes, slot_input
from export.onnx.tensorstore import MEMORY, TensorStore

Dimensions = dict[str, tuple[str, ...]]
CONSTANTS = {
    "vector_padding": np.array([0, 1]),  # a row at the end
    "vector_axis": np.array([-2]),  # whatever the rank: a slot may have a first dimension for the rows of a batch
    "vector_first": np.array([0]),
    "vector_zeroth": np.array(0),  # without the dimension of the rows
    "vector_one": np.array(1.0, np.float32),
    "vector_zero": np.array(0.0, np.float32),
}


def scale_inputs(graph: onnx.ModelProto, layers: Mapping[str, LayerMatMul], names: Sequence[str]) -> None:
    """Let each layer that has an input scale among ``names`` read its scaled input, in place. ``graph`` is in float32
    (quantization stores what a MatMul reads in several forms), ``layers`` from ``matmuls.find``, and ``names`` are all
    vectors of the base."""
    chosen = {layers[layer_of(name)].y: name for name in names if name.endswith(INPUT_SCALE)}
    nodes = [node for name in chosen.values() for node in _given(name, "vector_one")]
    stated = {value.name: value for value in graph.graph.value_info}
    for node in graph.graph.node:
        name = chosen.get(node.output[0]) if node.output else None
        if name is not None:
            scaled = f"{name}.scaled"
            if node.input[0] in stated:  # some layers read two dimensions, which quantization has to know
                same = onnx.ValueInfoProto()
                same.CopyFrom(stated[node.input[0]])
                same.name = scaled
                graph.graph.value_info.append(same)
            nodes.append(helper.make_node("Mul", [node.input[0], f"{name}.first"], [scaled], scaled))
            node.input[0] = scaled
        nodes.append(node)
    _finish(graph, nodes)
    slots = _slots(names, layers, {})
    graph.graph.input.extend(slot_input(name, slots[name]) for name in chosen.values())


def insert_vectors(
    graph: onnx.ModelProto,
    layers: Mapping[str, LayerMatMul],
    names: Sequence[str],
    parameters: Mapping[str, Floats],
    store: TensorStore = MEMORY,
) -> Dimensions:
    """Add the other vectors, in place, and make all of ``names`` inputs of the graph, which may be quantized.

    ``layers``, from ``matmuls.find``, has every layer with a vector; ``parameters`` has every vector among the base's
    parameters. Returns the slots with their dimensions. Raises ConfigError: a parameter cannot be found in the graph.
    """
    first = [
        node for name in names if name.endswith(REPLACED) for node in _replaced(graph, layers, name, parameters, store)
    ]
    changing = [name for name in names if name.endswith((OUTPUT_SCALE, OFFSET, *BOTTLENECK))]
    ends = {layers[layer_of(name)].end: layer_of(name) for name in changing}
    chosen = set(names)
    nodes = []
    for node in graph.graph.node:
        nodes.append(node)
        if node.output and (path := ends.get(node.output[0])) is not None:
            nodes.extend(_changed(node, path, chosen))
    for name in changing:
        if not name.endswith(RANKED):
            first += _given(name, "vector_one" if name.endswith(OUTPUT_SCALE) else "vector_zero")
    _finish(graph, [*first, *nodes])
    slots = _slots(names, layers, parameters)
    present = {value.name for value in graph.graph.input}
    graph.graph.input.extend(slot_input(name, dims) for name, dims in slots.items() if name not in present)
    return slots


def _slots(names: Sequence[str], layers: Mapping[str, LayerMatMul], parameters: Mapping[str, Floats]) -> Dimensions:
    return {n: dimensions_of(n, number, _width(n, layers, parameters)) for number, n in enumerate(names)}


def _width(name: str, layers: Mapping[str, LayerMatMul], parameters: Mapping[str, Floats]) -> int:
    if name.endswith(REPLACED):
        return len(parameters.get(vector_site(name), ()))
    layer = layers[layer_of(name)]
    return layer.width if name.endswith(INPUT_SCALE) else layer.out


def _given(name: str, neutral: str) -> list[onnx.NodeProto]:
    """Make ``name.first``: what an adapter gives, or else the neutral value, as in ``peftmodel``."""
    both, first = f"{name}.both", f"{name}.first"
    return [
        helper.make_node("Pad", [name, "vector_padding", neutral, "vector_axis"], [both], both, mode="constant"),
        helper.make_node("Gather", [both, "vector_first"], [first], first, axis=-2),
    ]


def _changed(node: onnx.NodeProto, path: str, chosen: set[str]) -> list[onnx.NodeProto]:
    """Make the nodes that follow ``node``, the last of a layer, whose output is renamed in place."""
    result, now = node.output[0], f"{path}.plain"
    node.output[0] = now
    kinds = [(kind, op) for kind, op in ((OUTPUT_SCALE, "Mul"), (OFFSET, "Add")) if path + kind in chosen]
    values = [(f"{path}{kind}.first", op) for kind, op in kinds]
    nodes = []
    for method in (each for each in ACTIVATIONS if f"{path}.{each}_down" in chosen):
        nodes += _bottleneck(f"{path}.{method}", method, now)
        values.append((f"{path}.{method}.added", "Add"))
    for value, op in values:
        after = result if value == values[-1][0] else f"{value}.applied"
        nodes.append(helper.make_node(op, [now, value], [after], f"{value}.applied"))
        now = after
    return nodes


def _bottleneck(adapter: str, method: str, y: str) -> list[onnx.NodeProto]:
    """Make ``ADAPTER.added`` of the output ``y`` of a layer, as ``edgeadapt.methods.bottleneck.change``."""
    low, wide, node = f"{adapter}.low", f"{adapter}.wide", helper.make_node
    if (activation := ACTIVATIONS[method]) == "swish":
        bent = [node("Sigmoid", [f"{low}.sum"], [f"{low}.gate"]), node("Mul", [f"{low}.sum", f"{low}.gate"], [low])]
    else:
        bent = [node(activation.capitalize(), [f"{low}.sum"], [low], low)]
    return [
        node("MatMul", [y, f"{adapter}_down"], [f"{low}.product"], f"{low}.product"),
        node("Add", [f"{low}.product", f"{adapter}_down_bias"], [f"{low}.sum"], f"{low}.sum"),
        *bent,
        node("MatMul", [low, f"{adapter}_up"], [wide], wide),
        node("Add", [wide, f"{adapter}_up_bias.first"], [f"{adapter}.added"], f"{adapter}.added"),
    ]


def _replaced(
    graph: onnx.ModelProto,
    layers: Mapping[str, LayerMatMul],
    name: str,
    parameters: Mapping[str, Floats],
    store: TensorStore,
) -> list[onnx.NodeProto]:
    """Make ``name.chosen``, which nodes read from now on: the first row of what an adapter gives and the own."""
    path, chosen = vector_site(name), f"{name}.chosen"
    layer = layers.get(layer_of(name)) if path.endswith(".bias") else None
    own = layer.bias if layer is not None else _initializer(graph, path, parameters, store)
    if own is None:
        raise ConfigError(f"{path}: the exported graph has no such bias", about=path)
    value = next(store.array(tensor) for tensor in graph.graph.initializer if tensor.name == own)
    graph.graph.initializer.append(store.tensor(value[None].copy(), f"{name}.own"))
    for node in graph.graph.node:
        if layer is None or node.output[0] == layer.end:  # layers may share a bias
            node.input[:] = [chosen if read == own else read for read in node.input]
    both = f"{name}.both"
    return [
        helper.make_node("Concat", [name, f"{name}.own"], [both], both, axis=0),
        helper.make_node("Gather", [both, "vector_zeroth"], [chosen], chosen, axis=0),
    ]


def _initializer(graph: onnx.ModelProto, path: str, parameters: Mapping[str, Floats], store: TensorStore) -> str:
    """Find the stored tensor of a parameter: the only one with its values, or the one of these that has its name.
    Exporters may store equal tensors once; then one layer's cannot be replaced alone."""
    value = parameters[path]
    vectors = [tensor for tensor in graph.graph.initializer if list(tensor.dims) == [len(value)]]
    same: list[str] = [
        tensor.name
        for tensor in vectors
        if tensor.data_type == onnx.TensorProto.FLOAT and np.array_equal(store.array(tensor), value)
    ]
    equal = sum(np.array_equal(value, other) for other in parameters.values())
    named = [name for name in same if name == path or name.endswith(f".{path}")]
    matching = same if equal == 1 else named if len(same) >= equal else []
    if len(matching) != 1:
        raise ConfigError(
            f"{path}: its values are in {len(same)} vectors of the exported graph, so an adapter cannot replace them",
            about=path,
        )
    return matching[0]


def _finish(graph: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    present = {tensor.name for tensor in graph.graph.initializer}
    read = {name for node in nodes for name in node.input}
    graph.graph.initializer.extend(
        numpy_helper.from_array(value, name) for name, value in CONSTANTS.items() if name in read - present
    )
    replace_nodes(graph.graph, nodes)
