"""Virtual tokens of a decoder: what prompt tuning, P-tuning and prefix tuning put before a text.

A device puts as many placeholders before a prompt as the adapter has virtual tokens; which tokens they are does not
matter. At these first positions the graph takes what the adapter brings instead of what it would compute: embeddings
(``insert_prompt``; Lester et al. 2021, Liu et al. 2021), or the keys and values of every layer (``insert_prefix``; Li
and Liang 2021). So KV cache, positions and attention mask are those that peft gives, in every runtime.

A batch may be padded after its texts, but not before them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import ArrayLike
from onnx import TensorProto, helper, numpy_helper

from aggregation.errors import ConfigError
from edgeadapt.formats.graphinputs import PREFIX, PROMPT, VIRTUAL
from export.onnx.matmuls import replace_nodes

IDS, MASK = "input_ids", "attention_mask"
LOOKUPS = ("Gather", "GatherBlockQuantized")
PASSES = ("Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze")  # may stand between the ids and their look-up
END = np.iinfo(np.int64).max
FUSED = "GroupQueryAttention"
PARTS = ("key", "value")
Slots = dict[str, tuple[str, ...]]
Makers = Mapping[str, onnx.NodeProto]  # value → the node that returns it


@dataclass(frozen=True, slots=True)
class Embedding:
    """A model's embedding of tokens: rows and width of its weight, and the factor that its module applies to it."""

    rows: int
    width: int
    scale: float = 1.0  # Gemma's is the root of the width


def insert_prompt(graph: onnx.ModelProto, embedding: Embedding) -> Slots:
    """Take the embeddings of the first positions from a slot ``(virtual tokens, width)``; changes ``graph`` in place.
    ``graph`` is a decoder's, of either path, and may be quantized. Returns the slot. Raises ConfigError: the graph does
    not look up embeddings in one place, or does not scale them as the model does."""
    inner = graph.graph
    maker, tokens = _embeddings(inner, embedding), f"{PROMPT}.tokens"
    slot = _Slot(inner, PROMPT, embedding.width)
    shared = slot.taken()
    slot.replaced(tokens, slot.values, 1, maker.output[0])
    maker.output[0] = tokens
    _insert(inner, shared, after={tokens: slot.taken()})
    return _declared(inner, PROMPT, embedding.width)


def insert_prefix(graph: onnx.ModelProto) -> Slots:
    """Take every layer's keys and values of the first positions from a slot; changes ``graph`` in place.

    The slot, which is returned, is peft's tensor, ``(virtual tokens, layers * 2 * heads * width)``. Its keys are those
    of the cache: where the attention operator itself rotates keys, they are rotated back first. ``graph`` is a
    decoder's, of either path, and may be quantized. Raises ConfigError: the keys and values of a layer cannot be found,
    or are rotated in a way that cannot be undone."""
    inner = graph.graph
    makers = {output: node for node in inner.node for output in node.output}
    shapes = {value.name: [d.dim_value for d in value.type.tensor_type.shape.dim] for value in inner.input}
    layers = sum(name.startswith("past_key_values.") and name.endswith(".key") for name in shapes)
    _, heads, _, width = shapes["past_key_values.0.key"]
    size = 2 * layers * heads * width
    slot = _Slot(inner, PREFIX, size)
    if makers["present.0.key"].op_type == FUSED:
        rows, along = _before_rotation(slot, inner, makers["present.0.key"], (layers, heads, width)), 1
    else:
        parts = slot.add("Reshape", [slot.values, slot.constant([0, 0, 2 * layers, heads, width])])
        rows, along = slot.add("Transpose", [parts], perm=[2, 0, 3, 1, 4]), 2
    shared, before = slot.taken(), dict[str, list[onnx.NodeProto]]()
    for number in range(2 * layers):
        layer, part = divmod(number, 2)
        node, place = _reader(makers, layer, part)
        part_rows = slot.add("Gather", [rows, slot.constant(number)], axis=0)
        node.input[place] = slot.replaced(node.input[place], part_rows, along)
        before.setdefault(node.output[0], []).extend(slot.taken())
    _insert(inner, shared, before=before)
    return _declared(inner, PREFIX, size)


