"""Adapter tensors as safetensors bytes: deterministic to write, strict to read.

The names are those that PEFT saves, so the file opens in plain ``peft``. What the file means (base, parent, round)
stands in its manifest; here is only the question whether these bytes are a sound adapter of a given layout.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from adapters.layout import Floats, Layout, Tensors
from aggregation.errors import DataError

MAX_ADAPTER = 2**30  # bytes


def encode(tensors: Mapping[str, Floats]) -> bytes:
    """The adapter as safetensors bytes. Equal tensors give equal bytes. Raises as ``Layout.check``."""
    Layout.of(tensors).check(tensors)
    # safetensors copies the memory behind an array as it lies: a transposed view would be written in the wrong order.
    dense = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    return save(dense, metadata={"format": "pt"})


def decode(blob: bytes, layout: Layout | None = None) -> Tensors:
    """Read what ``encode`` wrote: ``decode(encode(t)) == t``.

    Args:
        blob: The whole file.
        layout: What the tensors must be; without it any adapter of finite float32 tensors is accepted.

    Raises:
        DataError: Truncated, oversized or damaged bytes, another layout, NaN or infinity.
    """
    if len(blob) > MAX_ADAPTER:
        raise DataError(f"an adapter file of {len(blob)} bytes is above the limit of {MAX_ADAPTER}")
    try:
        tensors: Tensors = load(blob)
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"not a sound adapter file: {error}") from error
    (layout or Layout.of(tensors)).check(tensors)
    return tensors


def sha256(blob: bytes) -> str:
    """The content address of a file: SHA-256 in hex."""
    return hashlib.sha256(blob).hexdigest()
