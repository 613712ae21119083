"""The profiles of an exported base: what its weights are stored and multiplied in. A closed choice."""

import logging
import tempfile
from enum import StrEnum
from pathlib import Path

import onnx
from onnxruntime.quantization import QuantType, quantize_dynamic

from aggregation.errors import ConfigError


class Profile(StrEnum):
    """How the base is stored.

    ``native-int8``: weights of matrix products and embeddings in int8, a scale for each output channel of a product;
    activations are quantized as they come, with one scale for the whole input of a product, so phrases of one batch
    would influence each other: a device answers one phrase at a time.
    """

    FP32 = "fp32"
    NATIVE_INT8 = "native-int8"


def quantize(graph: onnx.ModelProto, profile: Profile) -> onnx.ModelProto:
    """The graph in ``profile``, with the same inputs.

    Args:
        graph: From ``graph.trace``, without defaults: a default would make the quantizer take an adapter for a weight.
        profile: The choice.
    """
    if profile is Profile.FP32:
        return graph
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        out = Path(folder) / "int8.onnx"
        _quietly(graph, out)
        result = onnx.load(out)
    before, after = ([value.name for value in g.graph.input] for g in (graph, result))
    if before != after:
        raise ConfigError("quantization removed inputs of the graph; this version of onnxruntime cannot be used")
    return result


def _quietly(graph: onnx.ModelProto, out: Path) -> None:
    # It warns through the root logger that shapes were not inferred beforehand; they are dynamic here.
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            graph,
            out,
            op_types_to_quantize=["MatMul", "Gather"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Seven bits: with eight, a processor without VNNI saturates and answers otherwise than the one that
            # passed the parity gate (docs/decisions/0003-adapters-are-dequantized-at-load.md).
            reduce_range=True,
        )
    finally:
        root.setLevel(level)