def accept_rows(graph: onnx.ModelProto) -> None:
    """Let the prompt of a traced classifier, of shape ``(1, virtual tokens, width)``, lack its first dimension. With
    it, each row of a batch may have a prompt of its own, as with LoRA's A and B. Changes ``graph`` in place."""
    inner = graph.graph
    value = next(value for value in inner.input if value.name == PROMPT)
    width, rows = value.type.tensor_type.shape.dim[2].dim_value, f"{PROMPT}.rows"
    for node in inner.node:
        for place, name in enumerate(node.input):
            if name == PROMPT:
                node.input[place] = rows
    inner.initializer.extend(numpy_helper.from_array(np.array([size]), f"{PROMPT}.{size}") for size in (1, width))
    nodes = [
        helper.make_node("Shape", [PROMPT], [f"{PROMPT}.count"], f"{PROMPT}.count", start=-2, end=-1),
        helper.make_node(
            "Concat",
            [f"{PROMPT}.1", f"{PROMPT}.count", f"{PROMPT}.{width}"],
            [f"{PROMPT}.shape"],
            f"{PROMPT}.shape",
            axis=0,
        ),
        helper.make_node("Expand", [PROMPT, f"{PROMPT}.shape"], [rows], rows),
    ]
    _insert(inner, nodes)
    inner.input.remove(value)
    _declared(inner, PROMPT, width)


class _Slot:
    """The rows of a slot for the virtual tokens among the tokens of one run, and what else its nodes need. ``start``
    and ``end`` are the numbers of these virtual tokens, ``count`` says how many they are, and ``values`` holds their
    rows, ``(rows, count, width)``: the same for every row of a batch."""

    def __init__(self, graph: onnx.GraphProto, name: str, width: int) -> None:
        self._graph, self._name, self._count = graph, name, 0
        self._nodes: list[onnx.NodeProto] = []
        size, rows = self.add("Shape", [name], start=0, end=1), self.add("Shape", [IDS], start=0, end=1)
        total, length = (self.add("Shape", [value], start=1, end=2) for value in (MASK, IDS))
        self.start = self.add("Min", [self.add("Sub", [total, length]), size])  # the first are tokens of the cache
        self.end = self.add("Min", [total, size])
        self.count = self.add("Sub", [self.end, self.start])
        shape = self.add("Concat", [rows, self.count, self.constant([width])], axis=0)
        self.values = self.add("Expand", [self.taken_from(name), shape])

    def add(self, kind: str, inputs: Sequence[str], output: str | None = None, **settings: int | list[int]) -> str:
        self._count += 1
        name = output or f"{self._name}.{self._count}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name, **settings))
        return name

    def constant(self, value: ArrayLike) -> str:
        array = np.asarray(value, np.int64)
        name = f"{self._name}.int64:{array.tolist()}".replace(" ", "")
        if all(tensor.name != name for tensor in self._graph.initializer):
            self._graph.initializer.append(numpy_helper.from_array(array, name))
        return name

    def taken_from(self, table: str) -> str:
        return self.add("Slice", [table, self.start, self.end, self.constant([0])])

    def replaced(self, value: str, rows: str, along: int, output: str | None = None) -> str:
        """Put ``rows`` instead of the virtual tokens into ``value``, along its dimension ``along``."""
        rest = self.add("Slice", [value, self.count, self.constant([END]), self.constant([along])])
        return self.add("Concat", [rows, rest], output, axis=along)

    def taken(self) -> list[onnx.NodeProto]:
        nodes, self._nodes = self._nodes, []
        return nodes


