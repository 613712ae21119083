"""An adapter as a device holds it: the tensors that an exported graph reads, and how they are stored small.

The exporter writes this form and the device reads it; they share nothing else, so names, shapes and number formats are
decided here. The container (``.onnx_adapter``), signatures and digests are others' matter.

A LoRA pair is stored as the graph multiplies it, ``y = base(x) + (x @ A) @ B``: A of shape ``(in, rank)``, B of shape
``(rank, out)`` with the layer's scaling folded in. Modules trained whole keep their shapes.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adapters import int4
from adapters.layout import Floats, Layout, Tensors
from aggregation.errors import ConfigError, DataError

Format = Literal["fp32", "fp16", "int8", "int4"]
Stored = dict[str, NDArray[Any]]

PEFT_PREFIX = "base_model.model."  # peft puts it before every name of the base's module tree
LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
SCALE = "#scale"  # follows a tensor's name; no module of torch can bear a name with this sign
INT8_MAX = 127
MAX_LABEL = 256  # characters
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str) -> str:
    """Return ``name`` if it can name an adapter and its two files on any system.

    Raises:
        ConfigError: Empty, longer than 64 characters, or with a sign that could leave the folder.
    """
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"adapter name {name[:80]!r} must be 1 to 64 letters, digits, '.', '_' or '-'", about="name", value=name
        )
    return name


def check_labels(name: str, labels: Sequence[str]) -> None:
    """Refuse labels of the adapter ``name`` that no device answers with.

    Raises:
        DataError: One is there twice, or is not a printable name of at most ``MAX_LABEL`` characters.
    """
    if len(set(labels)) != len(labels):
        raise DataError(f"adapter {name!r} names a label twice; export it again with other labels", about="labels")
    for label in labels:
        if not label.strip() or len(label) > MAX_LABEL or not label.isprintable():
            raise DataError(
                f"adapter {name!r}: label {label[:40]!r} is not a printable name; export it with another",
                about="labels",
                value=label,
            )


def to_graph(tensors: Tensors, scaling: Mapping[str, float]) -> Tensors:
    """Registry tensors (names and shapes of peft) as the graph reads them.

    Args:
        tensors: All tensors of one adapter.
        scaling: The factor of each adapted layer, by the layer's path in the base.
    """
    return {graph_name(name): _turned(graph_name(name), value, scaling) for name, value in tensors.items()}


def from_graph(inputs: Tensors, scaling: Mapping[str, float]) -> Tensors:
    """The tensors under peft's names and in its shapes: ``from_graph(to_graph(t, s), s) == t`` up to rounding."""
    unscaled = {path: 1 / factor if factor else 1.0 for path, factor in scaling.items()}
    return {PEFT_PREFIX + name: _turned(name, value, unscaled) for name, value in inputs.items()}


def graph_name(peft_name: str) -> str:
    """The graph input that holds the tensor which peft calls ``peft_name``."""
    return peft_name.removeprefix(PEFT_PREFIX)


def layout_of(inputs: Tensors) -> Layout:
    """The layout, in peft's names and shapes, of tensors that ``to_graph`` returned."""
    return Layout.of(
        {PEFT_PREFIX + name: value.T if _is_lora(name) else value for name, value in inputs.items()},
    )


def quantize(inputs: Tensors, form: Format) -> Stored:
    """What an adapter file holds.

    ``fp32`` and ``fp16`` hold the numbers themselves. ``int8`` is symmetric, with one float32 scale for each rank or
    row. ``int4`` is packed two to a byte (``adapters/int4.py``), each rank of A and B being a row of it; a tensor with
    an odd number of columns stays in int8. Vectors and empty tensors stay float32: a bias is too small to save on.

    Guarantee: ``restore(quantize(x, f), f)`` differs from ``x`` by nothing for ``fp32``, by half a unit in the last
    place for ``fp16``, by half a scale (the largest of its row over 127) for ``int8``, and for ``int4`` by a root mean
    square of half the largest over 7 in each block of 32. Equal tensors give equal bytes.

    Raises:
        DataError: A value is not finite, or too large for the format.
    """
    stored: Stored = {}
    for name, value in inputs.items():
        if not np.isfinite(value).all():
            raise DataError(f"tensor {name!r} holds NaN or infinity; nothing was exported", about=name)
        if form == "fp32" or value.ndim < 2 or not value.size:
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
    """The float32 tensors of an adapter file.

    Raises:
        DataError: A tensor has another number type than ``form`` allows, a scale is missing, left over, of another
            shape or not positive, or a value is not finite.
    """
    return {name: _restored(name, stored, form) for name in stored if not name.endswith(SCALE)} | _left_over(stored)


