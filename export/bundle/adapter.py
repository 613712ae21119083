"""Registry tensors → the bytes of an ``.onnx_adapter`` file. Equal tensors give equal bytes.

The container is ONNX Runtime's; a file of format ``fp32`` works with its ``LoraAdapter`` unchanged. The container
checks nothing, so everything that a device relies on is in the signed adapter manifest (``write.py``).
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort

from adapters.layout import Tensors
from adapters.ondevice import LORA_A, LORA_B, PEFT_PREFIX, Format, graph_name, quantize, restore, to_graph
from adapters.peft.inputs import LORA, AdapterInputs, LoraSlot
from aggregation.errors import DataError


def encode(tensors: Tensors, inputs: AdapterInputs, form: Format = "int8") -> bytes:
    """The file of an adapter.

    Args:
        tensors: All tensors of the adapter, under peft's names.
        inputs: The adapter's, of a model or of its tensors.
        form: How numbers are stored; ``adapters.ondevice.quantize`` says what each form loses.

    Raises:
        DataError: A tensor is missing, unknown, not finite, or too large for the format.
    """
    if odd := sorted({graph_name(name) for name in tensors}.symmetric_difference(inputs.names)):
        raise DataError(f"tensor {odd[0]!r} is missing from the adapter or unknown to the exported base", about=odd[0])
    stored = quantize(to_graph(tensors, inputs.scaling), form)
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
    tensors: Tensors, inputs: AdapterInputs, slots: Mapping[str, Sequence[str]]
) -> tuple[Tensors, AdapterInputs]:
    """The adapter with an empty LoRA pair (rank 0) for each layer that the base has slots for and it does not adapt.

    Args:
        tensors: Of the adapter, under peft's names.
        inputs: Of the adapter.
        slots: Of the base, with dimensions as text.

    Raises:
        DataError: The base has no slot for a tensor of the adapter, or the adapter lacks a tensor of a module in
            ``modules_to_save``.
    """
    names = {graph_name(name) for name in tensors}
    if odd := sorted(names - set(slots)):
        remedy = (
            "export the base with this layer among --targets" if LORA in odd[0] else "train without modules_to_save"
        )
        raise DataError(f"the base has no slot for the adapter's tensor {odd[0]!r}: {remedy}", about=odd[0])
    if missing := sorted(name for name in set(slots) - names if LORA not in name):
        raise DataError(
            f"the adapter lacks {missing[0]!r}, which every adapter of this base must have: train its module in "
            'modules_to_save (task_type="SEQ_CLS" does)',
            about=missing[0],
        )
    full, loras = dict(tensors), list(inputs.loras)
    for name in slots:
        path = name.removesuffix(LORA_A)
        if name == path or path in inputs.scaling or path + LORA_B not in slots:
            continue
        width, out = int(slots[name][0]), int(slots[path + LORA_B][-1])
        full[PEFT_PREFIX + name] = np.empty((0, width), np.float32)
        full[PEFT_PREFIX + path + LORA_B] = np.empty((out, 0), np.float32)
        loras.append(LoraSlot(path, 1.0))
    return full, replace(inputs, loras=tuple(loras))


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
            raise DataError("not a sound .onnx_adapter file", about=".onnx_adapter") from error
        return restore({name: value.numpy() for name, value in values.items()}, form)
