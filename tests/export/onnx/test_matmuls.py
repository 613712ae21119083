"""Torch's graphs in the one form that quantization and slots expect: the outputs stay the same."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers.pytorch_utils import Conv1D

from export.onnx.matmuls import normalize
from export.onnx.peftmodel import as_linear, replace_conv1d

RNG = np.random.default_rng(0)
X = RNG.standard_normal((5, 4), dtype=np.float32)
WEIGHT = RNG.standard_normal((3, 4), dtype=np.float32)
BIAS = RNG.standard_normal(3, dtype=np.float32)


def graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    made = helper.make_graph(
        list(nodes),
        "test",
        [value("x", TensorProto.FLOAT, [None, 4])],
        [value("y", TensorProto.FLOAT, [None, 3])],
        [numpy_helper.from_array(WEIGHT, "w"), numpy_helper.from_array(BIAS, "b")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: onnx.ModelProto) -> np.ndarray:
    answer: np.ndarray = ort.InferenceSession(model.SerializeToString()).run(None, {"x": X})[0]
    return answer


@pytest.mark.parametrize("inputs", [["x", "w"], ["x", "w", "b"]])
def test_gemm_becomes_a_matmul_with_the_transposed_weight(inputs: list[str]) -> None:
    model = graph(helper.make_node("Gemm", inputs, ["y"], "layer", transB=1))
    before = run(model)
    normalize(model)
    assert [node.op_type for node in model.graph.node] == ["MatMul", "Add"][: len(inputs) - 1]
    assert [list(t.dims) for t in model.graph.initializer if len(t.dims) == 2] == [[4, 3]]
    np.testing.assert_allclose(run(model), before, atol=1e-6)


def test_a_gemm_that_is_not_a_linear_layer_stays() -> None:
    for setting in ({"alpha": 0.5}, {"beta": 2.0}, {"transB": 0}):
        model = graph(helper.make_node("Gemm", ["x", "w", "b"], ["y"], "layer", **({"transB": 1} | setting)))
        normalize(model)
        assert [node.op_type for node in model.graph.node] == ["Gemm"]


def test_a_weight_that_is_transposed_at_run_time_is_stored_transposed() -> None:
    model = graph(
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]), helper.make_node("MatMul", ["x", "t"], ["y"])
    )
    before = run(model)
    normalize(model)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    assert [tensor.name for tensor in model.graph.initializer] == ["t"]
    np.testing.assert_allclose(run(model), before, atol=1e-6)


def test_a_transpose_with_another_permutation_stays() -> None:
    model = graph(
        helper.make_node("Transpose", ["w"], ["t"], perm=[0, 1]),
        helper.make_node("Transpose", ["t"], ["u"]),
        helper.make_node("MatMul", ["x", "u"], ["y"]),
    )
    before = run(model)
    normalize(model)
    np.testing.assert_allclose(run(model), before, atol=1e-6)


def test_conv1d_is_a_linear_layer_with_a_transposed_weight() -> None:
    layer = Conv1D(6, 4)
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    torch.testing.assert_close(as_linear(layer)(x), layer(x))
    within = torch.nn.Sequential(torch.nn.Sequential(layer), torch.nn.Linear(6, 2))
    before = within(x)
    replace_conv1d(within)
    assert [type(m).__name__ for m in within.modules()] == ["Sequential", "Sequential", "Linear", "Linear"]
    torch.testing.assert_close(within(x), before)
