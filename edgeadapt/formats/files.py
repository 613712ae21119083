"""An adapter's tensors as a safetensors file: written deterministically, read strictly. The names are those that PEFT
saves, so that plain ``peft`` opens the file. Its base, parent and round are in its manifest."""

import hashlib
from collections.abc import Mapping

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from aggregation.errors import DataError
from edgeadapt.formats.layout import Floats, Layout, Tensors

MAX_ADAPTER = 2**30  # bytes


def encode(tensors: Mapping[str, Floats]) -> bytes:
    """Write the adapter as a safetensors file. Equal tensors give equal bytes. Raises as ``Layout.check``."""
    Layout.of(tensors).check(tensors)
    # safetensors copies the memory behind an array unchanged: a transposed view would be written in the wrong order.
    dense = {name: np.asarray(tensors[name], order="C") for name in sorted(tensors)}
    return save(dense, metadata={"format": "pt"})


def decode(blob: bytes, layout: Layout | None = None) -> Tensors:
    """Read what ``encode`` wrote: ``decode(encode(t)) == t``. Without ``layout``, any finite float32 tensors are
    accepted. Raises DataError: truncated, oversized or damaged bytes, another layout, NaN or infinity."""
    if len(blob) > MAX_ADAPTER:
        reason = f"an adapter file of {len(blob)} bytes is above the limit of {MAX_ADAPTER}"
        raise DataError(reason, about="adapter")
    try:
        tensors: Tensors = load(blob)
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"not a sound adapter file: {error}", about="adapter") from error
    (layout or Layout.of(tensors)).check(tensors)
    return tensors


def sha256(blob: bytes) -> str:
    """Return the content address of a file: SHA-256 in hex."""
    return hashlib.sha256(blob).hexdigest()
