"""Weights in blocks: 32 neighbors along the input share a scale, and in four bits a zero point and a residual.

The layouts are those of ONNX Runtime's MatMulNBits and GatherBlockQuantized: rows of a matrix are outputs of the layer
or entries of the embedding, and two four-bit values share a byte, the first in its lower half.

In four bits a weight is ``scale (code - zero) + residual``. The fast kernels take integer zero points only, and the
steps of a block seldom meet zero; the residual, at most half a step, is the difference. It is the same for a whole
block, so it adds to a product the residual times the sum of the block's inputs. The sums are appended to the input
(``quantize.in_blocks``) and the residuals to the row, in further blocks of four bits: one MatMul computes both."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgeadapt.formats.layout import Floats

BLOCK = 32
ZERO8 = 128  # the stored byte of a weight that is 0
TOP4, MIDDLE4 = 15, 8
# The fractions of a block's range that the steps span: clipping the rest may cost less than finer steps save. The first
# two keep weights that come in 16 or 15 even steps, as those of a GGUF file and of symmetric quantizers do.
SHRINK = (1.0, TOP4 / 14, *np.linspace(0.96, 0.72, 7).tolist())
CUT = (0.0, 0.5, 1.0)  # the fractions of the clipped range that lie below the first step
TIE = 2**-7  # steps: keeps a residual of half a step on its side when it is computed again from rounded numbers
PART = 2**21  # weights that are processed at a time, to limit memory

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix of shape ``(rows, width)``: codes as stored; a scale and a packed zero point for each stored block."""

    bits: int
    shape: tuple[int, int]
    codes: Bytes = field(repr=False)  # (rows, blocks * 32 * bits / 8); blocks beyond the width hold the residuals
    scales: Floats = field(repr=False)  # (rows, blocks)
    zeros: Bytes | None = field(default=None, repr=False)  # None: the middle of the range

    @property
    def sums(self) -> int:
        """Count the block sums that must be appended to the input, to be multiplied with the residuals."""
        blocks = self.shape[1] // BLOCK
        return blocks if self.scales.shape[1] > blocks else 0

    @property
    def steps(self) -> NDArray[np.int8]:
        """Unpack the codes of symmetric four bits as steps from zero, −8 to 7, shape ``(rows, width)``."""
        return _unpacked(self.codes, self.shape[1]).astype(np.int8) - np.int8(MIDDLE4)

    @property
    def values(self) -> Floats:
        """Compute the weights that the codes represent, shape ``(rows, width)``."""
        (rows, width), count = self.shape, self.scales.shape[1]
        codes = self.codes if self.bits == 8 else _unpacked(self.codes, count * BLOCK)
        middle = np.float32(ZERO8 if self.bits == 8 else MIDDLE4)
        zeros = middle if self.zeros is None else _unpacked(self.zeros, count)[:, :, None]
        centered = codes.reshape(rows, -1, BLOCK).astype(np.float32) - zeros
        stored: Floats = (centered * self.scales[:, :, None]).reshape(rows, -1)
        if not self.sums:
            return stored
        result: Floats = stored[:, :width] + np.repeat(stored[:, width : width + self.sums], BLOCK, axis=1)
        return result


def eight_bits(weight: Floats) -> Blocks:
    """Quantize ``weight``, ``(rows, width)``, finite, ``width`` divisible by 32, to symmetric bytes.

    Guarantee: ``values`` differ from ``weight`` by at most half a scale, up to float32 rounding; the scale is the
    largest absolute value of the block over 127. A block of zeros has the scale 1 and is kept exactly.

    >>> weight = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    >>> bool(np.abs(eight_bits(weight).values - weight).max() <= 1.001 / 254)
    True
    """
    parts = [_eight_bits(part) for part in _parts(weight)]
    codes, scales = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return Blocks(8, _shape(weight), codes, scales)


