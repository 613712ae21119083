"""Fed-SB: the mean of R is the mean of the updates, an adapter stays plain LoRA, and every machine has one F."""

import numpy as np
import pytest

from aggregation.errors import DataError
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods.lorasb import folded, frozen_factor, square_name, unfolded, with_squares
from tests.support import refused

A, B = "base_model.model.layer.query.lora_A.weight", "base_model.model.layer.query.lora_B.weight"
HEAD = "base_model.model.classifier.weight"
R = square_name(B)
FIRST_ROW = [False, False, True, False, True, True, False, False]


@pytest.fixture
def adapter() -> Tensors:
    rng = np.random.default_rng(3)
    shapes = {A: (4, 6), B: (12, 4), HEAD: (2, 6)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def update(tensors: Tensors) -> np.ndarray:
    return tensors[B].astype(np.float64) @ tensors[A]


def test_the_layout_of_a_round_has_a_square_for_each_layer_in_the_order_of_names(adapter: Tensors) -> None:
    layout = with_squares(Layout.of(adapter))
    assert layout == Layout.of(unfolded(adapter))
    assert {spec.name: spec.shape for spec in layout.tensors}[R] == (4, 4)


def test_without_an_update_an_adapter_is_as_it_was(adapter: Tensors) -> None:
    found = folded(unfolded(adapter))
    assert found.keys() == adapter.keys()
    assert all(np.array_equal(found[name], adapter[name]) for name in adapter)


def test_the_mean_of_squares_gives_the_mean_of_the_updates(adapter: Tensors) -> None:
    rng = np.random.default_rng(4)
    squares = [rng.normal(size=(4, 4)).astype(np.float32) for _ in range(3)]
    each = [folded(unfolded(adapter) | {R: square}) for square in squares]
    mean = folded(unfolded(adapter) | {R: np.mean(squares, axis=0, dtype=np.float32)})
    np.testing.assert_allclose(update(mean), np.mean([update(one) for one in each], axis=0), atol=1e-5)
    assert max(np.abs(update(one) - update(mean)).max() for one in each) > 0.1
    assert all(np.array_equal(one[A], adapter[A]) for one in each)


def test_a_new_factor_is_the_one_before_and_the_frozen_one_times_the_square(adapter: Tensors) -> None:
    square = np.random.default_rng(5).normal(size=(4, 4)).astype(np.float32)
    expected = adapter[B] + frozen_factor(B, (12, 4)).astype(np.float64) @ square
    np.testing.assert_allclose(folded(unfolded(adapter) | {R: square})[B], expected, rtol=1e-6)
    clipped = folded(unfolded(adapter) | {R: square}, 0.5)[B]
    np.testing.assert_allclose(clipped, np.clip(expected, -0.5, 0.5), rtol=1e-6)


def test_the_frozen_factor_is_signs_that_differ_from_layer_to_layer() -> None:
    found, other = frozen_factor(B, (384, 8)), frozen_factor(B.replace("query", "value"), (384, 8))
    assert found.dtype == np.float32
    assert np.abs(found * np.float32(8**0.5)).round(6).tolist() == np.ones((384, 8)).tolist()
    correlation = found.T @ found * 8 / 384
    assert np.abs(correlation - np.eye(8)).max() < 0.25  # four standard deviations: columns are nearly orthogonal
    assert 0.4 < (found == other).mean() < 0.6
    # By hand: AES-256 in counter mode under SHA-256 of the prefix, the name and "384 8"; the sign is the lowest bit.
    assert (found[0] > 0).tolist() == FIRST_ROW


def test_a_rank_above_the_outputs_of_a_layer_is_refused(adapter: Tensors) -> None:
    with refused(DataError, B):
        with_squares(Layout.of(adapter | {B: np.zeros((3, 4), np.float32)}))
