"""The tensors of peft's methods ↔ those that graphs read: LoRA's, and the vectors of ``graphinputs.VECTORS``.

======================================================== ==========================================
peft's name, after the prefix                            becomes
======================================================== ==========================================
``LAYER.ia3_l`` of shape (out, 1)                        ``LAYER.output_scale`` (1, out)
``LAYER.ia3_l`` of shape (1, in), of a feed-forward      ``LAYER.input_scale`` (1, in)
``LAYER.beft_bias`` (1, out)                             ``LAYER.output_offset`` (1, out)
``NORM.ln_tuning_layers.PARAMETER`` (width)              ``NORM.PARAMETER.replaced`` (1, width)
======================================================== ==========================================

All of them keep their values. LoRA's tensors and modules in ``modules_to_save`` keep their names.
"""

import numpy as np

from adapters.graphinputs import (
    INPUT_SCALE,
    OFFSET,
    OUTPUT_SCALE,
    REPLACED,
    input_name,
    vector_kind,
    vector_site,
)
from adapters.layout import Floats, Tensors
from aggregation.errors import DataError

IA3, BEFT, NORM = ".ia3_l", ".beft_bias", ".ln_tuning_layers."


def from_peft_tensors(tensors: Tensors, method: str) -> Tensors:
    """The tensors of a PEFT folder, with vectors in the place of peft's own.

    Args:
        tensors: Under peft's names.
        method: peft's type. The tensors of other methods keep their names.

    Raises:
        DataError: A tensor has a shape that its method does not give it, or a name that only a graph's input has.
    """
    return dict(_from_peft(name, value, method) for name, value in tensors.items())


def to_peft_tensors(tensors: Tensors) -> Tensors:
    """Law: ``to_peft_tensors(from_peft_tensors(t)) == t``."""
    return dict(_to_peft(name, value) for name, value in tensors.items())


def _from_peft(name: str, value: Floats, method: str) -> tuple[str, Floats]:
    if vector_kind(name):
        raise DataError(f"tensor {input_name(name)[:80]!r} is not one that peft saves", about=name)
    if method == "IA3" and name.endswith(IA3):
        if value.ndim != 2 or 1 not in value.shape or value.shape == (1, 1):
            raise _odd(name, value)
        kind = INPUT_SCALE if value.shape[0] == 1 else OUTPUT_SCALE
        return name.removesuffix(IA3) + kind, value.reshape(1, -1)
    if method == "BEFT" and name.endswith(BEFT):
        if value.ndim != 2 or value.shape[0] != 1:
            raise _odd(name, value)
        return name.removesuffix(BEFT) + OFFSET, value
    path, norm, parameter = name.partition(NORM)
    if method == "LN_TUNING" and norm:
        if value.ndim != 1:
            raise _odd(name, value)
        return f"{path}.{parameter}{REPLACED}", value[np.newaxis]
    return name, value


def _to_peft(name: str, value: Floats) -> tuple[str, Floats]:
    site = vector_site(name)
    match vector_kind(name):
        case ".output_scale":
            return site + IA3, value.reshape(-1, 1)
        case ".input_scale":
            return site + IA3, value
        case ".output_offset":
            return site + BEFT, value
        case ".replaced":
            path, _, parameter = site.rpartition(".")
            return path + NORM + parameter, value[0]
    return name, value


def _odd(name: str, value: Floats) -> DataError:
    return DataError(f"tensor {input_name(name)[:80]!r} is {list(value.shape)}, not one vector", about=name)