def four_bits_exactly(weight: Floats) -> Blocks | None:
    """Keep weights that come in symmetric four bits, as those of ``Q4_0`` do, in the same four bits; None for others.

    Such a block's largest weight is the lowest of its sixteen steps, which gives the width of a step. There are no
    residuals, so that the result can also be looked up in. ``weight``: as for ``four_bits``.

    >>> weight = np.arange(-8, 8, dtype=np.float32).repeat(2)[None] / 4
    >>> bool((four_bits_exactly(weight).values == weight).all()), four_bits_exactly(weight + 1)
    (True, None)
    """
    parts = []
    for part in _parts(weight):
        if (exact := _four_bits_exactly(part)) is None:
            return None
        parts.append(exact)
    codes, scales = (np.concatenate([part[i] for part in parts]) for i in range(2))
    return Blocks(4, _shape(weight), codes, scales)


def four_bits(weight: Floats) -> Blocks:
    """Quantize to sixteen even steps a block, chosen among 24 grids for the least squared error of the block.

    ``weight``: shape ``(rows, width)``, finite, ``width`` divisible by 32.

    Guarantee: weights that come in 16 even steps with zero among them (a GGUF file's Q4_1) change only by the rounding
    of their residuals: at most an eighth of the largest of 32 residuals, a sixteenth of a step. Steps that meet zero
    are kept exactly. The result is a fixed point: ``four_bits(four_bits(w).values).values`` equals
    ``four_bits(w).values`` up to float32 rounding. Rows do not influence each other.

    >>> weight = np.arange(-8, 8, dtype=np.float32).repeat(2)[None] / 4
    >>> bool(np.abs(four_bits(weight).values - weight).max() < 1e-6)
    True
    """
    parts = [_four_bits(part) for part in _parts(weight)]
    codes, scales, zeros = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Blocks(4, _shape(weight), codes, scales, zeros)


def _parts(weight: Floats) -> Iterator[Floats]:
    count = max(1, PART // weight.shape[1])
    for start in range(0, len(weight), count):
        yield np.ascontiguousarray(weight[start : start + count])


def _eight_bits(weight: Floats) -> tuple[Bytes, Floats]:
    """Codes ``(rows, width)`` and scales ``(rows, blocks)``."""
    rows = weight.reshape(len(weight), -1, BLOCK)
    largest = np.abs(rows).max(axis=2, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    return (np.rint(rows / scales) + ZERO8).astype(np.uint8).reshape(weight.shape), scales[:, :, 0]


def _four_bits_exactly(weight: Floats) -> tuple[Bytes, Floats] | None:
    """Packed codes ``(rows, width / 2)`` and scales ``(rows, blocks)``."""
    rows = weight.reshape(len(weight), -1, BLOCK)
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=2, keepdims=True), axis=2)
    scales = np.where(largest != 0, -largest / MIDDLE4, 1.0).astype(np.float32)
    codes = np.rint(rows / scales) + MIDDLE4
    if codes.max() > TOP4 or not np.array_equal((codes - MIDDLE4) * scales, rows):
        return None
    return _packed(codes.astype(np.uint8).reshape(weight.shape)), scales[:, :, 0]


def _four_bits(weight: Floats) -> tuple[Bytes, Floats, Bytes]:
    """Packed codes ``(rows, bytes)``, scales ``(rows, blocks)``, packed zeros; the residuals' blocks come last."""
    rows = weight.reshape(len(weight), -1, BLOCK)
    low, scales = _grid(rows)
    residual_codes, residual_scales = _stored_residuals(_residual(low, scales), scales)
    residuals = ((residual_codes - MIDDLE4) * residual_scales[:, :, None]).reshape(len(rows), -1)[:, : low.shape[1]]
    # From the residuals as stored, so that the zero point absorbs what their rounding shifts by whole steps.
    zeros = _zero(low - residuals, scales)
    codes = np.clip(np.rint((rows - residuals[:, :, None]) / scales[:, :, None]) + zeros[:, :, None], 0, TOP4)
    stored = np.concatenate([codes, residual_codes], axis=1).astype(np.uint8).reshape(len(rows), -1)
    return (
        _packed(stored),
        np.concatenate([scales, residual_scales], axis=1),
        _packed(np.concatenate([zeros, np.full(residual_scales.shape, MIDDLE4)], axis=1).astype(np.uint8)),
    )


