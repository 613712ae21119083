"""Profiles of a graph: ONNX Runtime computes with the values of the blocks, within their rounding error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from aggregation.errors import ConfigError
from export.onnx import headers
from export.onnx.blocks import BLOCK, Blocks, eight_bits, four_bits, four_bits_exactly
from export.onnx.calibrate import feeds_for, lossy_matmuls
from export.onnx.exported import Profile
from export.onnx.quantize import WEB_LIMIT, in_blocks, in_integers, quantize
from tests.support import refused

ROWS, WIDTH, ENTRIES = 48, 96, 40


def weight(seed: int = 0, shape: tuple[int, int] = (ROWS, WIDTH)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@given(seed=st.integers(0, 2**32), size=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(max_examples=20, deadline=None)
def test_bytes_differ_by_at_most_half_a_scale(seed: int, size: float) -> None:
    matrix = weight(seed) * np.float32(size)
    blocks = eight_bits(matrix)
    error = np.abs(blocks.values - matrix).reshape(ROWS, -1, BLOCK)
    assert (error <= blocks.scales[:, :, None] * 0.501).all()


@pytest.mark.parametrize("make", [eight_bits, four_bits])
def test_a_block_of_zeros_stays_zero(make: object) -> None:
    assert not make(np.zeros((2, 64), np.float32)).values.any()  # type: ignore[operator]


def graph() -> onnx.ModelProto:
    """Two MatMuls, a look-up, and a MatMul with the transposed embedding of the look-up."""
    stored = {"W": weight(1).T, "small": weight(2, (ROWS, 5)), "embedding": weight(3, (ENTRIES, WIDTH))}
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["x"]),
        helper.make_node("MatMul", ["x", "W"], ["y"]),
        helper.make_node("MatMul", ["y", "small"], ["z"]),
        helper.make_node("FusedMatMul", ["x", "embedding"], ["scores"], domain="com.microsoft", transB=1),
    ]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("y", "z", "scores")]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("batch", "n"))],
            outputs,
            [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in stored.items()],
        ),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)],
        ir_version=10,
    )


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    answers: list[np.ndarray] = ort.InferenceSession(model.SerializeToString()).run(
        None, {"input_ids": np.arange(ENTRIES)[None]}
    )
    return answers


@pytest.mark.parametrize(("bits", "other"), [(8, {}), (4, {}), (8, {"y": 4})])
def test_onnx_runtime_multiplies_with_the_values_of_the_blocks(bits: int, other: dict[str, int]) -> None:
    found = run(in_blocks(graph(), bits, other))
    make = four_bits if 4 in (bits, *other.values()) else eight_bits
    embedding = eight_bits(weight(3, (ENTRIES, WIDTH))).values  # in every profile
    expected = embedding @ make(weight(1)).values.T
    # The activations become int8 as well: one part in 254 of the largest in a block.
    tolerance = 0.02 * np.abs(expected).max()
    np.testing.assert_allclose(found[0][0], expected, atol=tolerance)
    np.testing.assert_allclose(found[2][0], embedding @ embedding.T, atol=0.02 * np.abs(embedding @ embedding.T).max())


def test_a_width_not_divisible_by_a_block_and_a_matmul_left_out_stay_in_float() -> None:
    kinds = [node.op_type for node in in_blocks(graph(), 8, {"y": 32}).graph.node]
    assert kinds == ["GatherBlockQuantized", "MatMul", "MatMul", "MatMulNBits"]


def test_integer_matmuls_give_the_float_outputs_within_rounding() -> None:
    exact, found = run(graph()), run(in_integers(graph(), set()))
    for ours, theirs in zip(found, exact, strict=True):
        assert np.square(ours - theirs).sum() < 1e-3 * np.square(theirs).sum()
    kinds = [node.op_type for node in in_integers(graph(), {"y"}).graph.node]
    assert (kinds.count("MatMul"), kinds.count("MatMulInteger"), kinds.count("DynamicQuantizeLinear")) == (2, 1, 1)


def test_a_matmul_in_float_keeps_weights_of_four_bits_exactly_in_a_quarter_of_the_bytes() -> None:
    model = graph()
    rounded = four_bits_exactly(four_bits_of(weight(1)))
    assert rounded is not None
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rounded.values.T), "W"))
    kept = in_integers(model, {"y"})
    np.testing.assert_array_equal(run(kept)[0], run(in_blocks(model, 32, {}))[0])
    stored = {tensor.name: len(tensor.raw_data) for tensor in kept.graph.initializer}
    assert "W" not in stored
    assert stored["W_bytes"] == ROWS * WIDTH


def four_bits_of(matrix: np.ndarray) -> np.ndarray:
    """``matrix`` rounded as ``Q4_0`` rounds."""
    rows = matrix.reshape(len(matrix), -1, BLOCK)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=2, keepdims=True), axis=2)
    steps = np.rint(rows / (-largest / 8)).clip(-8, 7)
    rounded: np.ndarray = (steps * (-largest / 8)).reshape(matrix.shape).astype(np.float32)
    return rounded


def test_a_matmul_with_an_outlier_among_its_inputs_stays_in_float() -> None:
    calm, wild = graph(), graph()
    embedding = weight(3, (ENTRIES, WIDTH))
    embedding[7, 5] = 3000.0  # one activation of one token, as in language models
    wild.graph.initializer[2].CopyFrom(numpy_helper.from_array(embedding, "embedding"))
    feeds = feeds_for(calm, range(ENTRIES))
    assert lossy_matmuls(calm, feeds, WEB_LIMIT) == {}
    assert "y" in lossy_matmuls(wild, feeds, WEB_LIMIT)
    left = quantize(wild, Profile.WEB_INT8, range(ENTRIES))
    assert [node.op_type for node in left.graph.node if node.output[0] == "y"] == ["MatMul"]


def test_calibration_fills_tokens_caches_and_slots_and_refuses_other_inputs() -> None:
    model = graph()
    model.graph.input.extend(
        [
            helper.make_tensor_value_info("past", TensorProto.FLOAT, ("batch_size", 3, "past", 16)),
            helper.make_tensor_value_info("A", TensorProto.FLOAT, (64, "rank_0")),
        ]
    )
    shapes = {name: value.shape for name, value in feeds_for(model, [4, 5]).items()}
    assert shapes == {"input_ids": (1, 2), "past": (1, 3, 0, 16), "A": (64, 0)}
    model.graph.input.append(helper.make_tensor_value_info("image", TensorProto.UINT8, ("n",)))
    with refused(ConfigError, "image"):
        feeds_for(model, [4])


def test_the_sums_of_an_input_are_computed_once_for_all_its_matmuls() -> None:
    twice = graph()
    twice.graph.node.append(helper.make_node("MatMul", ["x", "V"], ["w"]))
    twice.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(weight(8).T), "V"))
    twice.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, None))
    made = in_blocks(twice, 4, {})
    assert [node.op_type for node in made.graph.node].count("ReduceSum") == 1
    alone, both = run(in_blocks(graph(), 4, {})), run(made)
    np.testing.assert_array_equal(both[0], alone[0])
    expected = eight_bits(weight(3, (ENTRIES, WIDTH))).values @ four_bits(weight(8)).values.T
    np.testing.assert_allclose(both[3][0], expected, atol=0.02 * np.abs(expected).max())


def test_an_input_may_have_any_rank_that_the_graph_states() -> None:
    flat = graph()
    flat.graph.input[0].CopyFrom(helper.make_tensor_value_info("input_ids", TensorProto.INT64, ("n",)))
    flat.graph.value_info.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ("n", WIDTH)))
    session = ort.InferenceSession(in_blocks(flat, 4, {}).SerializeToString())
    found = session.run(["y"], {"input_ids": np.arange(ENTRIES)})[0]
    np.testing.assert_array_equal(found, run(in_blocks(graph(), 4, {}))[0][0])


def test_an_embedding_that_is_also_an_output_layer_is_stored_once(tmp_path: Path) -> None:
    shared = in_blocks(graph(), 8, {"y": 32})
    alone = graph()
    del alone.graph.node[3]
    del alone.graph.output[2]
    sizes = []
    for model in (shared, in_blocks(alone, 8, {"y": 32})):
        headers.split(model, {}, {}, tmp_path)
        sizes.append((tmp_path / headers.WEIGHTS).stat().st_size)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("profile", list(Profile))
def test_no_profile_changes_its_argument_or_the_inputs(profile: Profile) -> None:
    given_graph = graph()
    before = given_graph.SerializeToString(deterministic=True)
    made = quantize(given_graph, profile, [1])
    assert given_graph.SerializeToString(deterministic=True) == before
    assert [value.name for value in made.graph.input] == ["input_ids"]


@pytest.mark.parametrize("profile", [Profile.NATIVE_INT8, Profile.WEB_INT8])
def test_weights_that_come_in_four_bits_keep_them_in_every_profile(profile: Profile) -> None:
    steps = np.random.default_rng(5).integers(0, 16, (ROWS + ENTRIES, WIDTH)).astype(np.float32) - 8
    steps[:, ::BLOCK] = -8
    stored = graph()
    for tensor in stored.graph.initializer:
        if tensor.name in ("W", "embedding"):
            rows = steps[:ROWS].T if tensor.name == "W" else steps[ROWS:]
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(rows) * np.float32(0.25), tensor.name))
    stored.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, None))
    small = quantize(stored, profile, list(range(8)))
    bits = {
        node.op_type: helper.get_node_attr_value(node, "bits") for node in small.graph.node if "Bits" in node.op_type
    }
    bits |= {
        n.op_type: helper.get_node_attr_value(n, "bits") for n in small.graph.node if n.op_type.startswith("Gather")
    }
    assert set(bits.values()) == {4}
    np.testing.assert_array_equal(run(small)[3][0], steps[ROWS:] * np.float32(0.25))


# Weights in four bits: which stay exact, the bound on the error, and that rounding twice changes nothing.
Floats = np.ndarray[Any, np.dtype[np.float32]]
ODD_ROWS, BLOCKS = 24, 37  # more than the 32 blocks whose residuals fill a block, and an odd number


def by_block(weight: Floats) -> Floats:
    return weight.reshape(ODD_ROWS, -1, BLOCK)


def grid(rng: np.random.Generator, start: Any, least: int = 0, most: int = 15) -> Floats:
    """Even steps; each block has its own step width, and its first code is ``start`` steps from zero."""
    codes = rng.integers(least, most + 1, (ODD_ROWS, BLOCKS, BLOCK))
    codes[:, :, 0], codes[:, :, 1] = least, most
    step = rng.uniform(0.01, 0.1, (ODD_ROWS, BLOCKS, 1)).astype(np.float16)
    return ((codes + start) * step).reshape(ODD_ROWS, -1).astype(np.float32)


def q4_1(rng: np.random.Generator) -> Floats:
    return grid(rng, rng.uniform(-15, 0, (ODD_ROWS, BLOCKS, 1)))


KINDS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "normal": lambda rng: rng.standard_normal((ODD_ROWS, BLOCKS * BLOCK), np.float32),
    "around one": lambda rng: rng.standard_normal((ODD_ROWS, BLOCKS * BLOCK), np.float32) + 1,
    "positive": lambda rng: rng.uniform(2, 5, (ODD_ROWS, BLOCKS * BLOCK)).astype(np.float32),
    "heavy tails": lambda rng: rng.standard_normal((ODD_ROWS, BLOCKS * BLOCK), np.float32) ** 3,
    "one outlier a row": lambda rng: np.where(np.arange(BLOCKS * BLOCK) == 5, np.float32(50), KINDS["normal"](rng)),
    "blocks of all sizes": lambda rng: (
        KINDS["normal"](rng) * np.exp(2 * rng.standard_normal((ODD_ROWS, BLOCKS))).repeat(BLOCK, 1)
    ).astype(np.float32),
    "Q4_1": q4_1,
    "zero between two steps": lambda rng: grid(rng, -7.5),
    "fifteen steps": lambda rng: grid(rng, -8.0, 1),
    "Q4_1 and others": lambda rng: np.where(rng.random((ODD_ROWS, 1)) < 0.5, q4_1(rng), KINDS["normal"](rng)),
}
kinds = st.sampled_from(list(KINDS))
seeds = st.integers(0, 2**32)


def widths(blocks: Blocks) -> Floats:
    """The steps of the weights' own blocks, shape ``(rows, blocks, 1)``."""
    return blocks.scales[:, :BLOCKS, None]


