"""The ring of integers mod 2^bits: how its vectors are held in memory and how they travel.

In memory an element is a wrapping ``uint16`` (``uint32`` above 16 bits, ``uint64`` above 32) of which only the low
``bits`` count: since 2^bits divides the modulus of its type, sums may wrap there and be reduced at the end. On the wire
an element takes exactly ``bits`` bits; the first element occupies the lowest bits of the first byte."""

import hashlib
import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from aggregation.errors import ConfigError, DataError, ProtocolError

Ring: TypeAlias = NDArray[np.uint16] | NDArray[np.uint32] | NDArray[np.uint64]
MAX_BITS = 64
BLOCK = 2**16  # items processed at a time


def dtype(bits: int) -> DTypeLike:
    """The little-endian element type that holds ``bits`` bits: ``<u2`` up to 16, ``<u4`` up to 32, ``<u8`` above.

    >>> dtype(16), dtype(24), dtype(33)
    (dtype('uint16'), dtype('uint32'), dtype('uint64'))

    Raises ConfigError: ``bits`` is not between 1 and 64."""
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"ring of {bits} bits is not between 1 and {MAX_BITS}", about="ring.bits")
    return np.dtype("<u2" if bits <= 16 else "<u4" if bits <= 32 else "<u8")


def zeros(size: int, bits: int) -> Ring:
    """The neutral element of vector addition: shape ``(size,)``, of ``dtype(bits)``."""
    return np.zeros(size, dtype(bits))


def packed_size(size: int, bits: int) -> int:
    """Bytes that ``size`` elements of ``bits`` bits take on the wire: ``ceil(size * bits / 8)``.

    >>> packed_size(1_000_000, 24), packed_size(3, 22)
    (3000000, 9)
    """
    return (size * bits + 7) // 8


def require_vector(values: Ring, size: int, bits: int) -> None:
    """Check that ``values`` is a vector of ``size`` elements of this ring. Raises DataError: another shape than
    ``(size,)``, or another element type than ``dtype(bits)``."""
    if values.shape != (size,) or values.dtype != dtype(bits):
        raise DataError(
            f"expected a ring vector of {size} {np.dtype(dtype(bits)).name}, got {values.shape} {values.dtype}",
            about="ring.vector",
        )


def pack(values: Ring, bits: int) -> bytes:
    """Encode the low ``bits`` bits of each element.

    >>> pack(np.array([1, 2, 3], np.uint16), 4).hex()
    '2103'

    Returns:
        ``packed_size(n, bits)`` bytes; unused bits of the last byte are zero. Empty for an empty vector.

    ``values``: shape ``(n,)``, contiguous, of ``dtype(bits)``. Bits above the ring are ignored. ``bits``: width of an
    element, 1 to 64. Raises DataError: ``values`` is not a vector of the ring."""
    return bytes(packed_view(values, bits))


