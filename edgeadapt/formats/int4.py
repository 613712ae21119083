"""Four-bit integers, two in a byte, with a float16 scale for each block of 32. The exporter packs, a device unpacks.

A matrix is packed along its last axis: byte ``i`` of a row holds number ``2 i`` in its low half and number ``2 i + 1``
in its high half, each as its code plus 8. A number is its code, -8 to 7, times the scale of its block; the last block
of a row may be short. Scales may be negative: the code range is longer below zero than above it, and the sign turns
the longer side to where a block has its largest number (as in the Q4_0 format of llama.cpp).

The scale of a block is searched for, see ``pack``; docs/decisions/0012-int4-adapters.md has the measurements."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgeadapt.formats.layout import Floats

BLOCK = 32  # numbers that share a scale
LOWEST, HIGHEST = -8, 7  # codes
CHUNK = 2**14  # blocks that the search holds in memory at once
# Where the search starts: the code, or the fraction of one, on which a block's largest number falls. Beyond -8 it is
# cut off, which pays where one number is far larger than the rest.
STARTS = (7.0, -7.0, -7.5, -8.0, -8.5, -9.0)
MAX_SCALE = float(np.finfo(np.float16).max)
LARGEST = 7 * MAX_SCALE  # the largest magnitude that can be stored

Codes = NDArray[np.uint8]
Scales = NDArray[np.float16]


def pack(value: Floats) -> tuple[Codes, Scales]:
    """Return the codes of ``value``, shape ``(..., width / 2)``, and their scales, shape ``(..., ceil(width / 32))``.

    Each block takes, of the scales that were tried, the one with the least squared error: the starts above, and for
    each of them the least squares fit to the codes that it gives. Equal values give equal bytes. Guarantee: the root
    mean square error of a block is at most half of ``largest / 7``, ``largest`` being the block's largest magnitude
    (that is the first start, plain rounding), up to the rounding of the scale to float16. ``value``: shape ``(...,
    width)`` with an even width, finite, magnitudes of at most ``LARGEST``."""
    *rows, width = value.shape
    blocks = _blocks(value)
    scales = np.empty(len(blocks), np.float16)
    codes = np.empty(blocks.shape, np.int8)
    for start in range(0, len(blocks), CHUNK):
        part = slice(start, start + CHUNK)
        scales[part], codes[part] = _search(blocks[part].astype(np.float64))
    flat = (codes - LOWEST).astype(np.uint8).reshape(*rows, -1)[..., :width]
    packed: Codes = flat[..., 0::2] | flat[..., 1::2] << np.uint8(4)
    return packed, scales.reshape(*rows, -1)


def unpack(codes: Codes, scales: Scales) -> Floats:
    """Return the numbers that ``pack`` stored, shape ``(..., width)``.

    >>> unpack(np.array([[0x80, 0x9F, 0x17]], np.uint8), np.array([[0.5]], np.float16)).tolist()
    [[-4.0, 0.0, 3.5, 0.5, -0.5, -3.5]]
    """
    *rows, half = codes.shape
    numbers = np.empty((*rows, half, 2), np.float32)
    numbers[..., 0] = codes & 15
    numbers[..., 1] = codes >> 4
    numbers += LOWEST
    wide = np.repeat(scales.astype(np.float32), BLOCK, axis=-1)[..., : 2 * half]
    result: Floats = numbers.reshape(*rows, 2 * half)
    result *= wide
    return result


def scale_shape(codes: Codes) -> tuple[int, ...]:
    *rows, half = codes.shape
    return (*rows, -(-2 * half // BLOCK))


def _blocks(value: Floats) -> Floats:
    """Return shape ``(blocks, BLOCK)``; the last block of each row is filled up with zeros, which cost nothing."""
    rows = value.reshape(-1, value.shape[-1])
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % BLOCK))).reshape(-1, BLOCK)


def _search(blocks: NDArray[np.float64]) -> tuple[Scales, NDArray[np.float64]]:
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)[:, 0]
    best_error = np.full(len(blocks), np.inf)
    best_scale = np.ones(len(blocks), np.float16)
    best_codes = np.zeros_like(blocks)
    for scale in _candidates(blocks, largest):
        codes = _codes(blocks, scale)
        error = ((codes * scale.astype(np.float64)[:, None] - blocks) ** 2).sum(axis=1)
        better = error < best_error  # the first of equals, so that the last bit does not decide
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
        best_codes = np.where(better[:, None], codes, best_codes)
    return best_scale, best_codes


def _candidates(blocks: NDArray[np.float64], largest: NDArray[np.float64]) -> Iterator[Scales]:
    for start in STARTS:
        scale = _sound(largest / start)
        yield scale
        codes = _codes(blocks, scale)
        weight = (codes * codes).sum(axis=1)
        fit = (codes * blocks).sum(axis=1) / np.where(weight > 0, weight, 1.0)
        yield _sound(fit)


def _codes(blocks: NDArray[np.float64], scale: Scales) -> NDArray[np.float64]:
    codes: NDArray[np.float64] = np.rint(blocks / scale.astype(np.float64)[:, None]).clip(LOWEST, HIGHEST)
    return codes


def _sound(scale: NDArray[np.float64]) -> Scales:
    # A block of zeros, or of numbers below what float16 can say, is stored as zeros.
    half = scale.clip(-MAX_SCALE, MAX_SCALE).astype(np.float16)
    sound: Scales = np.where(half == 0, np.float16(1), half)
    return sound
