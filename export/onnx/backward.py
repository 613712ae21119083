"""The nodes of a backward pass while ``differentiate`` adds them, and what is known of the forward pass's values."""

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
        """Of ``graph``, after shape inference."""
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[object, TensorProto] = {}
        self._stored = {tensor.name: tensor for tensor in graph.initializer}
        self._dims: dict[str, list[int | str]] = {name: list(tensor.dims) for name, tensor in self._stored.items()}
        for value in (*graph.value_info, *graph.input, *graph.output):
            kind = value.type.tensor_type
            if kind.HasField("shape"):
                self._dims[value.name] = [_dimension(each) for each in kind.shape.dim]

    def add(self, kind: str, *inputs: str, **settings: Any) -> str:
        """Add a node, and return the name of its output."""
        return self.named(kind, f"backward_{len(self.nodes)}", *inputs, **settings)

    def named(self, kind: str, output: str, *inputs: str, **settings: Any) -> str:
        """Add a node whose output has a name of its own, and return it."""
        self.nodes.append(helper.make_node(kind, list(inputs), [output], output, **settings))
        return output

    def constant(self, value: NDArray[Any] | np.generic) -> str:
        """The name of an initializer with this value."""
        array = np.asarray(value)
        name = f"backward_constant_{len(self.constants)}"
        key = array.tobytes(), array.dtype.str, array.shape
        return str(self.constants.setdefault(key, numpy_helper.from_array(array, name)).name)

    def number(self, value: float) -> str:
        """A scalar in float32."""
        return self.constant(np.float32(value))

    def integers(self, *values: int) -> str:
        """A vector of integers."""
        return self.constant(np.array(values, np.int64))

    def known(self, name: str) -> NDArray[Any] | None:
        """The value of an initializer; None for anything else."""
        found = self._stored.get(name)
        return None if found is None else numpy_helper.to_array(found)

    def rank(self, name: str) -> int:
        """The number of dimensions of a value of the forward pass.

        Raises:
            ConfigError: Shape inference did not find it.
        """
        if name not in self._dims:
            raise ConfigError(f"the rank of {name!r} is not known: this base cannot be trained", about=name)
        return len(self._dims[name])

    def summed(self, gradient: str, source: str, result: str) -> str:
        """The gradient by ``source``, which was broadcast to the shape of ``result``: the sum over its copies."""
        ours, whole = self._dims.get(source), self._dims.get(result)
        if ours is not None and ours == whole and UNKNOWN not in ours:
            return gradient
        return self.summed_to(gradient, source, self.add("Shape", result), self.rank(result))

    def summed_to(self, gradient: str, source: str, whole: str, rank: int) -> str:
        """As ``summed``, for a gradient of ``rank`` dimensions whose shape is the value of ``whole``."""
        missing, shape = rank - self.rank(source), self.add("Shape", source)
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

    def shaped(self, gradient: str, source: str) -> str:
        """The same numbers in the shape of ``source``."""
        return self.add("Reshape", gradient, self.add("Shape", source), allowzero=1)

    def swapped(self, name: str, rank: int) -> str:
        """A value with its last two dimensions swapped."""
        return self.add("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])


def _dimension(stated: onnx.TensorShapeProto.Dimension) -> int | str:
    return int(stated.dim_value) if stated.HasField("dim_value") else str(stated.dim_param or UNKNOWN)
