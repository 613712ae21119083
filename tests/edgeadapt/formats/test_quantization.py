"""What each number format of an adapter file keeps, and that a file of another form is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aggregation.errors import DataError
from edgeadapt.formats.graphinputs import VECTORS, VIRTUAL
from edgeadapt.formats.int4 import BLOCK
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import Format
from edgeadapt.formats.quantization import SCALE, quantize, restore
from tests.support import refused

A, B, HEAD, BIAS = "x.query.lora_A.weight", "x.query.lora_B.weight", "head.weight", "head.bias"
FORMATS: list[Format] = ["fp32", "fp16", "int8", "int4"]
FLOATS = st.floats(-1e6, 1e6, width=32)


def inputs(rank: int = 2, labels: int = 3) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {A: (6, rank), B: (rank, 5), HEAD: (labels, 4), BIAS: (labels,)}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def test_fp32_loses_nothing() -> None:
    restored = restore(quantize(inputs(), "fp32"), "fp32")
    for name, value in inputs().items():
        np.testing.assert_array_equal(restored[name], value)


@given(arrays(np.float32, (6, 2), elements=FLOATS), arrays(np.float32, (3, 4), elements=FLOATS))
def test_int8_errs_by_half_a_scale_at_most(a: Any, head: Any) -> None:
    given_inputs = inputs() | {A: a, HEAD: head}
    stored = quantize(given_inputs, "int8")
    restored = restore(stored, "int8")
    for name, axis in ((A, 0), (HEAD, 1)):
        bound = np.abs(given_inputs[name]).max(axis=axis, keepdims=True) / 127 / 2
        assert (np.abs(restored[name] - given_inputs[name]) <= bound * 1.001 + 1e-38).all()


def test_int8_has_a_scale_for_each_rank_and_each_row_and_leaves_vectors_alone() -> None:
    stored = quantize(inputs(rank=2, labels=3), "int8")
    assert {name: stored[name + SCALE].shape for name in (A, B, HEAD)} == {A: (1, 2), B: (2, 1), HEAD: (3, 1)}
    assert stored[A].dtype == np.int8
    assert stored[BIAS].dtype == np.float32
    assert BIAS + SCALE not in stored


@pytest.mark.parametrize("form", FORMATS)
def test_vectors_and_virtual_tokens_stay_in_float32(form: Format) -> None:
    names = [*(f"x.key{kind}" for kind in VECTORS), *VIRTUAL]
    vectors = {name: np.float32([[1.1, 1e30, -0.3]]) for name in names}
    stored = quantize(vectors, form)
    assert {value.dtype for value in stored.values()} == {np.dtype(np.float32)}
    for name, value in restore(stored, form).items():
        np.testing.assert_array_equal(value, vectors[name])
    if form != "fp32":
        with refused(DataError, "x.key.output_scale"):
            restore({"x.key.output_scale": np.ones((1, 4), np.float16)}, form)


@given(
    arrays(np.float32, (36, 2), elements=FLOATS), arrays(np.float32, (3, 70), elements=st.floats(-4e5, 4e5, width=32))
)
def test_int4_errs_in_a_block_by_half_a_seventh_of_its_largest_in_the_mean(a: Any, head: Any) -> None:
    a = a.clip(-4e5, 4e5)
    restored = restore(quantize({A: a, HEAD: head}, "int4"), "int4")
    for found, value in ((restored[A].T, a.T), (restored[HEAD], head)):
        assert found.shape == value.shape
        for start in range(0, value.shape[1], BLOCK):
            block = value[:, start : start + BLOCK].astype(np.float64)
            error = np.sqrt(((found[:, start : start + BLOCK] - block) ** 2).mean(axis=1))
            # The scale is rounded to float16: 2^-11 of itself, and at most 2^-25 where it is nearly nothing.
            assert (error <= np.abs(block).max(axis=1) / 14 * 1.002 + 8 * 2.0**-25).all()


def test_int4_packs_each_rank_as_a_row_and_leaves_odd_widths_to_int8() -> None:
    stored = quantize(inputs(rank=2), "int4")
    assert (str(stored[A].dtype), stored[A].shape, stored[A + SCALE].shape) == ("uint8", (2, 3), (2, 1))
    assert (str(stored[HEAD].dtype), stored[HEAD].shape, stored[HEAD + SCALE].shape) == ("uint8", (3, 2), (3, 1))
    assert stored[A + SCALE].dtype == np.float16
    assert (str(stored[B].dtype), stored[B + SCALE].shape) == ("int8", (2, 1))  # five columns
    assert {name: value.shape for name, value in restore(stored, "int4").items()} == {
        name: value.shape for name, value in inputs(rank=2).items()
    }


def test_a_lora_layer_without_rank_survives_every_format() -> None:
    for form in FORMATS:
        found = restore(quantize(inputs(rank=0), form), form)
        assert (found[A].shape, found[B].shape) == ((6, 0), (0, 5))


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_restored_lies_in_memory_as_a_graph_reads_it(form: Format) -> None:
    for value in restore(quantize(inputs(), form), form).values():
        assert value.flags.c_contiguous
        assert value.dtype == np.float32


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("tiny", [0.0, 1e-45])
def test_a_row_of_nothing_stays_nothing_when_quantized(tiny: float, form: Format) -> None:
    given_inputs = inputs() | {B: np.full((2, 6), tiny, dtype=np.float32)}
    assert not restore(quantize(given_inputs, form), form)[B].any()


@pytest.mark.parametrize(("form", "value"), [("fp16", 1e5), ("int4", 5e5)])
def test_too_large_for_a_format_is_refused(form: Format, value: float) -> None:
    with refused(DataError, A):
        quantize(inputs() | {A: np.full((6, 2), value, dtype=np.float32)}, form)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_stored(bad: float) -> None:
    with refused(DataError, BIAS):
        quantize(inputs() | {BIAS: np.array([0, bad, 0], dtype=np.float32)}, "int8")
