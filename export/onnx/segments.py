"""Run a graph whose weights are larger than memory: a part of its nodes at a time, each part with its own weights. A
graph with few weights is one part, and runs as it is."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, ValueInfoProto, helper

from export.onnx.tensorstore import MEMORY, TensorStore

LIMIT = 2**28  # bytes of weights of a part; ONNX Runtime may hold them twice

Values = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Segment:
    nodes: list[onnx.NodeProto]
    weights: dict[str, TensorProto]

    @property
    def size(self) -> int:
        return sum(_size(tensor) for tensor in self.weights.values())


class Segments:
    """A graph that runs part by part. Its nodes are in topological order, as ONNX demands; ``step`` is called with the
    bytes of weights that were read, after each part."""

    def __init__(
        self, graph: onnx.ModelProto, store: TensorStore = MEMORY, step: Callable[[int], object] = lambda _: None
    ) -> None:
        self._graph, self._store, self._step = graph, store, step
        self._segments = list(_segments(graph))
        self._stated = {value.name: value for value in (*graph.graph.input, *graph.graph.output)}
        self._session: tuple[tuple[str, ...], ort.InferenceSession] | None = None  # the only part's session

    @property
    def size(self) -> int:
        """Bytes of weights that one run reads."""
        return sum(segment.size for segment in self._segments)

    def run(self, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> Values:
        """Compute the values of ``names``, any of the graph, for ``feeds``. Raises any Exception of ONNX Runtime."""
        last: dict[str, int] = {}
        for number, segment in enumerate(self._segments):
            last |= dict.fromkeys((name for node in segment.nodes for name in reads(node)), number)
        last |= dict.fromkeys(names, len(self._segments))
        values: Values = dict(feeds)
        for number, segment in enumerate(self._segments):
            outputs = [name for node in segment.nodes for name in node.output if last.get(name, -1) > number]
            names_read = {name for node in segment.nodes for name in reads(node)}
            inputs = {name: values[name] for name in sorted(names_read & values.keys())}
            session = self._opened(segment, inputs, outputs)
            # A part that computes nothing for the others has no outputs to ask for.
            values |= dict(zip(outputs, session.run(outputs, inputs), strict=True)) if outputs else {}
            values = {name: value for name, value in values.items() if last.get(name, -1) > number}
            self._step(segment.size)
        constant = {tensor.name: tensor for tensor in self._graph.graph.initializer}
        return {name: values[name] if name in values else self._store.array(constant[name]) for name in names}

    def _opened(self, segment: _Segment, given: Values, made: Sequence[str]) -> ort.InferenceSession:
        key = (*sorted(given), *made)
        if self._session is not None and self._session[0] == key:
            return self._session[1]
        whole = self._graph
        part = onnx.ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions)
        part.graph.name = whole.graph.name
        part.graph.node.extend(segment.nodes)
        part.graph.initializer.extend(segment.weights.values())
        part.graph.input.extend(self._input(name, value) for name, value in given.items())
        part.graph.output.extend(self._stated.get(name, ValueInfoProto(name=name)) for name in made)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # a graph that does not run is an expected outcome
        if self._store.folder is not None:
            place = str(self._store.folder)
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", place)
        if len(self._segments) > 1:  # rearranging weights for one run costs more than it gains
            options.add_session_config_entry("session.disable_prepacking", "1")
        session = ort.InferenceSession(part.SerializeToString(), options, providers=["CPUExecutionProvider"])
        if len(self._segments) == 1:
            self._session = key, session
        return session

    def _input(self, name: str, value: NDArray[Any]) -> ValueInfoProto:
        stated = self._stated.get(name)
        return stated or helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)


def _segments(graph: onnx.ModelProto) -> Iterator[_Segment]:
    stored = {tensor.name: tensor for tensor in graph.graph.initializer}
    segment, size = _Segment([], {}), 0
    for node in graph.graph.node:
        weights = {name: stored[name] for name in reads(node) if name in stored and name not in segment.weights}
        added = sum(map(_size, weights.values()))
        if segment.weights and added and size + added > LIMIT:
            yield segment
            segment, size = _Segment([], {}), 0
            weights = {name: stored[name] for name in reads(node) if name in stored}
            added = sum(map(_size, weights.values()))
        segment.nodes.append(node)
        segment.weights.update(weights)
        size += added
    yield segment


def _size(tensor: TensorProto) -> int:
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def reads(node: onnx.NodeProto) -> set[str]:
    """List the values that a node reads, those of graphs within it among them."""
    names = set(node.input)
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)
        for inner in graphs:
            own = {value.name for value in (*inner.input, *inner.initializer)}
            own |= {name for child in inner.node for name in child.output}
            read = {name for child in inner.node for name in reads(child)} | {value.name for value in inner.output}
            names |= read - own
    return names - {""}
