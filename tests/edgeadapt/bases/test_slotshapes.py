"""The shapes of slots are dropped from a graph, and nothing else of it."""

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from edgeadapt.bases.slotshapes import without_shapes

SHAPES = {"x": ("rows", 300), "A": (300, "rank_0"), "nä": (), "y": None}


def model() -> onnx.ModelProto:
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    inputs[1].doc_string = "a slot " * 50  # its length needs two bytes
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "A"], ["z"])], "g", inputs, inputs[:1])
    made = helper.make_model(graph)
    helper.set_model_props(made, {"key": "value"})
    return made


def test_the_named_inputs_lose_their_shapes_and_all_else_stays() -> None:
    expected = model()
    for value in expected.graph.input:
        if value.name in ("A", "nä"):
            value.type.tensor_type.ClearField("shape")
    found = without_shapes(model().SerializeToString(), {"A", "nä", "other"})
    assert onnx.load_from_string(found) == expected
    assert found == expected.SerializeToString()


def test_without_slots_not_a_byte_changes() -> None:
    raw = model().SerializeToString()
    assert without_shapes(raw, ()) == raw


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(raw: bytes) -> None:
    try:
        without_shapes(raw, {"A"})
    except ValueError:
        return


@pytest.mark.parametrize("cut", range(1, 200, 7))
def test_a_truncated_graph_is_refused(cut: int) -> None:
    with pytest.raises(ValueError, match="not protobuf"):
        without_shapes(model().SerializeToString()[:-cut], {"A"})
