"""Weights in blocks: 32 neighbours along the input share a scale, and in four bits a zero point.

The layouts are those of ONNX Runtime's MatMulNBits and GatherBlockQuantized: rows of a matrix are outputs of the layer
or entries of the table, and four-bit values lie two in a byte, the first in its lower half.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from adapters.layout import Floats

BLOCK = 32
ZERO8 = 128  # the stored byte of a weight that is 0
TOP4 = 15
SHRINK = np.linspace(1.0, 0.72, 8, dtype=np.float32)  # of a block's range: what is cut off may cost less than it saves
ROWS = 4096  # at a time, for the sake of memory

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix of shape ``(rows, width)``: ``codes`` as stored, ``scales`` ``(rows, width / 32)``, ``zeros`` packed."""

    bits: int
    shape: tuple[int, int]
    codes: Bytes = field(repr=False)  # (rows, width * bits / 8)
    scales: Floats = field(repr=False)
    zeros: Bytes | None = field(default=None, repr=False)  # None: the middle of the range

    @property
    def values(self) -> Floats:
        """The weights that the codes stand for, shape ``(rows, width)``."""
        rows, width = self.shape
        codes = self.codes if self.bits == 8 else _unpacked(self.codes, width)
        zeros = np.float32(ZERO8) if self.zeros is None else _unpacked(self.zeros, width // BLOCK)[:, :, None]
        centred = codes.reshape(rows, -1, BLOCK).astype(np.float32) - zeros
        result: Floats = (centred * self.scales[:, :, None]).reshape(rows, width)
        return result


def eight_bits(weight: Floats) -> Blocks:
    """Symmetric bytes: off by at most half a scale, which is the largest of the block over 127."""
    rows = weight.reshape(len(weight), -1, BLOCK)
    largest = np.abs(rows).max(axis=2, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1.0).astype(np.float32)
    codes = (np.rint(rows / scales) + ZERO8).astype(np.uint8)
    return Blocks(8, _shape(weight), codes.reshape(weight.shape), scales[:, :, 0])


def four_bits(weight: Floats) -> Blocks:
    """Sixteen steps a block with a whole zero point, both chosen for the least squared error of the block.

    Weights that come in sixteen even steps (a GGUF file's Q4_1) keep their steps and lose only what the zero point is
    rounded by; docs/decisions/0010 has what that costs.
    """
    parts = [_four_bits(weight[start : start + ROWS]) for start in range(0, len(weight), ROWS)]
    codes, scales, zeros = (np.concatenate([part[i] for part in parts]) for i in range(3))
    return Blocks(4, _shape(weight), _packed(codes.reshape(weight.shape)), scales, _packed(zeros))


def _four_bits(weight: Floats) -> tuple[Bytes, Floats, Bytes]:
    rows = weight.reshape(len(weight), -1, BLOCK)
    low = np.minimum(rows.min(axis=2), 0.0)
    high = np.maximum(rows.max(axis=2), 0.0)
    best = np.full(low.shape, np.inf, dtype=np.float32)
    scales, zeros = np.ones_like(low), np.zeros(low.shape, dtype=np.float32)
    for shrink in SHRINK:
        scale = np.where(high > low, (high - low) * (shrink / TOP4), 1.0).astype(np.float32)
        for rounded in (np.floor, np.ceil):
            zero = np.clip(rounded(-low * shrink / scale), 0, TOP4).astype(np.float32)
            error = np.square(rows - _stepped(rows, scale, zero)).sum(axis=2)
            better = error < best
            best = np.where(better, error, best)
            scales, zeros = np.where(better, scale, scales), np.where(better, zero, zeros)
    codes = np.clip(np.rint(rows / scales[:, :, None]) + zeros[:, :, None], 0, TOP4)
    return codes.astype(np.uint8), scales, zeros.astype(np.uint8)


def _stepped(rows: Floats, scale: Floats, zero: Floats) -> Floats:
    codes = np.clip(np.rint(rows / scale[:, :, None]) + zero[:, :, None], 0, TOP4)
    result: Floats = (codes - zero[:, :, None]) * scale[:, :, None]
    return result


def _packed(codes: Bytes) -> Bytes:
    """Two of a row's codes in a byte; an odd row ends with an unused half."""
    even = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return (even[:, ::2] | (even[:, 1::2] << 4)).astype(np.uint8)


def _unpacked(packed: Bytes, width: int) -> Bytes:
    return np.stack([packed & TOP4, packed >> 4], axis=2).reshape(len(packed), -1)[:, :width]


def _shape(weight: Floats) -> tuple[int, int]:
    rows, width = weight.shape
    return int(rows), int(width)