def packed_view(values: Ring, bits: int) -> memoryview:
    """As ``pack``, without a copy: where the width is that of the element type, a view of ``values`` themselves."""
    require_vector(values, values.size, bits)
    if bits == 8 * values.itemsize:
        return values.data.cast("B")
    kind, (count, per_row) = np.dtype(dtype(bits)), _period(bits)
    rows = -(-values.size // count)
    words = np.zeros((rows, per_row), kind)
    for start, part in _row_blocks(values, count):
        reduced = part & ((1 << bits) - 1)
        target = words[start : start + len(part)]
        for j, word, shift in _places(bits):
            target[:, word] |= reduced[:, j] << shift
            if shift + bits > 8 * kind.itemsize:
                target[:, word + 1] |= reduced[:, j] >> (8 * kind.itemsize - shift)
    return words.reshape(-1).data.cast("B")[: packed_size(values.size, bits)]


def digest(values: Ring, bits: int) -> bytes:
    return hashlib.sha256(packed_view(values, bits)).digest()


def unpack(raw: bytes | memoryview, size: int, bits: int) -> Ring:
    """Decode ``size`` elements. Law: ``unpack(pack(v, bits), v.size, bits) == v`` for reduced ``v``.

    >>> unpack(bytes.fromhex("2103"), 3, 4)
    array([1, 2, 3], dtype=uint16)

    Args:
        raw: Exactly ``packed_size(size, bits)`` bytes.
        size: Number of elements, 0 or more.
        bits: Width of an element, 1 to 64.

    Returns:
        Shape ``(size,)``, of ``dtype(bits)``; every element is below ``2**bits``.

    Raises ProtocolError: another number of bytes, or unused bits that are not zero."""
    _require_packed(raw, size, bits)
    if bits == 8 * np.dtype(dtype(bits)).itemsize:
        return np.frombuffer(raw, dtype(bits)).copy()
    kind, (count, per_row) = np.dtype(dtype(bits)), _period(bits)
    rows = -(-size // count)
    octets = np.zeros(rows * per_row * kind.itemsize, np.uint8)
    octets[: len(raw)] = np.frombuffer(raw, np.uint8)
    values = np.empty((rows, count), kind)
    for start, part in _row_blocks(octets.view(kind), per_row):
        target = values[start : start + len(part)]
        for j, word, shift in _places(bits):
            np.right_shift(part[:, word], shift, out=target[:, j])
            if shift + bits > 8 * kind.itemsize:
                target[:, j] |= part[:, word + 1] << (8 * kind.itemsize - shift)
        target &= (1 << bits) - 1
    return values.reshape(-1)[:size]


def add(total: Ring, raw: bytes | memoryview, bits: int) -> None:
    """Add a packed vector in place: ``total += unpack(raw, total.size, bits)``, wrapping, with one block of memory.

    >>> total = np.array([15, 0, 1], np.uint16)
    >>> add(total, bytes.fromhex("2103"), 4)
    >>> total & 15
    array([0, 2, 4], dtype=uint16)

    Raises ProtocolError as ``unpack``; ``total`` is then unchanged."""
    _require_packed(raw, total.size, bits)
    if bits == 8 * total.itemsize:
        np.add(total, np.frombuffer(raw, total.dtype), out=total)
        return
    step = BLOCK - BLOCK % 64  # elements: whole bytes, whatever the width
    view = memoryview(raw)
    for start in range(0, total.size, step):
        part = total[start : start + step]
        at = start * bits // 8
        part += unpack(view[at : at + packed_size(part.size, bits)], part.size, bits)


def _require_packed(raw: bytes | memoryview, size: int, bits: int) -> None:
    if len(raw) != packed_size(size, bits):
        raise ProtocolError(
            f"packed vector has {len(raw)} bytes, expected {packed_size(size, bits)}", about="vector.length"
        )
    unused = -size * bits % 8
    if unused and raw[-1] >> (8 - unused):
        raise ProtocolError("unused bits at the end of the packed vector are not zero", about="vector.unused-bits")


def _period(bits: int) -> tuple[int, int]:
    """The least count of elements that fills whole words of the element type, and that number of words."""
    width = 8 * np.dtype(dtype(bits)).itemsize
    common = math.gcd(bits, width)
    return width // common, bits // common


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Element of a row, the word that holds its lowest bit, and the position of that bit in the word."""
    width = 8 * np.dtype(dtype(bits)).itemsize
    for j in range(_period(bits)[0]):
        word, shift = divmod(j * bits, width)
        yield j, word, shift


def _row_blocks(flat: Ring, width: int) -> Iterator[tuple[int, Ring]]:
    """Rows of ``width`` items, in blocks that stay in the cache; the last row is padded with zeros."""
    whole, step = flat.size // width, max(BLOCK // width, 1)
    table = flat[: whole * width].reshape(whole, width)
    for start in range(0, whole, step):
        yield start, table[start : start + step]
    if flat.size % width:
        last = np.zeros((1, width), flat.dtype)
        last[0, : flat.size % width] = flat[whole * width :]
        yield whole, last
