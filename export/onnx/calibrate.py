"""Which MatMuls tolerate int8 activations, measured on a short text instead of guessed from a layer's name.

In some layers of a language model a few activations are a thousand times larger than the others. One scale for all
activations of a MatMul then loses the others (down_proj of SmolLM2: perplexity 50 becomes 112). So each MatMul is
computed both ways on the same inputs, and stays in float where too much is lost."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from aggregation.errors import ConfigError
from edgeadapt.formats.layout import Floats
from export.onnx.segments import Segments
from export.onnx.tensorstore import MEMORY, TensorStore

# Outliers depend on the model, not on what it reads: any plain text shows them.
TEXT = (
    "The kettle was already on when she came down, and the kitchen smelled of bread. Outside it had rained all night. "
    "Please turn off the lights in the hall at ten, set a timer for 25 minutes and play some music. "
    "How far is the station? About two miles: follow the river, cross the old bridge, then ask again. "
    "In 1969 two people walked on the moon; half a billion watched them, most on small grey screens."
)
SHORT_TEXT = "Please turn off the lights."
TOKENS = 64  # tokens of TEXT
ROWS = 256  # rows that are quantized at a time, to limit memory
Feeds = Mapping[str, NDArray[np.generic]]


def lossy_matmuls(graph: onnx.ModelProto, feeds: Feeds, limit: float, store: TensorStore = MEMORY) -> dict[str, float]:
    """Find the MatMuls that lose more than ``limit`` with int8 weights and one scale for all int8 activations.

    The loss of a MatMul is the mean over tokens of the squared error over the square of the exact output: tokens
    without outliers lose most, and their outputs are small. A token whose exact output is zero counts as no loss if the
    rounded output is zero too. Only MatMuls with a two-dimensional initializer as weight are measured. Returns the loss
    by the name of the MatMul's output, largest first."""
    values = {tensor.name: tensor for tensor in graph.graph.initializer}
    matmuls = [node for node in graph.graph.node if node.op_type in ("MatMul", "FusedMatMul")]
    matmuls = [node for node in matmuls if node.input[1] in values and len(values[node.input[1]].dims) == 2]
    inputs = Segments(graph, store).run(sorted({node.input[0] for node in matmuls}), feeds)
    losses = {}
    for node in matmuls:
        weight = store.array(values[node.input[1]])
        oriented = weight.T if node.op_type == "FusedMatMul" else weight
        losses[node.output[0]] = _loss(inputs[node.input[0]].reshape(-1, len(oriented)), oriented)
    return dict(sorted(((k, v) for k, v in losses.items() if v > limit), key=lambda item: (-item[1], item[0])))


def feeds_for(graph: onnx.ModelProto, ids: Sequence[int]) -> dict[str, NDArray[np.generic]]:
    """Make the inputs of an encoder's or a language model's graph for one row of tokens, empty cache, no adapter.
    Raises ConfigError: the graph has an input that is neither tokens, cache nor slot."""
    row = np.array([ids], dtype=np.int64)
    tokens = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
    feeds: dict[str, NDArray[np.generic]] = {}
    for value in graph.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in tokens:
            feeds[value.name] = tokens[value.name]
        elif value.type.tensor_type.elem_type == TensorProto.FLOAT:
            # Symbolic dimensions (ranks, labels, past tokens) are 0, except the batch.
            shape = [d.dim_value or int("batch" in d.dim_param) for d in dims]
            feeds[value.name] = np.zeros(shape, dtype=np.float32)
        else:
            raise ConfigError(f"the graph has an input {value.name!r} that calibration cannot fill", about=value.name)
    return feeds


def quantized_weight(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Quantize ``weight``, ``(in, out)``, finite, to symmetric int8 codes with one scale for each output, ``(out,)``.

    Guarantee: ``codes * scales`` differs from ``weight`` by at most half a scale; the scale is the largest absolute
    value of the column over 127, and 1 for a column of zeros.

    >>> codes, scales = quantized_weight(np.float32([[254, 0], [-3.9, 0]]))
    >>> codes.tolist(), scales.tolist()
    ([[127, 0], [-2, 0]], [2.0, 1.0])
    """
    parts = [weight[start : start + ROWS] for start in range(0, len(weight), ROWS)]
    largest = np.max([np.abs(part).max(axis=0) for part in parts], axis=0)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    return np.concatenate([np.rint(part / scales).astype(np.int8) for part in parts]), scales


def _loss(x: Floats, weight: Floats) -> float:
    exact = x @ weight
    codes, scales = quantized_weight(weight)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    rounded = np.rint(x / np.float32(step)) * np.float32(step)  # DynamicQuantizeLinear rounds the zero point too
    error = rounded @ (codes * scales) - exact
    losses = np.square(error).sum(axis=1) / np.maximum(np.square(exact).sum(axis=1), 1e-30)
    return float(losses.mean())
