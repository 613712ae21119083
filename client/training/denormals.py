"""Compute with zero instead of denormal numbers, without torch.

A processor takes up to a hundred times as long for denormal numbers, so that an adapter could slow down a step for some
examples alone. ONNX Runtime's own option holds only if the process opened no other session before. So the register is
set that decides, through the C library's ``fegetenv`` and ``fesetenv``; threads that start meanwhile inherit it."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

SIZE = 512  # bytes; no system's environment is as large
# machine → where the control register is in the environment, its bytes, and the bits that flush
REGISTERS = {
    ("Linux", "x86_64"): (28, 4, 0x8040),  # MXCSR: flush to zero, denormals are zero
    ("Linux", "aarch64"): (0, 4, 1 << 24),  # FPCR: flush to zero
    ("Darwin", "arm64"): (8, 8, 1 << 24),
}


def flushes() -> bool:
    return not np.float32(1e-30) * np.float32(1e-10)


@contextmanager
def without_denormals() -> Iterator[None]:
    """While the block runs, this thread computes with zero instead of denormal numbers, where the system lets it."""
    register = REGISTERS.get((platform.system(), platform.machine()))
    if register is None:
        yield
        return
    offset, size, bits = register
    library, before = ctypes.CDLL(None), ctypes.create_string_buffer(SIZE)
    library.fegetenv(before)
    value = int.from_bytes(before.raw[offset : offset + size], "little") | bits
    flushing = before.raw[:offset] + value.to_bytes(size, "little") + before.raw[offset + size :]
    library.fesetenv(ctypes.create_string_buffer(flushing, SIZE))
    try:
        yield
    finally:
        library.fesetenv(before)
