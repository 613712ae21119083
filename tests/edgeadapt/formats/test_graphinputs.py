"""An adapter's tensors as inputs of a graph, and the slots that they fill exactly."""

import numpy as np
import pytest

from aggregation.errors import DataError
from edgeadapt.formats.graphinputs import check_slots, from_inputs, layout_of, to_inputs
from edgeadapt.formats.layout import Layout, Tensors
from tests.support import refused

A, B, HEAD, BIAS = "x.query.lora_A.weight", "x.query.lora_B.weight", "head.weight", "head.bias"
SLOTS = {A: ("6", "rank_0"), B: ("rank_0", "5"), HEAD: ("labels", "4"), BIAS: ("labels",)}


def inputs(rank: int = 2, labels: int = 3) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {A: (6, rank), B: (rank, 5), HEAD: (labels, 4), BIAS: (labels,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def peft_tensors() -> Tensors:
    return {"base_model.model." + name: value.T.copy() if "lora" in name else value for name, value in inputs().items()}


def test_lora_is_transposed_and_its_scaling_is_folded_into_b() -> None:
    tensors = peft_tensors()
    found = to_inputs(tensors, {"x.query": 2.5})
    np.testing.assert_array_equal(found[A], tensors["base_model.model." + A].T)
    np.testing.assert_array_equal(found[B], tensors["base_model.model." + B].T * np.float32(2.5))
    np.testing.assert_array_equal(found[HEAD], tensors["base_model.model." + HEAD])
    assert all(value.flags.c_contiguous for value in found.values())


@pytest.mark.parametrize("scaling", [0.5, 2.5, 0.0])
def test_inputs_become_the_tensors_again_unless_the_scaling_is_zero(scaling: float) -> None:
    tensors = peft_tensors()
    found = from_inputs(to_inputs(tensors, {"x.query": scaling}), {"x.query": scaling})
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        expected = value * 0 if scaling == 0 and name.endswith(B) else value
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)


def test_the_layout_of_the_inputs_is_that_of_the_tensors() -> None:
    assert layout_of(to_inputs(peft_tensors(), {"x.query": 2.5})) == Layout.of(peft_tensors())


def test_an_adapter_that_fits_gives_each_free_dimension_its_size() -> None:
    assert check_slots(inputs(rank=7, labels=2), SLOTS) == {"rank_0": 7, "labels": 2}


@pytest.mark.parametrize(
    ("name", "shape"),
    [(A, (7, 2)), (B, (3, 5)), (BIAS, (4,)), (HEAD, (3, 4, 1))],
    ids=["width", "another rank than A", "another number of labels than the weight", "dimensions"],
)
def test_a_tensor_of_a_shape_that_its_slot_does_not_take_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with refused(DataError, name, value=shape):
        check_slots(inputs() | {name: np.ones(shape, np.float32)}, SLOTS)


def test_a_missing_and_an_unknown_tensor_are_refused() -> None:
    with refused(DataError, "extra"):
        check_slots(inputs() | {"extra": np.ones(1, np.float32)}, SLOTS)
    with refused(DataError, BIAS):
        check_slots({name: value for name, value in inputs().items() if name != BIAS}, SLOTS)


@pytest.mark.parametrize("rows", [0, 1])
def test_a_vector_is_there_once_or_not(rows: int) -> None:
    slots = {"key.output_scale": ("given_0", "5")}
    assert check_slots({"key.output_scale": np.ones((rows, 5), np.float32)}, slots) == {"given_0": rows}
    with refused(DataError, "key.output_scale", value=(2, 5)):
        check_slots({"key.output_scale": np.ones((2, 5), np.float32)}, slots)
