"""What each number format of an adapter file keeps, and that a file of another form is refused."""

import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from aggregation.errors import DataError
from edgeadapt.formats import container
from edgeadapt.formats.calibration import FOLDS, PRIOR, Labels, calibrate, confidences, expected_calibration_error, fit
from edgeadapt.formats.graphinputs import VECTORS, VIRTUAL
from edgeadapt.formats.int4 import BLOCK, LARGEST, pack, scale_shape, unpack
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import MAX_TEMPERATURE, MIN_TEMPERATURE, Format
from edgeadapt.formats.quantization import SCALE, quantize, restore
from tests.support import refused
from tests.support.limits import limited

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


# Four bits


def test_a_block_whose_numbers_are_codes_is_stored_exactly() -> None:
    value = (np.arange(BLOCK, dtype=np.float32) % 16 - 8)[None] * np.float32(0.25)
    codes, scales = pack(value)
    np.testing.assert_array_equal(unpack(codes, scales), value)


def test_the_low_half_of_a_byte_holds_the_first_of_its_two_numbers() -> None:
    """The known answer that other readers are held to."""
    codes = np.array([[0x80, 0x9F, 0x17]], np.uint8)
    found = unpack(codes, np.array([[0.5]], np.float16))
    np.testing.assert_array_equal(found, [[-4.0, 0.0, 3.5, 0.5, -0.5, -3.5]])


def test_the_side_with_the_longer_range_is_where_the_largest_number_is() -> None:
    value = np.zeros((2, BLOCK), np.float32)
    value[:, 0], value[:, 1] = (8.0, -8.0), (-7.0, 7.0)
    codes, scales = pack(value)
    assert [float(scale) for scale in scales[:, 0]] == [-1.0, 1.0]
    np.testing.assert_array_equal(unpack(codes, scales), value)