def plain(weight: Floats) -> Floats:
    """The usual asymmetric rounding: 16 steps over zero and the block, with an integer zero point."""
    rows = by_block(weight)
    low, high = np.minimum(rows.min(2, keepdims=True), 0), np.maximum(rows.max(2, keepdims=True), 0)
    step = (high - low) / 15
    zero = np.rint(-low / step)
    return ((np.clip(np.rint(rows / step) + zero, 0, 15) - zero) * step).reshape(weight.shape)


def row_errors(found: Floats, weight: Floats) -> Floats:
    return np.square(found - weight).sum(1)


@given(seed=seeds)
@settings(max_examples=15, deadline=None)
def test_sixteen_even_steps_with_zero_among_them_change_by_at_most_a_sixteenth_of_a_step(seed: int) -> None:
    weight = q4_1(np.random.default_rng(seed))
    blocks = four_bits(weight)
    error, steps = np.abs(by_block(blocks.values - weight)), widths(blocks)
    assert (error <= steps.max(1, keepdims=True) / 16 * 1.02).all()
    assert (np.sqrt(np.square(error).mean()) < steps.mean() / 30).all()
    # With integer zero points alone the squared error is more than a hundred times as large.
    assert row_errors(blocks.values, weight).sum() < row_errors(plain(weight), weight).sum() / 100


