"""A graph that is run in parts gives what it gives as a whole."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.onnx import segments
from export.onnx.segments import Segments
from export.onnx.tensorstore import MEMORY, OnDisk, TensorStore


def graph(store: TensorStore) -> onnx.ModelProto:
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
    whole = ort.InferenceSession(graph(MEMORY).SerializeToString(), providers=["CPUExecutionProvider"])
    expected = whole.run(["y"], feeds)[0]
    parts = Segments(graph(store), store, read.append)
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