@pytest.mark.parametrize("width", [2, 30, 32, 34, 96])
def test_any_even_width_comes_back_with_its_shape(width: int) -> None:
    value = np.random.default_rng(width).standard_normal((2, 3, width), dtype=np.float32)
    codes, scales = pack(value)
    assert codes.shape == (2, 3, width // 2)
    assert scales.shape == scale_shape(codes) == (2, 3, -(-width // BLOCK))
    assert np.abs(unpack(codes, scales) - value).max() < 0.5


def test_a_short_last_block_is_not_disturbed_by_what_fills_it_up() -> None:
    value = np.random.default_rng(1).standard_normal((4, BLOCK + 8), dtype=np.float32)
    alone = unpack(*pack(value[:, BLOCK:]))
    np.testing.assert_array_equal(unpack(*pack(value))[:, BLOCK:], alone)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [LARGEST, 1e-7, 1e-45])
def test_the_largest_and_the_smallest_numbers_are_packed_without_a_warning(size: float) -> None:
    value = np.full((1, BLOCK), size * 1.49 / 7, np.float32)
    value[0, 0] = size
    found = unpack(*pack(value))
    assert np.sqrt(((found - value).astype(np.float64) ** 2).mean()) <= size / 14 * 1.01 + 8 * 2.0**-25


def _error(found: Floats, value: Floats) -> float:
    return float(np.sqrt(((found - value) ** 2).sum() / (value**2).sum()))


def _rounded(value: Floats, steps: int) -> Floats:
    blocks = value.reshape(-1, BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / steps
    rounded: Floats = np.rint(blocks / scale) * scale
    return rounded.reshape(value.shape)


def test_the_search_saves_a_tenth_of_the_error_of_rounding_but_makes_no_bits() -> None:
    value = np.random.default_rng(2).standard_normal((64, 576), dtype=np.float32)
    found, plain = _error(unpack(*pack(value)), value), _error(_rounded(value, 7), value)
    assert found < 0.9 * plain
    assert found > _error(
        _rounded(value, 15), value
    )  # five bits: below it, the test would be measuring the wrong thing


# The container of an adapter file


def test_unpacked_tensors_own_their_memory() -> None:
    stored = {"w": np.arange(6, dtype=np.int8).reshape(2, 3), "w#scale": np.ones((2, 1), np.float32)}
    unpacked = container.unpack(container.pack(stored))
    assert all(value.flags.owndata for value in unpacked.values())  # a view of freed memory would change later
    for name, value in stored.items():
        np.testing.assert_array_equal(unpacked[name], value)


def test_a_shape_that_no_memory_has_is_refused() -> None:
    """tests/vectors/test_bundle.py tries the other ways in which a signer can damage a file."""
    blob = container.pack({"e": np.zeros((5, 0), np.float32)})
    dimension, too_large = struct.pack("<q", 5), struct.pack("<q", 2**61)
    assert blob.count(dimension) == 1
    with refused(DataError, ".onnx_adapter"):
        container.unpack(blob.replace(dimension, too_large))


def shared(size: int, others: int) -> bytes:
    """A file of which ``others`` tensors refer to the shape and the bytes of one of ``size`` numbers."""
    one = container.pack({f"t{n:04}": np.zeros(1 if n else size, np.int8) for n in range(others + 1)})
    blob = bytearray(one)
    root = container._fields(one, container._number(one, "<I", 0))
    places = container._elements(one, root(container.PARAMETERS), 4)
    first, *rest = (container._fields(one, at + container._number(one, "<I", at)) for at in places)
    for fields in rest:
        for field in (container.DIMENSIONS, container.RAW_DATA):
            origin, place = first(field), fields(field)
            assert origin is not None
            assert place is not None
            struct.pack_into("<I", blob, place, origin + container._number(one, "<I", origin) - place)
    return bytes(blob)


def test_tensors_that_share_their_bytes_are_refused_before_they_are_copied() -> None:
    """300 kB would be 200 MB."""
    blob = shared(200_000, 1000)
    assert len(blob) < 300_000
    with limited(5, 2**26), refused(DataError, ".onnx_adapter"):
        container.unpack(blob)


# A temperature is the one that examples were drawn with, and the calibration error is measured on other examples.
def probabilities(logits: Floats) -> Floats:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Floats = weights / weights.sum(axis=1, keepdims=True)
    return result


def drawn(temperature: float, count: int, seed: int = 0, labels: int = 6) -> tuple[Floats, Labels]:
    """Logits, and labels whose probabilities are those of the logits at this temperature."""
    rng = np.random.default_rng(seed)
    logits = (3 * rng.standard_normal((count, labels))).astype(np.float32)
    return logits, np.array([rng.choice(labels, p=p / p.sum()) for p in probabilities(logits / temperature)])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_temperature_of_many_examples_is_the_one_that_they_were_drawn_with(temperature: float) -> None:
    assert fit(*drawn(temperature, 4000)) == pytest.approx(temperature, rel=0.06)


@pytest.mark.parametrize(("count", "start"), [(1, 1.0), (20, 1.0), (20, 3.0), (200, 0.5)])
def test_no_other_temperature_has_a_smaller_loss(count: int, start: float) -> None:
    logits, labels = drawn(1.8, count)

    def objective(temperature: float) -> float:
        loss = -np.log(probabilities(logits.astype(np.float64) / temperature)[np.arange(count), labels]).sum()
        return float(loss + PRIOR * (start / temperature + np.log(temperature / start)))

    found = fit(logits, labels, start)
    grid = np.geomspace(MIN_TEMPERATURE, MAX_TEMPERATURE, 2000)
    best = min(grid, key=objective)
    assert found == pytest.approx(best, rel=0.01)
    assert objective(found) <= objective(best) + 1e-6


def test_without_examples_the_temperature_is_the_one_to_start_from() -> None:
    for start in (1.0, 2.2):
        assert fit(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), start) == start


def test_answers_that_are_all_right_or_all_wrong_give_a_temperature_within_the_bounds() -> None:
    logits = np.tile(np.float32([[6, 0, 0]]), (80, 1))
    right, wrong = fit(logits, np.zeros(80, np.int64)), fit(logits, np.ones(80, np.int64))
    assert MIN_TEMPERATURE < right < 1
    assert 1 < wrong <= MAX_TEMPERATURE
    # Without the prior the first would be 0: nothing is as likely as to be always certain.
    assert confidences(logits[:1] / np.float32(right))[0] < 0.9999999


def test_confidences_are_those_of_the_softmax_also_for_large_logits() -> None:
    logits = drawn(1.0, 50)[0]
    np.testing.assert_allclose(confidences(logits), probabilities(logits).max(axis=1), rtol=1e-6)
    assert confidences(np.float32([[10_000, 10_000]])).tolist() == [0.5]


def test_the_calibration_error_is_the_mean_difference_of_accuracy_and_confidence_over_bins() -> None:
    # Two bins of two: confidences .5 and .5, of which one is right; .9 and .9, of which none is.
    even, sure = [0.0, 0.0], [float(np.log(9)), 0.0]
    logits = np.array([even, sure, even, sure], np.float32)
    assert expected_calibration_error(logits, np.array([0, 1, 1, 1]), bins=2) == pytest.approx((0 + 0.9) / 2)
    assert expected_calibration_error(logits, np.array([0, 1, 0, 1]), bins=2) == pytest.approx((0.5 + 0.9) / 2)
    assert expected_calibration_error(logits[:1], np.array([0])) == pytest.approx(0.5)


def test_examples_drawn_from_their_probabilities_have_a_small_error_and_others_a_large_one() -> None:
    assert expected_calibration_error(*drawn(1.0, 5000)) < 0.025
    assert expected_calibration_error(*drawn(3.0, 5000)) > 0.2


def test_a_temperature_is_measured_on_examples_that_it_was_not_fitted_on() -> None:
    logits, labels = drawn(3.0, 400)
    found = calibrate(logits, labels)
    assert (found.count, found.correct) == (400, int((logits.argmax(axis=1) == labels).sum()))
    assert found.temperature == fit(logits, labels)
    assert found.before == expected_calibration_error(logits, labels)
    assert found.after < found.before / 2
    # A temperature fitted on the example itself follows its label; one that was not does not.
    few, right = np.float32([[4, 0]] * FOLDS), np.zeros(FOLDS, np.int64)
    wrong = right.copy()
    wrong[0] = 1
    own = expected_calibration_error(few / np.float32(fit(few, wrong)), wrong)
    assert calibrate(few, wrong).after > own


def test_the_order_of_the_examples_does_not_put_a_label_into_one_fold() -> None:
    logits, labels = drawn(2.0, 500, labels=FOLDS)
    turns = np.argsort(np.argsort(labels, kind="stable") % 100, kind="stable")
    for order in (np.argsort(labels, kind="stable"), turns):
        assert calibrate(logits[order], labels[order]).after < calibrate(logits[order], labels[order]).before / 2
