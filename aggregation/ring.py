"""The ring of integers mod 2^bits: how its vectors are held and how they travel.

In memory an element is a wrapping ``uint32`` (``uint64`` above 32 bits) of which only the low ``bits`` count:
since 2^bits divides 2^32, sums may wrap there and be reduced at the end. On the wire an element takes exactly
``bits`` bits, the first in the lowest bits of the first byte.
"""

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from aggregation.errors import ConfigError, DataError, ProtocolError

Ring: TypeAlias = NDArray[np.uint32] | NDArray[np.uint64]
MAX_BITS = 64


def dtype(bits: int) -> DTypeLike:
    """The little-endian element type that holds ``bits`` bits.

    Raises:
        ConfigError: ``bits`` is not between 1 and 64.
    """
    if not 1 <= bits <= MAX_BITS:
        raise ConfigError(f"ring of {bits} bits is not between 1 and {MAX_BITS}")
    return np.dtype("<u4") if bits <= 32 else np.dtype("<u8")


def zeros(size: int, bits: int) -> Ring:
    """The neutral vector: shape ``(size,)``."""
    return np.zeros(size, dtype(bits))


def packed_size(size: int, bits: int) -> int:
    """Bytes that ``size`` elements of ``bits`` bits take: ceil(size * bits / 8)."""
    return (size * bits + 7) // 8


def require(values: Ring, size: int, bits: int) -> None:
    """Return if ``values`` is a vector of this ring.

    Raises:
        DataError: Another shape or element type.
    """
    if values.shape != (size,) or values.dtype != dtype(bits):
        raise DataError(
            f"a ring vector of {size} {np.dtype(dtype(bits)).name} is needed, not {values.shape} {values.dtype}"
        )


def pack(values: Ring, bits: int) -> bytes:
    """Write the low ``bits`` bits of each element.

    Args:
        values: Shape ``(n,)``, of ``dtype(bits)``.
        bits: Of an element.

    Returns:
        ``packed_size(n, bits)`` bytes; unused bits of the last byte are zero.
    """
    width = np.dtype(dtype(bits)).itemsize
    require(values, values.size, bits)
    if bits % 8 == 0:
        octets = np.ascontiguousarray(values).view(np.uint8).reshape(-1, width)
        return octets[:, : bits // 8].tobytes()
    columns = _columns(values, bits)
    words = np.zeros((_period(bits)[1], columns.shape[1]), "<u8")
    for j, column in enumerate(columns):
        word, shift = divmod(j * bits, 64)
        words[word] |= column << np.uint64(shift)
        if shift + bits > 64:
            words[word + 1] |= column >> np.uint64(64 - shift)
    return words.T.tobytes()[: packed_size(values.size, bits)]


def unpack(raw: bytes | memoryview, size: int, bits: int) -> Ring:
    """Read ``size`` elements: ``unpack(pack(v, bits), v.size, bits) == v`` for reduced ``v``.

    Raises:
        ProtocolError: Not exactly ``packed_size(size, bits)`` bytes, or unused bits that are not zero.
    """
    target = np.dtype(dtype(bits))
    if len(raw) != packed_size(size, bits):
        raise ProtocolError(f"vector has {len(raw)} bytes where {packed_size(size, bits)} belong")
    unused = -size * bits % 8
    if unused and raw[-1] >> (8 - unused):
        raise ProtocolError("unused bits at the end of the vector are not zero")
    if bits % 8 == 0:
        octets = np.zeros((size, target.itemsize), np.uint8)
        octets[:, : bits // 8] = np.frombuffer(raw, np.uint8).reshape(size, bits // 8)
        return octets.view(target).reshape(size)
    count, per_row = _period(bits)
    rows = -(-size // count)
    padded = np.zeros(rows * per_row * 8, np.uint8)
    padded[: len(raw)] = np.frombuffer(raw, np.uint8)
    words = np.ascontiguousarray(padded.view("<u8").reshape(rows, per_row).T)
    columns = np.empty((count, rows), target)
    keep = np.uint64((1 << bits) - 1)
    for j in range(count):
        word, shift = divmod(j * bits, 64)
        column = words[word] >> np.uint64(shift)
        if shift + bits > 64:
            column |= words[word + 1] << np.uint64(64 - shift)
        columns[j] = column & keep
    return columns.T.reshape(-1)[:size]


def _period(bits: int) -> tuple[int, int]:
    """The least count of elements that fills whole 64-bit words, and how many words."""
    common = math.gcd(bits, 64)
    return 64 // common, bits // common


def _columns(values: Ring, bits: int) -> NDArray[np.uint64]:
    """Element ``i`` at ``[i % period, i // period]``, reduced to ``bits`` bits, zeros at the end."""
    count = _period(bits)[0]
    padded = np.zeros((-(-values.size // count), count), np.uint64)
    padded.reshape(-1)[: values.size] = values
    padded &= np.uint64((1 << bits) - 1)
    return np.ascontiguousarray(padded.T)
