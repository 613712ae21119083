"""How an adapter file stores numbers: 32 or 16 bit floats, or integers of 8 or 4 bits with scales. The exporter
quantizes and a device restores. Names are graph inputs; ``container.py`` makes the file of it."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from aggregation.errors import DataError
from edgeadapt.formats import int4
from edgeadapt.formats.graphinputs import BY_COLUMN, VECTORS, VIRTUAL
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import Format

Stored = dict[str, NDArray[Any]]

SCALE = "#scale"  # follows a tensor's name; no module of torch can have a name with this character
INT8_MAX = 127
# The number types of matrices, by format.
TYPES: dict[Format, tuple[type[np.generic], ...]] = {
    "fp32": (np.float32,),
    "fp16": (np.float16,),
    "int8": (np.int8,),
    "int4": (np.uint8, np.int8),
}


def quantize(inputs: Tensors, form: Format) -> Stored:
    """Return the tensors that an adapter file stores.

    >>> stored = quantize({"head.weight": np.array([[0.0, 1.27], [-2.54, 0.02]], np.float32)}, "int8")
    >>> stored["head.weight"].tolist(), stored["head.weight#scale"].round(4).tolist()
    ([[0, 127], [-127, 1]], [[0.009999999776482582], [0.019999999552965164]])

    Args:
        inputs: By graph input.
        form: ``fp32`` and ``fp16`` store floats. ``int8`` is symmetric, with one float32 scale for each rank or row.
            ``int4`` packs two integers in a byte (``int4.py``), where each rank of A and B is a row; a tensor with an
            odd number of columns is stored in int8. Vectors (also those of ``graphinputs.VECTORS``, which have two
            dimensions), virtual tokens and empty tensors are stored in float32.

    Returns:
        By graph input; the scales of a tensor under its name and ``SCALE``. Guarantee: equal tensors give equal bytes,
        and ``restore(quantize(x, f), f)`` differs from ``x`` by

        ======== ===================================================================================================
        ``fp32`` nothing
        ``fp16`` at most half a unit in the last place
        ``int8`` at most half a scale; the scale is the largest magnitude of the row, over 127
        ``int4`` a root mean square error, in each block of 32, of at most half the block's largest magnitude over 7
        ======== ===================================================================================================

    Raises DataError: a value is not finite, or too large for the format; about the tensor."""
    stored: Stored = {}
    for name, value in inputs.items():
        if not np.isfinite(value).all():
            raise DataError(f"tensor {name!r} holds NaN or infinity: nothing was exported", about=name)
        if form == "fp32" or not _is_matrix(name, value):
            stored[name] = np.ascontiguousarray(value, dtype=np.float32)
        elif form == "fp16":
            _check_range(name, value, float(np.finfo(np.float16).max), form)
            stored[name] = np.ascontiguousarray(value, dtype=np.float16)
        elif form == "int4" and _rows_last(name, value).shape[-1] % 2 == 0:
            _check_range(name, value, int4.LARGEST, form)
            stored[name], stored[name + SCALE] = int4.pack(_rows_last(name, value))
        else:
            stored[name + SCALE] = scale = _scale(value, _group_axis(name))
            stored[name] = np.rint(value / scale).astype(np.int8)
    return stored


def restore(stored: Stored, form: Format) -> Tensors:
    """Return the float32 tensors of an adapter file, C-contiguous, by graph input. Raises DataError: a tensor has a
    number type that ``form`` does not allow; a scale is missing, belongs to no tensor, or has another shape; a scale or
    a value is not finite, or an int8 scale is not positive; about the tensor."""
    restored = {name: _restored(name, stored, form) for name in stored if not name.endswith(SCALE)}
    _check_scales_belong(stored)
    return restored


def _is_matrix(name: str, value: NDArray[Any]) -> bool:
    return value.ndim >= 2 and value.size > 0 and not name.endswith(VECTORS) and name not in VIRTUAL


def _group_axis(name: str) -> int:
    # Of the axis whose entries have one scale each: the rank of A and B, the rows of any other tensor.
    return 1 if name.endswith(BY_COLUMN) else 0


def _scale(value: Floats, axis: int) -> Floats:
    others = tuple(i for i in range(value.ndim) if i != axis)
    largest = np.abs(value).max(axis=others, keepdims=True, initial=0.0)
    # A row of zeros, or of numbers so small that the division underflows, is stored as zeros.
    scale: Floats = np.where(largest / INT8_MAX > 0, largest / INT8_MAX, 1.0).astype(np.float32)
    return scale


def _rows_last(name: str, value: NDArray[Any]) -> NDArray[Any]:
    # As int4 packs it: A is transposed, so that the numbers of one rank are consecutive, as they are in B.
    return value.T if name.endswith(BY_COLUMN) else value


def _check_range(name: str, value: Floats, limit: float, form: Format) -> None:
    if np.abs(value).max() > limit:
        raise DataError(f"tensor {name!r} is too large for {form}: export it as fp32 or int8", about=name)


def _restored(name: str, stored: Stored, form: Format) -> Floats:
    value = stored[name]
    if value.dtype not in (TYPES[form] if _is_matrix(name, value) else (np.float32,)):
        raise DataError(f"tensor {name!r} is {value.dtype} in an adapter of format {form}", about=name)
    restored: Floats
    if value.dtype == np.uint8:
        restored = _rows_last(name, int4.unpack(value, _checked_blocks(name, stored)))
    elif value.dtype == np.int8:
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            restored = value.astype(np.float32) * _checked_scale(name, stored)
    else:
        restored = value.astype(np.float32)
    if not np.isfinite(restored).all():
        raise DataError(f"tensor {name!r} holds NaN or infinity", about=name)
    return np.ascontiguousarray(restored)


def _checked_scale(name: str, stored: Stored) -> Floats:
    value, axis = stored[name], _group_axis(name)
    shape = tuple(size if i == axis else 1 for i, size in enumerate(value.shape))
    scale = stored.get(name + SCALE)
    if scale is None or scale.dtype != np.float32 or scale.shape != shape or not (scale > 0).all():
        raise DataError(f"tensor {name!r} has no sound scales of shape {list(shape)}", about=name)
    return scale


def _checked_blocks(name: str, stored: Stored) -> int4.Scales:
    shape = int4.scale_shape(stored[name])
    scale = stored.get(name + SCALE)
    if scale is None or scale.dtype != np.float16 or scale.shape != shape or not np.isfinite(scale).all():
        raise DataError(f"tensor {name!r} has no sound scales of shape {list(shape)}", about=name)
    return scale


def _check_scales_belong(stored: Stored) -> None:
    for name in stored:
        of = name.removesuffix(SCALE)
        if name != of and (of not in stored or stored[of].dtype not in (np.int8, np.uint8)):
            raise DataError(f"scales {name!r} belong to no tensor of the adapter", about=name)
