"""Reverse-mode differentiation of an ONNX graph, into an ONNX graph of ordinary operators.

The nodes of the forward pass stay, and those of the backward pass follow over the same initializers (Griewank and
Walther 2008, "Evaluating Derivatives", section 3.2). Shapes may be symbolic: where two cannot be shown to agree, the
graph computes at run time along which dimensions a gradient is summed. A rule adds nodes to a backward pass and returns
the names of the gradients of an operator's inputs, by the number of the input. It is asked for those in ``wanted``;
masks, indices and shapes have no gradients. Each result is held to torch's gradients (``gradients.py``)."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference

from aggregation.errors import ConfigError
from edgeadapt.bases.traininggraph import GRADIENT
from export.onnx.matmuls import replace_nodes

UNKNOWN = ""  # a dimension that shape inference could not name


class Backward:
    def __init__(self, graph: onnx.GraphProto) -> None:
        """``graph``: after shape inference."""
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
        tensor = self._stored.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def rank(self, name: str) -> int:
        """Count the dimensions of a value of the forward pass. Raises ConfigError: shape inference did not find it."""
        if name not in self._dims:
            raise ConfigError(f"the rank of {name!r} is not known: this base cannot be trained", about=name)
        return len(self._dims[name])

    def shape(self, name: str) -> str:
        """Name the shape of a value of the forward pass. It is read from the first value that has the same one: a node
        that reads the shape of a value keeps the value."""
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


Gradients = Mapping[int, str]
Rule = Callable[[Backward, onnx.NodeProto, str, set[int]], Gradients]
Slope = Callable[[Backward, str, str, str], str]  # gradient, input, output → gradient of the input

CONSTANT = frozenset(
    ("And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Not", "Or", "Shape", "Size")
)  # operators whose output does not change with small changes of what they read


def rule_of(node: onnx.NodeProto) -> Rule:
    """Raises ConfigError: the node's operator has no rule."""
    if node.domain or (rule := RULES.get(node.op_type)) is None:
        raise ConfigError(
            f"the operator {node.op_type} has no derivative here, so devices cannot train this base: export it with "
            "--no-training",
            about=node.op_type,
        )
    return rule