def _grid(rows: Floats) -> tuple[Floats, Floats]:
    """Choose the first step and the step width of each block, the best of ``_candidates``."""
    best, first, widths = (np.full(rows.shape[:2], number, np.float32) for number in (np.inf, 0, 1))
    for low, scale in _candidates(rows):
        codes = np.clip(np.rint((rows - low[:, :, None]) / scale[:, :, None]), 0, TOP4)
        error = np.square(rows - codes * scale[:, :, None] - low[:, :, None]).sum(axis=2)
        # A grid that is far from zero would have a residual of many steps.
        better = (error < best) & (np.abs(_residual(low, scale)) <= scale * (0.5 + 2 * TIE))
        best = np.where(better, error, best)
        first, widths = np.where(better, low, first), np.where(better, scale, widths)
    return first, widths


def _candidates(rows: Floats) -> Iterator[tuple[Floats, Floats]]:
    """Yield the grid without residual, over zero and all weights; then grids over the weights alone."""
    least, most = rows.min(axis=2), rows.max(axis=2)
    scale = _width(np.maximum(most, 0) - np.minimum(least, 0), 1.0)
    yield -_zero(np.minimum(least, 0), scale) * scale, scale
    for shrink in SHRINK:
        for share in CUT if shrink < 1 else (0.0,):
            yield least + (most - least) * np.float32((1 - shrink) * share), _width(most - least, shrink)


def _width(span: Floats, shrink: float) -> Floats:
    result: Floats = np.where(span > 0, span * np.float32(shrink / TOP4), 1.0).astype(np.float32)
    return result


def _zero(low: Floats, scale: Floats) -> Floats:
    result: Floats = np.clip(np.floor(-low / scale + np.float32(0.5 + TIE)), 0, TOP4).astype(np.float32)
    return result


def _residual(low: Floats, scale: Floats) -> Floats:
    result: Floats = low + _zero(low, scale) * scale
    return result


def _stored_residuals(residuals: Floats, steps: Floats) -> tuple[Floats, Floats]:
    """Quantize the residuals ``(rows, blocks)``, themselves in blocks; the largest of each is met exactly. No residual
    is rounded to more than half of its block's step: that would belong to another zero point."""
    padded, limits = (
        np.pad(a, ((0, 0), (0, -a.shape[1] % BLOCK))).reshape(len(a), -1, BLOCK) for a in (residuals, steps)
    )
    largest = np.take_along_axis(padded, np.abs(padded).argmax(axis=2, keepdims=True), axis=2)
    scales = np.where(largest != 0, -largest / MIDDLE4, 1.0).astype(np.float32)
    codes = np.clip(np.rint(padded / scales), -MIDDLE4, TOP4 - MIDDLE4)
    shares = codes * scales / np.where(limits > 0, limits, 1.0) - np.float32(TIE)
    over = (np.abs(shares) > 0.5 - TIE / 8) & (np.abs(padded) < 0.9999 * np.abs(largest))
    codes = np.where(over, codes - np.sign(codes), codes)
    return codes + MIDDLE4, scales[:, :, 0]


def _packed(codes: Bytes) -> Bytes:
    """Put two of a row's codes in a byte; an odd row ends with an unused half."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (even[:, ::2] | (even[:, 1::2] << 4)).astype(np.uint8)


def _unpacked(packed: Bytes, width: int) -> Bytes:
    return np.stack([packed & TOP4, packed >> 4], axis=2).reshape(len(packed), -1)[:, :width]


def _shape(weight: Floats) -> tuple[int, int]:
    rows, width = weight.shape
    return int(rows), int(width)
