"""Weights in four bits: which stay exact, the bound on the error, and that rounding twice changes nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.onnx.blocks import BLOCK, Blocks, four_bits, four_bits_exactly

Floats = np.ndarray[Any, np.dtype[np.float32]]
ROWS, BLOCKS = 24, 37  # more than the 32 blocks whose residuals fill a block, and an odd number


def in_blocks(weight: Floats) -> Floats:
    return weight.reshape(ROWS, -1, BLOCK)


def grid(rng: np.random.Generator, start: Any, least: int = 0, most: int = 15) -> Floats:
    """Even steps; each block has its own step width, and its first code is ``start`` steps from zero."""
    codes = rng.integers(least, most + 1, (ROWS, BLOCKS, BLOCK))
    codes[:, :, 0], codes[:, :, 1] = least, most
    step = rng.uniform(0.01, 0.1, (ROWS, BLOCKS, 1)).astype(np.float16)
    return ((codes + start) * step).reshape(ROWS, -1).astype(np.float32)


def q4_1(rng: np.random.Generator) -> Floats:
    return grid(rng, rng.uniform(-15, 0, (ROWS, BLOCKS, 1)))


KINDS: dict[str, Callable[[np.random.Generator], Floats]] = {
    "normal": lambda rng: rng.standard_normal((ROWS, BLOCKS * BLOCK), np.float32),
    "around one": lambda rng: rng.standard_normal((ROWS, BLOCKS * BLOCK), np.float32) + 1,
    "positive": lambda rng: rng.uniform(2, 5, (ROWS, BLOCKS * BLOCK)).astype(np.float32),
    "heavy tails": lambda rng: rng.standard_normal((ROWS, BLOCKS * BLOCK), np.float32) ** 3,
    "one outlier a row": lambda rng: np.where(np.arange(BLOCKS * BLOCK) == 5, np.float32(50), KINDS["normal"](rng)),
    "blocks of all sizes": lambda rng: (
        KINDS["normal"](rng) * np.exp(2 * rng.standard_normal((ROWS, BLOCKS))).repeat(BLOCK, 1)
    ).astype(np.float32),
    "Q4_1": q4_1,
    "zero between two steps": lambda rng: grid(rng, -7.5),
    "fifteen steps": lambda rng: grid(rng, -8.0, 1),
    "Q4_1 and others": lambda rng: np.where(rng.random((ROWS, 1)) < 0.5, q4_1(rng), KINDS["normal"](rng)),
}
kinds = st.sampled_from(list(KINDS))
seeds = st.integers(0, 2**32)


def widths(blocks: Blocks) -> Floats:
    """The steps of the weights' own blocks, shape ``(rows, blocks, 1)``."""
    return blocks.scales[:, :BLOCKS, None]


def plain(weight: Floats) -> Floats:
    """The usual asymmetric rounding: 16 steps over zero and the block, with an integer zero point."""
    rows = in_blocks(weight)
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
    error, steps = np.abs(in_blocks(blocks.values - weight)), widths(blocks)
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
    moved = np.abs(in_blocks(four_bits(once.values).values - once.values))
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
