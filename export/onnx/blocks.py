"""Weights in blocks: 32 neighbours along the input share a scale, and in four bits a zero point and a rest.

The layouts are those of ONNX Runtime's MatMulNBits and GatherBlockQuantized: rows of a matrix are outputs of the layer
or entries of the table, and four-bit values lie two in a byte, the first in its lower half.

In four bits a weight is ``scale (code - zero) + rest``. The fast products take whole zero points only, and the steps of
a block seldom meet zero; the rest, at most half a step, is what is missing. It is the same for a whole block, so what
it adds to a product is the rest times the sum of the block's inputs. The sums are appended to the input
(``quantize.in_blocks``) and the rests to the row, in further blocks of four bits: one product does both.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adapters.layout import Floats

BLOCK = 32
ZERO8 = 128  # the stored byte of a weight that is 0
TOP4, MIDDLE4 = 15, 8
# Of a block's range: what is cut off may cost less than it saves. The first two keep weights that come in 16 or 15 even
# steps, as a GGUF file's and those of symmetric quantizers do.
SHRINK = (1.0, TOP4 / 14, *np.linspace(0.96, 0.72, 7).tolist())
CUT = (0.0, 0.5, 1.0)  # the shares of it that are cut off below the first step
TIE = 2**-7  # steps: a rest of half a step stays on its side when it is computed again from rounded numbers
ROWS = 4096  # at a time, for the sake of memory

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix of shape ``(rows, width)``: codes as stored; scales, and zeros packed, one for each stored block."""

    bits: int
    shape: tuple[int, int]
    codes: Bytes = field(repr=False)  # (rows, blocks * 32 * bits / 8), of which in four bits the last are the rests
    scales: Floats = field(repr=False)  # (rows, blocks)
    zeros: Bytes | None = field(default=None, repr=False)  # None: the middle of the range

    @property
    def sums(self) -> int:
        """How many sums of the input's blocks follow the input itself, to be multiplied with the rests."""
        return self.shape[1] // BLOCK if self.bits == 4 else 0

    @property
    def values(self) -> Floats:
        """The weights that the codes stand for, shape ``(rows, width)``."""
        (rows, width), count = self.shape, self.scales.shape[1]
        codes = self.codes if self.bits == 8 else _unpacked(self.codes, count * BLOCK)
        zeros = np.float32(ZERO8) if self.zeros is None else _unpacked(self.zeros, count)[:, :, None]
        centred = codes.reshape(rows, -1, BLOCK).astype(np.float32) - zeros
        stored: Floats = (centred * self.scales[:, :, None]).reshape(rows, -1)
        if not self.sums:
            return stored
        result: Floats = stored[:, :width] + np.repeat(stored[:, width : width + self.sums], BLOCK, axis=1)
        return result