def check_slots(inputs: Tensors, slots: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Refuse an adapter that does not fill exactly the slots of a graph.

    Args:
        inputs: The adapter's tensors by graph input.
        slots: Dimensions by graph input: digits for a fixed one, else a symbol that means the same size everywhere.

    Returns:
        The size that each symbol takes.

    Raises:
        DataError: A tensor is missing or unknown, or of a shape that the graph does not take.
    """
    if odd := sorted(set(inputs).symmetric_difference(slots)):
        raise DataError(
            f"tensor {odd[0]!r} is missing from the adapter or has no slot in the base's graph", about=odd[0]
        )
    sizes: dict[str, int] = {}
    for name, dimensions in slots.items():
        shape = inputs[name].shape
        fits = len(shape) == len(dimensions) and all(
            size == (int(text) if text.isdigit() else sizes.setdefault(text, size))
            for text, size in zip(dimensions, shape, strict=True)
        )
        if not fits:
            raise DataError(
                f"tensor {name!r} is {list(shape)}, its slot takes [{', '.join(dimensions)}]", about=name, value=shape
            )
    return sizes


def _is_lora(name: str) -> bool:
    return name.endswith((LORA_A, LORA_B))


def _turned(name: str, value: Floats, scaling: Mapping[str, float]) -> Floats:
    if not _is_lora(name):
        return value
    factor = scaling[name.removesuffix(LORA_B)] if name.endswith(LORA_B) else 1.0
    return np.ascontiguousarray(value.T) * np.float32(factor)


def _group_axis(name: str) -> int:
    # The axis whose entries have a scale each: the rank of A and B, the rows of any other tensor.
    return 1 if name.endswith(LORA_A) else 0


def _scale(value: Floats, axis: int) -> Floats:
    others = tuple(i for i in range(value.ndim) if i != axis)
    largest = np.abs(value).max(axis=others, keepdims=True, initial=0.0)
    # A row of zeros, or of numbers so small that the division underflows, is stored as zeros.
    scale: Floats = np.where(largest / INT8_MAX > 0, largest / INT8_MAX, 1.0).astype(np.float32)
    return scale


def _rows_last(name: str, value: NDArray[Any]) -> NDArray[Any]:
    # As it is packed in int4: A lies so that the numbers of one rank follow each other, as they do in B.
    return value.T if name.endswith(LORA_A) else value


def _check_range(name: str, value: Floats, limit: float, form: Format) -> None:
    if np.abs(value).max() > limit:
        raise DataError(f"tensor {name!r} is too large for {form}; export it as fp32 or int8", about=name)


# The number types that a tensor of two or more dimensions may have in a file.
_TYPES: dict[Format, tuple[type[np.generic], ...]] = {
    "fp32": (np.float32,),
    "fp16": (np.float16,),
    "int8": (np.int8,),
    "int4": (np.uint8, np.int8),
}


def _restored(name: str, stored: Stored, form: Format) -> Floats:
    value = stored[name]
    if value.dtype not in (_TYPES[form] if value.ndim >= 2 and value.size else (np.float32,)):
        raise DataError(
            f"tensor {name!r} is {value.dtype} in an adapter of format {form}", about=name, value=str(value.dtype)
        )
    restored: Floats
    if value.dtype == np.uint8:
        restored = _rows_last(name, int4.unpack(value, _checked_blocks(name, stored)))
    elif value.dtype == np.int8:
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


def _left_over(stored: Stored) -> Tensors:
    for name in stored:
        of = name.removesuffix(SCALE)
        if name != of and (of not in stored or stored[of].dtype not in (np.int8, np.uint8)):
            raise DataError(f"scales {name!r} belong to no tensor of the adapter", about=name)
    return {}
