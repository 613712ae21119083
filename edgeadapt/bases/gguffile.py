"""Read a GGUF file: its settings, and its tensors as floats. What they mean for a model is left to ``ggufbase``.

The format is llama.cpp's, versions 2 and 3, with the least significant byte first:

    "GGUF"  version u32  tensors u64  settings u64
    setting:  key text, type u32, value; a text is its length u64 and UTF-8; an array is type u32, count u64, values
    tensor:   name text, dimensions u32, each u64, the fastest first; type u32; offset u64 in the tensors' data
    padding to ``general.alignment``, then the tensors' data

Each count and size is compared with the bytes that are left before anything is allocated for it, and tensors share no
bytes. So a file costs memory and time in proportion to its size. An array of arrays is refused: no model has one.
"""

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from aggregation.errors import DataError
from edgeadapt.formats.layout import Floats

MAGIC, VERSIONS = b"GGUF", (2, 3)
MAX_HEADER = 2**25  # bytes of settings and the list of tensors; vocabularies of 262,000 tokens take 15 million
MAX_KEYS, MAX_TENSORS, MAX_ITEMS, MAX_DIMENSIONS = 2**12, 2**16, 2**20, 4
ALIGNMENT = "general.alignment"
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
SHORTEST_KEY, SHORTEST_TENSOR = 13, 32  # bytes


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Says where a tensor is. ``shape``: as NumPy has it, the fastest dimension last."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    start: int  # in the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    settings: dict[str, Any]
    tensors: tuple[GgufTensor, ...]
    data: NDArray[np.uint8] = field(repr=False)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read settings and the list of tensors. Raises DataError if they are not sound, or larger than a limit."""
        try:
            data = np.memmap(path, np.uint8, "r")
            reader = _HeaderReader(data.data[:MAX_HEADER])
            settings, tensors = _header(reader)
            begin = -(-reader.at // (step := _alignment(settings))) * step
            return cls(settings, _placed(tensors, begin, len(data)), data)
        except (ValueError, OverflowError, OSError) as error:
            raise DataError(f"{path} is not a sound GGUF file: {error}", about=path.name) from error

    def floats(self, tensor: GgufTensor) -> Floats:
        rows = self.data[tensor.start : tensor.start + tensor.size].reshape(*tensor.shape[:-1], -1)
        return np.ascontiguousarray(dequantize(rows, tensor.kind), np.float32)


class _HeaderReader:
    """Reads a header from front to back. Nothing is read beyond its end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def left(self, count: int, each: int, most: int, what: str) -> int:
        """Check that ``count`` things of at least ``each`` bytes can follow, and return ``count``."""
        if count > most or count * each > len(self.data) - self.at:
            raise ValueError(f"{count} {what} cannot follow byte {self.at}")
        return count

    def take(self, size: int) -> memoryview:
        self.left(size, 1, size, "bytes")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))
        return value

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == ARRAY:
            return self._values(self.number("I"), self.number("Q"))
        return self._one(kind)()

    def _values(self, kind: int, count: int) -> list[Any]:
        if kind == ARRAY:
            raise ValueError(f"an array of arrays at byte {self.at}")
        read = self._one(kind)
        self.left(count, 8 if kind == TEXT else struct.calcsize(f"<{SCALARS[kind]}"), MAX_ITEMS, "items of an array")
        return [read() for _ in range(count)]

    def _one(self, kind: int) -> Callable[[], Any]:
        if kind == TEXT:
            return self.text
        if kind not in SCALARS:
            raise ValueError(f"a value of the unknown type {kind} at byte {self.at}")
        return lambda: self.number(SCALARS[kind])


def _header(reader: _HeaderReader) -> tuple[dict[str, Any], list[GgufTensor]]:
    if reader.take(4) != MAGIC or reader.number("I") not in VERSIONS:
        raise ValueError(f"it does not begin with {MAGIC.decode()} and the version 2 or 3")
    count, keys = reader.number("Q"), reader.number("Q")
    settings: dict[str, Any] = {}
    for _ in range(reader.left(keys, SHORTEST_KEY, MAX_KEYS, "settings")):
        if (key := reader.text()) in settings:
            raise ValueError(f"it has {key[:80]!r} twice")
        settings[key] = reader.value()
    return settings, [_tensor(reader) for _ in range(reader.left(count, SHORTEST_TENSOR, MAX_TENSORS, "tensors"))]


def _tensor(reader: _HeaderReader) -> GgufTensor:
    name, dimensions = reader.text(), reader.number("I")
    shape = tuple(reader.number("Q") for _ in range(reader.left(dimensions, 8, MAX_DIMENSIONS, "dimensions")))[::-1]
    kind, start = reader.number("I"), reader.number("Q")
    if not shape or not all(shape):
        raise ValueError(f"tensor {name[:80]!r} has no values: its shape is {shape}")
    if not _is_readable(quantization := GGMLQuantizationType(kind)):
        raise ValueError(f"tensor {name[:80]!r} is of the type {quantization.name}, which cannot be read")
    block, size = GGML_QUANT_SIZES[quantization]
    if shape[-1] % block:
        raise ValueError(f"tensor {name[:80]!r} has rows of {shape[-1]} values, in blocks of {block}")
    return GgufTensor(name, shape, quantization, start, math.prod(shape) // block * size)


def _placed(tensors: list[GgufTensor], begin: int, end: int) -> tuple[GgufTensor, ...]:
    """Place the tensors in a file of ``end`` bytes, whose data begins at ``begin``."""
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two tensors have one name")
    at = begin
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if begin + tensor.start < at or begin + tensor.start + tensor.size > end:
            raise ValueError(f"tensor {tensor.name[:80]!r} is in the bytes of another, or ends outside of the file")
        at = begin + tensor.start + tensor.size
    return tuple(GgufTensor(t.name, t.shape, t.kind, begin + t.start, t.size) for t in tensors)


def _alignment(settings: dict[str, Any]) -> int:
    alignment = settings.get(ALIGNMENT, 32)
    if not isinstance(alignment, int) or not 0 < alignment <= MAX_HEADER or alignment & (alignment - 1):
        raise ValueError(f"{ALIGNMENT} is {str(alignment)[:80]}, not a power of two")
    return alignment


@cache
def _is_readable(kind: GGMLQuantizationType) -> bool:
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except (KeyError, NotImplementedError):
        return False
    return True
