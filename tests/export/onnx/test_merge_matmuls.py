"""Merged MatMuls give bit-identical outputs."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.onnx.matmuls import merge
from export.onnx.quantize import in_blocks

WIDTH = 96
SIZES = {"q": 40, "k": 8, "v": 24}


def graph(*, second_layer: bool = False) -> onnx.ModelProto:
    """Three MatMuls of one input and one of another, or a second layer with the same weights."""
    rng = np.random.default_rng(0)
    stored = {f"W{name}": rng.standard_normal((WIDTH, size), np.float32) for name, size in SIZES.items()}
    stored["Wo"] = rng.standard_normal((SIZES["q"] // 40 * 32, 5), np.float32)
    nodes = [helper.make_node("MatMul", ["x", f"W{name}"], [name]) for name in SIZES]
    if second_layer:
        nodes += [helper.make_node("Neg", ["x"], ["x2"])]
        nodes += [helper.make_node("MatMul", ["x2", f"W{name}"], [f"{name}2"]) for name in SIZES]
    else:
        nodes += [helper.make_node("Slice", ["q", "from", "to", "axis"], ["part"])]
        nodes += [helper.make_node("MatMul", ["part", "Wo"], ["o"])]
    outputs = [name for node in nodes for name in node.output if name not in ("x2", "part")]
    bounds = {"from": [0], "to": [32], "axis": [2]}
    constants = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    constants += [numpy_helper.from_array(np.array(value), name) for name, value in bounds.items()]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ("rows", "tokens", WIDTH))],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            constants,
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString())
    answers: list[np.ndarray] = session.run([value.name for value in graph().graph.output[:3]], {"x": x})
    return answers


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_each_output_is_bit_identical_to_the_separate_matmul(bits: int, tokens: int) -> None:
    model = in_blocks(graph(), bits, {})
    x = np.random.default_rng(tokens).standard_normal((2, tokens, WIDTH), np.float32)
    separate = run(model, x)
    merge(model)
    assert kinds(model).count("MatMulNBits") == 2  # q, k and v; and o, which has another input
    for ours, expected in zip(run(model, x), separate, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_matmuls_of_other_bits_stay_separate_and_nothing_is_stored_twice() -> None:
    model = in_blocks(graph(), 4, {"v": 8})
    merge(model)
    assert (kinds(model).count("MatMulNBits"), kinds(model).count("Split")) == (3, 1)
    names = [tensor.name for tensor in model.graph.initializer]
    read = {name for node in model.graph.node for name in node.input}
    assert set(names) <= read
    assert len(names) == len(set(names))


def test_layers_that_share_weights_share_the_merged_weights() -> None:
    model = in_blocks(graph(second_layer=True), 4, {})
    before = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    merge(model)
    assert kinds(model).count("MatMulNBits") == 2
    assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) < before + 100
    x = np.random.default_rng(1).standard_normal((1, 3, WIDTH), np.float32)
    session = ort.InferenceSession(model.SerializeToString())
    np.testing.assert_array_equal(session.run(["k2"], {"x": x})[0], session.run(["k"], {"x": -x})[0])


def test_float_matmuls_are_not_merged() -> None:
    model = graph()
    merge(model)
    assert kinds(model) == kinds(graph())
