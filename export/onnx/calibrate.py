"""Which products of matrices bear int8 activations? Measured on a short text, never guessed from a layer's name.

Some layers of a language model get a few numbers a thousand times larger than the rest. With one scale for all
activations of a product the rest is then lost (down_proj of SmolLM2: perplexity 50 becomes 112). So each product is
computed both ways on the same inputs, and where too much is lost it stays in float.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from adapters.layout import Floats
from aggregation.errors import ConfigError

# Outliers belong to the model, not to what it reads: any plain text shows them.
TEXT = (
    "The kettle was already on when she came down, and the kitchen smelled of bread. Outside it had rained all night. "
    "Please turn off the lights in the hall at ten, set a timer for 25 minutes and play some music. "
    "How far is the station? About two miles: follow the river, cross the old bridge, then ask again. "
    "In 1969 two people walked on the moon; half a billion watched them, most on small grey screens."
)
TOKENS = 64  # of the text
Feeds = Mapping[str, NDArray[np.generic]]


def lossy_products(graph: onnx.ModelProto, feeds: Feeds, limit: float) -> dict[str, float]:
    """The products that lose more than ``limit`` with int8 weights and one scale for int8 activations.

    Args:
        graph: In float32.
        feeds: All its inputs, but for those that have defaults.
        limit: The squared error of a product over the square of what it should give, a mean over tokens.

    Returns:
        The loss by what the product gives (its output's name), largest first.
    """
    values = {tensor.name: tensor for tensor in graph.graph.initializer}
    products = [node for node in graph.graph.node if node.op_type in ("MatMul", "FusedMatMul")]
    products = [node for node in products if node.input[1] in values and len(values[node.input[1]].dims) == 2]
    seen = _seen(graph, sorted({node.input[0] for node in products}), feeds)
    losses = {}
    for node in products:
        weight = numpy_helper.to_array(values[node.input[1]])
        turned = weight.T if node.op_type == "FusedMatMul" else weight
        losses[node.output[0]] = _loss(seen[node.input[0]].reshape(-1, len(turned)), turned)
    return dict(sorted(((k, v) for k, v in losses.items() if v > limit), key=lambda item: (-item[1], item[0])))


def feeds_for(graph: onnx.ModelProto, ids: Sequence[int]) -> dict[str, NDArray[np.generic]]:
    """One row of tokens for a graph of an encoder or a language model: nothing cached, no adapter.

    Raises:
        ConfigError: An input that is neither tokens, cache nor slot.
    """
    row = np.array([ids], dtype=np.int64)
    known = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
    feeds: dict[str, NDArray[np.generic]] = {}
    for value in graph.graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in known:
            feeds[value.name] = known[value.name]
        elif value.type.tensor_type.elem_type == TensorProto.FLOAT:
            # Whatever is free is empty (ranks, labels, the past), but for the rows of the batch.
            shape = [d.dim_value or int("batch" in d.dim_param) for d in dims]
            feeds[value.name] = np.zeros(shape, dtype=np.float32)
        else:
            raise ConfigError(f"the graph has an input {value.name!r} that calibration cannot fill")
    return feeds


def quantized_weight(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Bytes of the shape ``(in, out)``, symmetric, and a scale for each output."""
    largest = np.abs(weight).max(axis=0)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    return np.rint(weight / scales).astype(np.int8), scales


def _seen(graph: onnx.ModelProto, names: Sequence[str], feeds: Feeds) -> dict[str, Floats]:
    outputs = list(graph.graph.output)
    try:
        del graph.graph.output[:]
        graph.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return dict(zip(names, session.run(list(names), dict(feeds)), strict=True))
    finally:
        del graph.graph.output[:]
        graph.graph.output.extend(outputs)


def _loss(x: Floats, weight: Floats) -> float:
    exact = x @ weight
    codes, scales = quantized_weight(weight)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    rounded = np.rint(x / np.float32(step)) * np.float32(step)  # the zero point is a whole number of steps
    error = rounded @ (codes * scales) - exact
    # Token by token: the tokens without outliers are those that lose, and their numbers are small.
    share = np.square(error).sum(axis=1) / np.maximum(np.square(exact).sum(axis=1), 1e-30)
    return float(share.mean())