def _before_rotation(slot: _Slot, graph: onnx.GraphProto, node: onnx.NodeProto, sizes: tuple[int, int, int]) -> str:
    """Return keys and values as fused attention reads them: ``(2 * layers, rows, virtual, heads * width)``.

    It multiplies the two halves of a key, as a complex number, by ``cos + i sin`` of the position. Where a scaled
    embedding makes that factor longer than 1, so is the inverse shorter: it is the conjugate over the squared length.
    """
    layers, heads, width = sizes
    settings = {a.name: a.i for a in node.attribute}
    parts = slot.add("Reshape", [slot.values, slot.constant([0, 0, layers, 2, heads, width])])
    if settings.get("do_rotary"):
        stored = {tensor.name: tensor for tensor in graph.initializer}
        if settings.get("rotary_interleaved") or not {node.input[7], node.input[8]} <= set(stored):
            raise ConfigError("keys are rotated in a form that prefix tuning cannot be exported with", about="rotary")
        keys = _slice(slot, parts, 3, 0, 1)
        half = stored[node.input[7]].dims[1]
        cos, sin = (
            slot.add("Unsqueeze", [slot.taken_from(name), slot.constant([1, 2, 3])])  # a virtual token's number is its
            for name in (node.input[7], node.input[8])  # position
        )
        first, second = _slice(slot, keys, 5, 0, half), _slice(slot, keys, 5, half, 2 * half)
        length = slot.add("Add", [slot.add("Mul", [cos, cos]), slot.add("Mul", [sin, sin])])
        cos, sin = slot.add("Div", [cos, length]), slot.add("Div", [sin, length])
        real = slot.add("Add", [slot.add("Mul", [first, cos]), slot.add("Mul", [second, sin])])
        other = slot.add("Sub", [slot.add("Mul", [second, cos]), slot.add("Mul", [first, sin])])
        keys = slot.add("Concat", [real, other, _slice(slot, keys, 5, 2 * half, width)], axis=5)
        parts = slot.add("Concat", [keys, _slice(slot, parts, 3, 1, 2)], axis=3)
    flat = slot.add("Reshape", [parts, slot.constant([0, 0, 2 * layers, heads * width])])
    return slot.add("Transpose", [flat], perm=[2, 0, 1, 3])


def _slice(slot: _Slot, value: str, axis: int, start: int, end: int) -> str:
    return slot.add("Slice", [value, *(slot.constant([number]) for number in (start, end, axis))])


def _reader(makers: Makers, layer: int, part: int) -> tuple[onnx.NodeProto, int]:
    """Find the node that puts a layer's new keys or values into the cache, and which of its inputs they are."""
    node = makers[f"present.{layer}.{PARTS[part]}"]
    if node.op_type == FUSED and node.input[1 + part]:
        return node, 1 + part
    if node.op_type == "Concat" and node.input[0] == f"past_key_values.{layer}.{PARTS[part]}" and len(node.input) == 2:
        return node, 1
    raise ConfigError(
        f"layer {layer} puts its {PARTS[part]}s into the cache by {node.op_type}: prefix tuning cannot be exported for "
        "this base",
        about="past_key_values",
    )


def _embeddings(graph: onnx.GraphProto, embedding: Embedding) -> onnx.NodeProto:
    """Find the node that returns the embeddings of the tokens as the model's layers read them."""
    stored = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    nodes = [
        node
        for node in graph.node
        if node.op_type in LOOKUPS
        and stored.get(node.input[0], [0])[0] == embedding.rows
        and _is_ids(node.input[1], makers)
    ]
    if len(nodes) != 1:
        raise ConfigError(
            f"the graph looks up the embeddings of tokens in {len(nodes)} places, not in one: virtual tokens cannot be "
            "exported for this base",
            about="embeddings",
        )
    return nodes[0] if embedding.scale == 1 else _scaled(graph, nodes[0].output[0], embedding.scale)


def _is_ids(name: str, makers: Makers) -> bool:
    while name != IDS:
        if (node := makers.get(name)) is None or node.op_type not in PASSES:
            return False
        name = node.input[0]
    return True


def _scaled(graph: onnx.GraphProto, name: str, scale: float) -> onnx.NodeProto:
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    numbers |= {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    for node in graph.node:
        if node.op_type == "Mul" and name in node.input:
            factor = numbers.get(next((other for other in node.input if other != name), ""))
            if factor is not None and np.allclose(numpy_helper.to_array(factor), scale, rtol=1e-3):
                return node
    raise ConfigError(
        f"the graph does not scale the embeddings of tokens by {scale:g}, as the model does: virtual tokens cannot be "
        "exported for this base",
        about="embeddings",
    )


def _insert(
    graph: onnx.GraphProto,
    first: Sequence[onnx.NodeProto],
    *,
    before: Mapping[str, Sequence[onnx.NodeProto]] = {},  # never written
    after: Mapping[str, Sequence[onnx.NodeProto]] = {},
) -> None:
    """Insert nodes at the beginning, and before or after the nodes whose first output is named."""
    nodes = list(first)
    for node in graph.node:
        name = node.output[0]
        nodes += [*before.get(name, ()), node, *after.get(name, ())]
    replace_nodes(graph, nodes)


def _declared(graph: onnx.GraphProto, name: str, width: int) -> Slots:
    graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [VIRTUAL[name], width]))
    return {name: (VIRTUAL[name], str(width))}
