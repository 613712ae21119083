"""The nodes of a backward pass while ``differentiate`` adds them, and what is known of the forward pass's values."""

import math
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from aggregation.errors import ConfigError

UNKNOWN = ""  # a dimension that shape inference could not name


class Backward:
    """Adds nodes and initializers; ``nodes`` and ``constants`` hold them."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        """Begin with ``graph``, after shape inference."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[object, TensorProto] = {}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._dims: dict[str, list[int | str]] = {name: list(tensor.dims) for name, tensor in self._stored.items()}
        for value in (*graph.value_info, *graph.input, *graph.output):
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                self._dims[value.name] = [_dimension(each) for each in kind.shape.dim]
        self._first: dict[tuple[int | str, ...], str] = {}
        for name in (*(value.name for value in graph.input), *(name for node in graph.node for name in node.output)):
            if self._is_known(name):
                self._first.setdefault(tuple(self._dims[name]), name)
        self._shapes: dict[str, str] = {}

    def add(self, kind: str, *inputs: str, **settings: Any) -> str:
        return self.named(kind, f"backward_{len(self.nodes)}", *inputs, **settings)

    def named(self, kind: str, output: str, *inputs: str, **settings: Any) -> str:
        """Add a node whose output has a name of its own."""
        self.nodes.append(helper.make_node(kind, list(inputs), [output], output, **settings))
        return output

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        array = np.asarray(value)
        name = f"backward_constant_{len(self.constants)}"
        key = array.tobytes(), array.dtype.str, array.shape
        return str(self.constants.setdefault(key, numpy_helper.from_array(array, name)).name)

    def number(self, value: float) -> str:
        return self.constant(np.float32(value))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def known(self, name: str) -> NDArray[Any] | None:
        """Value of an initializer; None for anything else."""
        tensor = self._stored.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def rank(self, name: str) -> int:
        """Count the dimensions of a value of the forward pass. Raises ConfigError: shape inference did not find it."""
        if name not in self._dims:
            raise ConfigError(f"the rank of {name!r} is not known: this base cannot be trained", about=name)
        return len(self._dims[name])

    def shape(self, name: str) -> str:
        """Name the shape of a value of the forward pass.

        It is read from the first value that has the same one: a node that reads the shape of a value keeps the value.
        """
        dims = self._dims[name] if self._is_known(name) else None
        if dims is not None and all(isinstance(each, int) for each in dims):
            return self.integers(*(int(each) for each in dims))
        source = name if dims is None else self._first.get(tuple(dims), name)
        if source not in self._shapes:
            self._shapes[source] = self.add("Shape", source)
        return self._shapes[source]

    def size(self, name: str, axis: int) -> str:
        """Name one dimension of a value of the forward pass, counted from the front: a vector of one integer."""
        if isinstance(dimension := self._dims.get(name, [UNKNOWN] * (axis + 1))[axis], int):
            return self.integers(dimension)
        return self.add("Slice", self.shape(name), self.integers(axis), self.integers(axis + 1), self.integers(0))

    def share(self, part: str, whole: str) -> str:
        """Divide the elements of one value by those of another one, of which it is a reduction; a scalar in float32."""
        ours, all_ = (self._dims.get(name, [UNKNOWN]) for name in (part, whole))
        lost = [each for kept, each in zip(ours, all_, strict=False) if kept != each]
        if len(ours) == len(all_) and all(isinstance(each, int) for each in lost):
            return self.number(1 / math.prod(int(each) for each in lost))
        sizes = (self.add("ReduceProd", self.shape(name), keepdims=0) for name in (part, whole))
        return self.add("Div", *(self.add("Cast", size, to=TensorProto.FLOAT) for size in sizes))

    def summed(self, gradient: str, source: str, result: str) -> str:
        """Sum the gradient by ``source``, which was broadcast to the shape of ``result``, over its copies."""
        if not (self._is_known(source) and self._is_known(result)):
            return self.summed_to(gradient, source, self.shape(result), self.rank(result))
        ours, whole = self._dims[source], self._dims[result]
        missing = len(whole) - len(ours)
        pairs = list(zip(ours, whole[missing:], strict=True))
        if any(own not in (1, each) for own, each in pairs):
            return self.summed_to(gradient, source, self.shape(result), len(whole))
        if missing:
            gradient = self.add("ReduceSum", gradient, self.integers(*range(missing)), keepdims=0)
        axes = [axis for axis, (own, each) in enumerate(pairs) if own != each]
        return self.add("ReduceSum", gradient, self.integers(*axes), keepdims=1) if axes else gradient

    def summed_to(self, gradient: str, source: str, whole: str, rank: int) -> str:
        """Sum like ``summed`` for a gradient of ``rank`` dimensions whose shape is the value of ``whole``."""
        missing, shape = rank - self.rank(source), self.shape(source)
        padded = self.add("Concat", self.integers(*[1] * missing), shape, axis=0) if missing else shape
        axes = self.add(
            "Squeeze", self.add("NonZero", self.add("Not", self.add("Equal", padded, whole))), self.integers(0)
        )
        total = self.add("ReduceSum", gradient, axes, keepdims=1, noop_with_empty_axes=1)
        return self.add("Reshape", total, shape, allowzero=1) if missing else total

    def same_leading(self, one: str, other: str) -> bool:
        """Whether two values are known to agree in all dimensions but the last two."""
        dims = self._dims.get(one, [UNKNOWN])[:-2]
        return dims == self._dims.get(other, [UNKNOWN])[:-2] and UNKNOWN not in dims

    def _is_known(self, name: str) -> bool:
        """Whether each of its dimensions has a number or a name; equal names are equal numbers."""
        return UNKNOWN not in self._dims.get(name, [UNKNOWN])

    def shaped(self, gradient: str, source: str) -> str:
        return self.add("Reshape", gradient, self.shape(source), allowzero=1)

    def swapped(self, name: str, rank: int) -> str:
        return self.add("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])


def _dimension(stated: onnx.TensorShapeProto.Dimension) -> int | str:
    return int(stated.dim_value) if stated.HasField("dim_value") else str(stated.dim_param or UNKNOWN)
