"""Registry tensors → the bytes of an ``.onnx_adapter`` file. Equal tensors give equal bytes.

The container is ONNX Runtime's; a file of format ``fp32`` works with its ``LoraAdapter`` as it is. The container
checks nothing, so what a device relies on stands in the signed sidecar (``bundle.py``).
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from adapters.layout import Tensors
from adapters.ondevice import LORA_A, LORA_B, PEFT_PREFIX, Format, graph_name, quantize, restore, to_graph
from aggregation.errors import DataError
from export.onnx.slots import LORA, AdapterInputs, LoraSlot


def encode(tensors: Tensors, found: AdapterInputs, form: Format = "int8") -> bytes:
    """The file of an adapter.

    Args:
        tensors: All tensors of the adapter, under peft's names.
        found: The plan of a model with that adapter's layers.
        form: How numbers are stored; see ``adapters.ondevice.quantize`` for what each loses.

    Raises:
        DataError: A tensor is missing, unknown, not finite, or too large for the format.
    """
    if odd := sorted({graph_name(name) for name in tensors}.symmetric_difference(found.inputs)):
        raise DataError(f"tensor {odd[0]!r} is missing from the adapter or unknown to the exported base")
    stored = quantize(to_graph(tensors, found.scaling), form)
    # Sorted, because the container keeps the order in which it is filled.
    values = {name: ort.OrtValue.ortvalue_from_numpy(stored[name]) for name in sorted(stored)}
    container = ort.AdapterFormat()
    container.set_adapter_version(1)
    container.set_model_version(1)
    container.set_parameters(values)
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        path = Path(folder) / "adapter"
        container.export_adapter(str(path))
        return path.read_bytes()


def completed(
    tensors: Tensors, found: AdapterInputs, slots: Mapping[str, Sequence[str]]
) -> tuple[Tensors, AdapterInputs]:
    """The adapter and its plan with an empty pair for each layer of the base that it leaves alone.

    A base has slots for every layer that any adapter may want; this one may adapt fewer.

    Args:
        tensors: Of the adapter, under peft's names.
        found: Its plan.
        slots: The base's, with dimensions as text.

    Raises:
        DataError: The adapter has a tensor that the base has no slot for, or lacks one of a module trained whole.
    """
    names = {graph_name(name) for name in tensors}
    if odd := sorted(names - set(slots)):
        way = "export the base with this layer among --targets" if LORA in odd[0] else "train without modules_to_save"
        raise DataError(f"the base has no slot for the adapter's tensor {odd[0]!r}: {way}")
    if lacking := sorted(name for name in set(slots) - names if LORA not in name):
        raise DataError(
            f"the adapter lacks {lacking[0]!r}, which each adapter of this base brings: train it whole "
            '(task_type="SEQ_CLS", or in modules_to_save)'
        )
    full, loras = dict(tensors), list(found.loras)
    for name in slots:
        path = name.removesuffix(LORA_A)
        if name == path or path in found.scaling or path + LORA_B not in slots:
            continue
        width, height = slots[name][0], slots[path + LORA_B][-1]
        full[PEFT_PREFIX + name] = np.empty((0, int(width)), np.float32)
        full[PEFT_PREFIX + path + LORA_B] = np.empty((int(height), 0), np.float32)
        loras.append(LoraSlot(path, 1.0))
    return full, replace(found, loras=tuple(loras))


def decode(blob: bytes, form: Format) -> Tensors:
    """The graph inputs of a file that ``encode`` wrote in format ``form``.

    Raises:
        DataError: Not an adapter file, or not of this format.
    """
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        path = Path(folder) / "adapter"
        path.write_bytes(blob)
        try:
            values = ort.AdapterFormat.read_adapter(str(path)).get_parameters()
        except Exception as error:  # onnxruntime raises several classes of its own, with no common base
            raise DataError("not a sound .onnx_adapter file") from error
        return restore({name: value.numpy() for name, value in values.items()}, form)