def eight_bits(weight: Floats) -> Blocks:
    """Symmetric bytes: off by at most half a scale, which is the largest of the block over 127."""
    rows = weight.reshape(len(weight), -1, BLOCK)
    largest = np.abs(rows).max(axis=2, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    codes = (np.rint(rows / scales) + ZERO8).astype(np.uint8)
    return Blocks(8, _shape(weight), codes.reshape(weight.shape), scales[:, :, 0])


def four_bits(weight: Floats) -> Blocks:
    """Sixteen even steps a block, for about the least squared error of the block.

    Weights that come in 16 even steps with zero among them (a GGUF file's Q4_1) are off by what their rests are rounded
    by: an eighth of the largest of 32 rests at most, a sixteenth of a step. What comes out is a fixed point:
    ``four_bits(four_bits(w).values).values`` is ``four_bits(w).values`` but for float32.
    """
    parts = [_four_bits(weight[start : start + ROWS]) for start in range(0, len(weight), ROWS)]
    codes, scales, zeros = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Blocks(4, _shape(weight), _packed(codes.reshape(len(weight), -1)), scales, _packed(zeros))


def _four_bits(weight: Floats) -> tuple[Bytes, Floats, Bytes]:
    """Codes ``(rows, blocks, 32)``, scales and zero points ``(rows, blocks)``; the blocks of the rests come last."""
    rows = weight.reshape(len(weight), -1, BLOCK)
    low, scales = _grid(rows)
    rest_codes, rest_scales = _rests(_rest(low, scales), scales)
    rests = ((rest_codes - MIDDLE4) * rest_scales[:, :, None]).reshape(len(rows), -1)[:, : low.shape[1]]
    # Around the rests as stored, so that the zero point makes up for what rounding them has shifted by whole steps.
    zeros = _zero(low - rests, scales)
    codes = np.clip(np.rint((rows - rests[:, :, None]) / scales[:, :, None]) + zeros[:, :, None], 0, TOP4)
    return (
        np.concatenate([codes, rest_codes], axis=1).astype(np.uint8),
        np.concatenate([scales, rest_scales], axis=1),
        np.concatenate([zeros, np.full(rest_scales.shape, MIDDLE4)], axis=1).astype(np.uint8),
    )


def _grid(rows: Floats) -> tuple[Floats, Floats]:
    """First step and width of the steps of each block, the best of ``_candidates``."""
    best, found, widths = (np.full(rows.shape[:2], number, np.float32) for number in (np.inf, 0, 1))
    for low, scale in _candidates(rows):
        codes = np.clip(np.rint((rows - low[:, :, None]) / scale[:, :, None]), 0, TOP4)
        error = np.square(rows - codes * scale[:, :, None] - low[:, :, None]).sum(axis=2)
        # A grid that is far from zero would have a rest of many steps.
        better = (error < best) & (np.abs(_rest(low, scale)) <= scale * (0.5 + 2 * TIE))
        best = np.where(better, error, best)
        found, widths = np.where(better, low, found), np.where(better, scale, widths)
    return found, widths


def _candidates(rows: Floats) -> Iterator[tuple[Floats, Floats]]:
    """First without a rest, over zero and all weights; then around the weights alone."""
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
    """The code that is nearest to zero, if the first step is at ``low``."""
    result: Floats = np.clip(np.floor(-low / scale + np.float32(0.5 + TIE)), 0, TOP4).astype(np.float32)
    return result


def _rest(low: Floats, scale: Floats) -> Floats:
    result: Floats = low + _zero(low, scale) * scale
    return result


def _rests(rests: Floats, steps: Floats) -> tuple[Floats, Floats]:
    """Codes and scales of the rests ``(rows, blocks)``, in blocks themselves; the largest of each is met exactly.

    None is rounded to more than half of its block's step: that would be the rest of another zero point.
    """
    padded, limits = (np.pad(a, ((0, 0), (0, -a.shape[1] % BLOCK))).reshape(len(a), -1, BLOCK) for a in (rests, steps))
    largest = np.take_along_axis(padded, np.abs(padded).argmax(axis=2, keepdims=True), axis=2)
    scales = np.where(largest != 0, -largest / MIDDLE4, 1.0).astype(np.float32)
    codes = np.clip(np.rint(padded / scales), -MIDDLE4, TOP4 - MIDDLE4)
    shares = codes * scales / np.where(limits > 0, limits, 1.0) - np.float32(TIE)
    over = (np.abs(shares) > 0.5 - TIE / 8) & (np.abs(padded) < 0.9999 * np.abs(largest))
    codes = np.where(over, codes - np.sign(codes), codes)
    return codes + MIDDLE4, scales[:, :, 0]


def _packed(codes: Bytes) -> Bytes:
    """Two of a row's codes in a byte; an odd row ends with an unused half."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (even[:, ::2] | (even[:, 1::2] << 4)).astype(np.uint8)


def _unpacked(packed: Bytes, width: int) -> Bytes:
    return np.stack([packed & TOP4, packed >> 4], axis=2).reshape(len(packed), -1)[:, :width]


def _shape(weight: Floats) -> tuple[int, int]:
    rows, width = weight.shape
    return int(rows), int(width)