@pytest.mark.parametrize(("start", "least"), [(-3.0, 0), (-15.0, 0), (0.0, 0), (-8.0, 1)])
def test_even_steps_that_meet_zero_are_kept_exactly(start: float, least: int) -> None:
    weight = grid(np.random.default_rng(3), start, least)
    np.testing.assert_allclose(four_bits(weight).values, weight, atol=1e-6)


@given(kind=kinds, seed=seeds)
@settings(max_examples=40, deadline=None)
def test_no_row_loses_more_than_with_plain_rounding(kind: str, seed: int) -> None:
    weight = KINDS[kind](np.random.default_rng(seed))
    ours, usual = row_errors(four_bits(weight).values, weight), row_errors(plain(weight), weight)
    # 2 %: rounding the residuals costs where the grid gains nothing. 1e-9: float32, where plain rounding is exact.
    assert (ours <= 1.02 * usual + 1e-9).all()
    if kind == "normal":
        assert ours.sum() < 0.9 * usual.sum()


@given(kind=kinds, seed=seeds, size=st.sampled_from([1e-4, 1.0, 1e4]))
@settings(max_examples=60, deadline=None)
def test_rounding_rounded_weights_changes_nothing(kind: str, seed: int, size: float) -> None:
    once = four_bits(KINDS[kind](np.random.default_rng(seed)) * np.float32(size))
    moved = np.abs(by_block(four_bits(once.values).values - once.values))
    assert (moved <= 1e-3 * widths(once)).all()