def _sum(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    return {n: to.summed(gradient, node.input[n], node.output[0]) for n in wanted}


def _difference(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    signed = {0: gradient, 1: to.add("Neg", gradient) if 1 in wanted else ""}
    return {n: to.summed(signed[n], node.input[n], node.output[0]) for n in wanted}


def _product(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    return {n: to.summed(to.add("Mul", gradient, node.input[1 - n]), node.input[n], node.output[0]) for n in wanted}


def _quotient(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    below = to.add("Div", gradient, node.input[1])
    gradients = {0: below}
    if 1 in wanted:
        gradients[1] = to.add("Neg", to.add("Mul", below, node.output[0]))
    return {n: to.summed(gradients[n], node.input[n], node.output[0]) for n in wanted}


def _matmul(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    """Y = A B: dA = dY Bᵀ and dB = Aᵀ dY."""
    (a, b), y = node.input, node.output[0]
    ranks = to.rank(a), to.rank(b)
    if min(ranks) < 2:
        raise ConfigError("a product with a vector has no derivative here: use another base", about="MatMul")
    gradients = {}
    if 0 in wanted:
        gradients[0] = _unbatched(to, to.add("MatMul", gradient, to.swapped(b, ranks[1])), ranks, 0, a, y)
    if 1 in wanted and ranks[1] == 2:
        rows, over = (to.add("Flatten", name, axis=max(ranks) - 1) for name in (a, gradient))
        gradients[1] = to.add("MatMul", to.swapped(rows, 2), over)
    elif 1 in wanted:
        gradients[1] = _unbatched(to, to.add("MatMul", to.swapped(a, ranks[0]), gradient), ranks, 1, b, y)
    return gradients


def _gemm(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    """Y = A B + C, with A or B transposed."""
    a, b, *_ = node.input
    options = settings(node, alpha=1.0, beta=1.0, transA=0, transB=0)
    if (options["alpha"], options["beta"], options["transA"]) != (1.0, 1.0, 0):
        raise ConfigError("a scaled or transposed Gemm has no derivative here: use another base", about="Gemm")
    gradients = {}
    if 0 in wanted:
        gradients[0] = to.add("MatMul", gradient, b if options["transB"] else to.swapped(b, 2))
    if 1 in wanted:
        rows = (gradient, a) if options["transB"] else (a, gradient)
        gradients[1] = to.add("MatMul", to.swapped(rows[0], 2), rows[1])
    if 2 in wanted:
        gradients[2] = to.summed(gradient, node.input[2], node.output[0])
    return gradients


def _unbatched(to: Backward, gradient: str, ranks: tuple[int, int], own: int, source: str, result: str) -> str:
    """Sum the gradient by one factor over the leading dimensions along which it was repeated."""
    if to.same_leading(source, result):
        return gradient
    shapes = ((result, 0, -2), (source, -2, 2**31))
    parts = [
        to.add("Slice", to.shape(name), to.integers(begin), to.integers(end), to.integers(0))
        for name, begin, end in shapes
    ]
    return to.summed_to(gradient, source, to.add("Concat", *parts, axis=0), max(ranks))


def _where(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    chosen, zero = node.input[0], to.number(0)
    parts = {1: (gradient, zero), 2: (zero, gradient)}
    return {n: to.summed(to.add("Where", chosen, *parts[n]), node.input[n], node.output[0]) for n in wanted}


def _clip(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    x = node.input[0]
    for limit, compare in zip(node.input[1:], ("GreaterOrEqual", "LessOrEqual"), strict=False):
        if limit:
            gradient = to.add("Where", to.add(compare, x, limit), gradient, to.number(0))
    return {0: gradient}


def _pow(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    x, exponent = node.input
    if 1 in wanted:
        raise ConfigError("an exponent that is trained has no derivative here: use another base", about="Pow")
    # A power of one is slow, and ONNX Runtime would compute it in the forward pass and keep it.
    square = (power := to.known(exponent)) is not None and (power == 2).all()
    lower = x if square else to.add("Pow", x, to.add("Sub", exponent, to.number(1)))
    return {0: to.summed(to.add("Mul", gradient, to.add("Mul", exponent, lower)), x, node.output[0])}


def _reduced(to: Backward, node: onnx.NodeProto, gradient: str) -> str:
    if settings(node, keepdims=1)["keepdims"] or len(node.input) < 2:
        return gradient
    return to.add("Unsqueeze", gradient, node.input[1])


def _reduce_sum(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    return {0: to.add("Expand", _reduced(to, node, gradient), to.shape(node.input[0]))}


def _reduce_mean(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    return _reduce_sum(to, node, to.add("Mul", gradient, to.share(node.output[0], node.input[0])), wanted)


def _reduce_l2(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    """x / |x|, and 0 where x is 0, as torch has it."""
    x, norm = node.input[0], _reduced(to, node, node.output[0])
    unit = to.add("Div", x, to.add("Where", to.add("Equal", norm, to.number(0)), to.number(1), norm))
    return {0: to.add("Mul", _reduced(to, node, gradient), unit)}


def _softmax(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    """y (g - Σ g y)."""
    y, axes = node.output[0], to.integers(settings(node, axis=-1)["axis"])
    total = to.add("ReduceSum", to.add("Mul", gradient, y), axes, keepdims=1)
    return {0: to.add("Mul", y, to.add("Sub", gradient, total))}


def _log_softmax(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    """g - exp(y) Σ g."""
    total = to.add("ReduceSum", gradient, to.integers(settings(node, axis=-1)["axis"]), keepdims=1)
    return {0: to.add("Sub", gradient, to.add("Mul", to.add("Exp", node.output[0]), total))}


def _layer_norm(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    """With x̂ = (x - mean) / deviation and h = g scale: (h - mean(h) - x̂ mean(h x̂)) / deviation (Ba et al. 2016). The
    forward node returns mean and deviation as well from now on."""
    if settings(node, axis=-1)["axis"] != -1:
        raise ConfigError("only a normalization over the last dimension has a derivative here", about=node.op_type)
    x, y, last = node.input[0], node.output[0], to.integers(-1)
    mean, inverse = f"{y}_mean", f"{y}_inverse_deviation"
    del node.output[1:]
    node.output.extend([mean, inverse])
    normal = to.add("Mul", to.add("Sub", x, mean), inverse)
    scaled = to.add("Mul", gradient, node.input[1])
    first = to.add("ReduceMean", scaled, last)
    second = to.add("Mul", normal, to.add("ReduceMean", to.add("Mul", scaled, normal), last))
    gradients = {0: to.add("Mul", to.add("Sub", to.add("Sub", scaled, first), second), inverse)}
    if 1 in wanted:
        gradients[1] = to.summed(to.add("Mul", gradient, normal), node.input[1], y)
    if 2 in wanted:
        gradients[2] = to.summed(gradient, node.input[2], y)
    return gradients


def _transpose(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    order = settings(node, perm=list(range(to.rank(node.input[0])))[::-1])["perm"]
    return {0: to.add("Transpose", gradient, perm=np.argsort(order).tolist())}


def _gather(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    """Gradient of one index, such as the first token's, or of several rows, such as the learned tokens': else zero."""
    (x, index), axis = node.input, settings(node, axis=0)["axis"]
    indices, rank = to.known(index), to.rank(x)
    single = indices is not None and indices.shape == (1,)
    if to.rank(index) == 1 and axis == 0 and not single:
        nothing = to.add("Expand", to.number(0), to.shape(x))
        rows = to.add("Unsqueeze", index, to.integers(1))
        return {0: to.add("ScatterND", nothing, rows, gradient, reduction="add")}
    if to.rank(index) and not single:
        raise ConfigError("this look-up of several rows has no derivative here: use another base", about="Gather")
    size = to.size(x, axis % rank)
    row = index if single else to.add("Unsqueeze", index, to.integers(0))
    at = to.add("OneHot", row, to.add("Squeeze", size), to.constant(np.array([0, 1], np.float32)))
    column = to.add("Reshape", at, to.integers(-1, *[1] * (rank - 1 - axis % rank)))
    return {0: to.add("Mul", gradient if single else to.add("Unsqueeze", gradient, to.integers(axis)), column)}


def _gather_elements(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    """Gradient that is zero for all elements that were not gathered."""
    (x, index), axis = node.input, settings(node, axis=0)["axis"]
    nothing = to.add("Expand", to.number(0), to.shape(x))
    return {0: to.add("ScatterElements", nothing, index, gradient, axis=axis, reduction="add")}


def _gather_nd(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    """Gradient that is zero for all slices that were not gathered, such as the states of all tokens but the last."""
    x, index = node.input
    if settings(node, batch_dims=0)["batch_dims"]:
        raise ConfigError("a look-up within rows has no derivative here: use another base", about="GatherND")
    nothing = to.add("Expand", to.number(0), to.shape(x))
    return {0: to.add("ScatterND", nothing, index, gradient, reduction="add")}


def _concat(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    axis = settings(node)["axis"] % to.rank(node.output[0])
    ends, end = [], to.integers(0)
    for source in node.input:
        begin, end = end, to.add("Add", end, to.size(source, axis))
        ends.append((begin, end))
    return {n: to.add("Slice", gradient, *ends[n], to.integers(axis)) for n in wanted}


def _slice(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    """Fill the gradient with zeros where the slice left something out."""
    x, y = node.input[0], node.output[0]
    starts, axes, steps = (to.known(node.input[n]) if len(node.input) > n else None for n in (1, 3, 4))
    if axes is None or (steps is not None and (steps != 1).any()) or starts is None:
        raise ConfigError("only a slice of known places has a derivative here: use another base", about="Slice")
    along = to.integers(*(axes % to.rank(x)).tolist())
    before, after = (to.add("Gather", to.shape(name), along, axis=0) for name in (x, y))
    # A start may be negative, or beyond the end.
    begin = to.constant(starts.astype(np.int64))
    begin = to.add("Where", to.constant(starts < 0), to.add("Add", begin, before), begin)
    begin = to.add("Min", to.add("Max", begin, to.integers(0)), before)
    end = to.add("Sub", to.add("Sub", before, begin), after)
    return {0: to.add("Pad", gradient, to.add("Concat", begin, end, axis=0), to.number(0), along)}


def _pad(to: Backward, node: onnx.NodeProto, gradient: str, wanted: set[int]) -> Gradients:
    """Cut the padding, which is a constant, off the gradient."""
    x, pads = node.input[0], to.known(node.input[1])
    axes = to.known(node.input[3]) if len(node.input) > 3 else np.arange(to.rank(x))
    if wanted != {0} or settings(node, mode=b"constant")["mode"] != b"constant" or pads is None or axes is None:
        raise ConfigError("only padding with constants has a derivative here: use another base", about="Pad")
    axes = axes % to.rank(x)
    begin = to.integers(*pads[: len(axes)].tolist())
    sizes = to.add("Gather", to.shape(x), to.integers(*axes.tolist()), axis=0)
    return {0: to.add("Slice", gradient, begin, to.add("Add", begin, sizes), to.integers(*axes.tolist()))}


def _gelu(to: Backward, node: onnx.NodeProto, gradient: str, _: set[int]) -> Gradients:
    """Hendrycks and Gimpel 2016: Φ(x) + x φ(x), or the derivative of its approximation by tanh."""
    x, times = node.input[0], partial(to.add, "Mul")
    square = times(x, x)
    if settings(node, approximate=b"none")["approximate"] == b"none":
        error = to.add("Erf", times(x, to.number(math.sqrt(0.5))))
        area = times(to.add("Add", error, to.number(1)), to.number(0.5))
        density = times(to.add("Exp", times(square, to.number(-0.5))), to.number(1 / math.sqrt(2 * math.pi)))
        return {0: times(gradient, to.add("Add", area, times(x, density)))}
    width, cubic = math.sqrt(2 / math.pi), 0.044715
    bent = times(x, to.add("Add", times(square, to.number(width * cubic)), to.number(width)))
    tanh = to.add("Tanh", bent)
    area = times(to.add("Add", tanh, to.number(1)), to.number(0.5))
    slope = to.add("Add", times(square, to.number(3 * width * cubic)), to.number(width))
    steep = times(to.add("Sub", to.number(1), times(tanh, tanh)), times(slope, to.number(0.5)))
    return {0: times(gradient, to.add("Add", area, times(x, steep)))}


def _by(slope: Slope) -> Rule:
    return lambda to, node, gradient, _: {0: slope(to, gradient, node.input[0], node.output[0])}


_same_numbers = _by(lambda to, g, x, y: to.shaped(g, x))


def _one_minus(to: Backward, value: str) -> str:
    return to.add("Sub", to.number(1), value)


def settings(node: onnx.NodeProto, **defaults: Any) -> dict[str, Any]:
    return defaults | {each.name: helper.get_attribute_value(each) for each in node.attribute}


RULES: Mapping[str, Rule] = {
    "Add": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Div": _quotient,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Where": _where,
    "Clip": _clip,
    "Pow": _pow,
    "ReduceSum": _reduce_sum,
    "ReduceMean": _reduce_mean,
    "ReduceL2": _reduce_l2,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "LayerNormalization": _layer_norm,
    "Reshape": _same_numbers,
    "Flatten": _same_numbers,
    "Squeeze": _same_numbers,
    "Unsqueeze": _same_numbers,
    "Expand": _sum,
    "Transpose": _transpose,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Concat": _concat,
    "Pad": _pad,
    "Slice": _slice,
    "Gelu": _gelu,
    "Identity": _by(lambda to, g, x, y: g),
    "Neg": _by(lambda to, g, x, y: to.add("Neg", g)),
    "Exp": _by(lambda to, g, x, y: to.add("Mul", g, y)),
    "Log": _by(lambda to, g, x, y: to.add("Div", g, x)),
    "Sqrt": _by(lambda to, g, x, y: to.add("Div", g, to.add("Add", y, y))),
    "Reciprocal": _by(lambda to, g, x, y: to.add("Neg", to.add("Mul", g, to.add("Mul", y, y)))),
    "Tanh": _by(lambda to, g, x, y: to.add("Mul", g, _one_minus(to, to.add("Mul", y, y)))),
    "Sigmoid": _by(lambda to, g, x, y: to.add("Mul", g, to.add("Mul", y, _one_minus(to, y)))),
    "Relu": _by(lambda to, g, x, y: to.add("Where", to.add("Greater", x, to.number(0)), g, to.number(0))),
}


def differentiate(graph: onnx.ModelProto, value: str, by: Sequence[str]) -> onnx.ModelProto:
    """Copy ``graph``, in float32 and of ONNX's default domain, with a scalar ``value`` and its gradients as outputs.

    The gradient by each input in ``by``, on which ``value`` depends, is named after it, with ``GRADIENT``, and has its
    shape. Raises ConfigError: an operator between them has no derivative here, or ``value`` does not depend on an
    input."""
    result = shape_inference.infer_shapes(graph, data_prop=True)
    inner = result.graph
    _without_splits(inner)
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


def _without_splits(graph: onnx.GraphProto) -> None:
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
