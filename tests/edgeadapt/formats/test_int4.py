import numpy as np
import pytest

from edgeadapt.formats.int4 import BLOCK, LARGEST, pack, scale_shape, unpack
from edgeadapt.formats.layout import Floats


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