@given(kind=kinds, seed=seeds)
@settings(max_examples=10, deadline=None)
def test_each_row_is_rounded_independently(kind: str, seed: int) -> None:
    weight = KINDS[kind](np.random.default_rng(seed))
    np.testing.assert_array_equal(four_bits(weight[3:5]).values, four_bits(weight).values[3:5])


def test_a_block_of_equal_values_is_kept() -> None:
    weight = np.repeat(np.float32([[0.0, 0.25, -3.0, 1e-8]]), BLOCK, axis=1)
    np.testing.assert_allclose(four_bits(weight).values, weight, rtol=1e-6)


def symmetric(rows: int, width: int) -> np.ndarray:
    """Weights in ``Q4_0``: in each block sixteen steps, the lowest of which is the largest weight."""
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 16, (rows, width // BLOCK, BLOCK))
    codes[:, :, 5] = 0
    scales = rng.standard_normal((rows, width // BLOCK, 1)).astype(np.float16).astype(np.float32)
    return ((codes - 8).astype(np.float32) * scales).reshape(rows, width)


def test_weights_in_symmetric_four_bits_keep_them_exactly() -> None:
    weight = symmetric(50, 96)
    weight[3, :32] = 0
    blocks = four_bits_exactly(weight)
    assert blocks is not None
    assert (blocks.bits, blocks.sums, blocks.zeros) == (4, 0, None)
    assert blocks.codes.shape == (50, 48)
    np.testing.assert_array_equal(blocks.values, weight)


@pytest.mark.parametrize("change", [1e-6, 0.3, -0.3])
def test_a_single_weight_between_the_steps_is_noticed(change: float) -> None:
    weight = symmetric(50, 96)
    weight[-1, -1] += np.float32(change)
    assert four_bits_exactly(weight) is None
