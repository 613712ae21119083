"""Torch's graphs in the one form that quantization and slots expect: the outputs stay the same."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers.pytorch_utils import Conv1D

from export.onnx import segments
from export.onnx.matmuls import merge, normalize
from export.onnx.peftmodel import as_linear, replace_conv1d
from export.onnx.quantize import in_blocks
from export.onnx.segments import Segments
from export.onnx.tensorstore import MEMORY, OnDisk, TensorStore

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


# Merged MatMuls give bit-identical outputs.
WIDTH = 96
SIZES = {"q": 40, "k": 8, "v": 24}


def shared_input(*, second_layer: bool = False) -> onnx.ModelProto:
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


def outputs(model: onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString())
    answers: list[np.ndarray] = session.run([value.name for value in shared_input().graph.output[:3]], {"x": x})
    return answers


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 33])
def test_each_output_is_bit_identical_to_the_separate_matmul(bits: int, tokens: int) -> None:
    model = in_blocks(shared_input(), bits, {})
    x = np.random.default_rng(tokens).standard_normal((2, tokens, WIDTH), np.float32)
    separate = outputs(model, x)
    merge(model)
    assert kinds(model).count("MatMulNBits") == 2  # q, k and v; and o, which has another input
    for ours, expected in zip(outputs(model, x), separate, strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_matmuls_of_other_bits_stay_separate_and_nothing_is_stored_twice() -> None:
    model = in_blocks(shared_input(), 4, {"v": 8})
    merge(model)
    assert (kinds(model).count("MatMulNBits"), kinds(model).count("Split")) == (3, 1)
    names = [tensor.name for tensor in model.graph.initializer]
    read = {name for node in model.graph.node for name in node.input}
    assert set(names) <= read
    assert len(names) == len(set(names))


def test_layers_that_share_weights_share_the_merged_weights() -> None:
    model = in_blocks(shared_input(second_layer=True), 4, {})
    before = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    merge(model)
    assert kinds(model).count("MatMulNBits") == 2
    assert sum(len(tensor.raw_data) for tensor in model.graph.initializer) < before + 100
    x = np.random.default_rng(1).standard_normal((1, 3, WIDTH), np.float32)
    session = ort.InferenceSession(model.SerializeToString())
    np.testing.assert_array_equal(session.run(["k2"], {"x": x})[0], session.run(["k"], {"x": -x})[0])


def test_float_matmuls_are_not_merged() -> None:
    model = shared_input()
    merge(model)
    assert kinds(model) == kinds(shared_input())


# A graph that is run in parts gives what it gives as a whole.
def parted(store: TensorStore) -> onnx.ModelProto:
    """Three products; the last part reads what the first one computed, and a node has a graph within it."""
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((32, 32)).astype(np.float32) for _ in range(3)]
    give = helper.make_graph(
        [helper.make_node("Add", ["second", "first"], ["sum"])],
        "then",
        [],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["second"], ["same"])],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "W0"], ["first"]),
        helper.make_node("MatMul", ["first", "W1"], ["second"]),
        helper.make_node("If", ["flag"], ["chosen"], then_branch=give, else_branch=other),
        helper.make_node("MatMul", ["chosen", "W2"], ["y"]),
    ]
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ("rows", 32)),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, ()),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("rows", 32))]
    stored = [store.tensor(value, f"W{number}") for number, value in enumerate(weights)]
    return helper.make_model(
        helper.make_graph(nodes, "g", inputs, outputs, stored),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )


@pytest.mark.parametrize("limit", [2**28, 5000, 1])  # one part, and a part for each weight
@pytest.mark.parametrize("flag", [True, False])
def test_parts_give_what_the_whole_graph_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, flag: bool
) -> None:
    monkeypatch.setattr(segments, "LIMIT", limit)
    store, read = OnDisk(tmp_path / "tensors"), []
    feeds: dict[str, Any] = {"x": np.eye(32, dtype=np.float32)[:3], "flag": np.array(flag)}
    whole = ort.InferenceSession(parted(MEMORY).SerializeToString(), providers=["CPUExecutionProvider"])
    expected = whole.run(["y"], feeds)[0]
    parts = Segments(parted(store), store, read.append)
    found = parts.run(["y", "first", "x", "W1"], feeds)
    np.testing.assert_allclose(found["y"], expected, rtol=1e-5, atol=1e-5)
    assert found["first"].shape == (3, 32)
    np.testing.assert_array_equal(found["x"], feeds["x"])
    assert found["W1"].shape == (32, 32)
    assert len(read) == (1 if limit == 2**28 else 3)
    assert sum(read) == parts.size == 3 * 32 * 32 * 4


def test_a_store_on_disk_keeps_what_a_graph_has_and_small_tensors_in_the_graph(tmp_path: Path) -> None:
    store = OnDisk(tmp_path / "tensors")
    values = [np.arange(600, dtype=np.float32).reshape(20, 30).T, np.ones(3, np.float32), np.zeros(400, np.float32)]
    made = [store.tensor(value, str(number)) for number, value in enumerate(values)]
    for tensor, value in zip(made, values, strict=True):
        np.testing.assert_array_equal(store.array(tensor), value)
    assert [tensor.data_location == TensorProto.EXTERNAL for tensor in made] == [True, False, True]
    kept = onnx.ModelProto()
    kept.graph.initializer.extend(made[:2])
    store.keep([kept])
    assert len(list(store.place.iterdir())) == 1
    np.testing.assert_array_equal(store.array(made[0]), values[0])
    with pytest.raises(FileNotFoundError):
        store.array(made[2])
    np.testing.assert_array_equal(numpy_helper.to_array(made[1]), values[1])
