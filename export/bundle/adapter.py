"""Encode tensors under peft's names as an adapter of a bundle, and decode them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from aggregation.errors import DataError
from edgeadapt.formats import container
from edgeadapt.formats.bundle import VerifiedAdapter
from edgeadapt.formats.graphinputs import (
    LORA_A,
    LORA_B,
    PEFT_PREFIX,
    VIRTUAL,
    empty_inputs,
    from_inputs,
    input_name,
    layer_of,
    to_inputs,
    vector_kind,
)
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import Format
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.quantization import quantize, restore
from edgeadapt.methods.peft.inputs import AdapterInputs, LoraSlot, is_saved, lora_paths, summary
from edgeadapt.methods.peft.lowrank import plain


def encode(tensors: Tensors, inputs: AdapterInputs, form: Format = "int8") -> bytes:
    """Encode all tensors of an adapter, under peft's names, as its file. ``edgeadapt.formats.quantization.quantize``
    says what each form loses. Raises DataError: a tensor is missing, unknown, not finite, or too large for the
    format."""
    if odd := sorted({input_name(name) for name in tensors}.symmetric_difference(inputs.names)):
        raise DataError(f"tensor {odd[0]!r} is missing from the adapter or unknown to the exported base", about=odd[0])
    return container.pack(quantize(to_inputs(tensors, inputs.scaling), form))


def decode(blob: bytes, form: Format) -> Tensors:
    """Read the graph inputs in a file that ``encode`` wrote in format ``form``. Raises DataError for any other file."""
    return restore(container.unpack(blob), form)


def completed(
    tensors: Tensors, inputs: AdapterInputs, slots: Mapping[str, Sequence[str]]
) -> tuple[Tensors, AdapterInputs]:
    """Add an empty tensor for each slot of the base that the adapter does not fill: of rank 0, or of no vector.
    ``tensors``: under peft's names; ``slots``: of the base, with dimensions as text. Raises DataError: the base has no
    slot for a tensor of the adapter, or the adapter lacks a tensor of a module in ``modules_to_save``."""
    names = {input_name(name) for name in tensors}
    if odd := sorted(names - set(slots)):
        layers = [name.removesuffix(LORA_A) for name in odd if name.endswith(LORA_A)]
        layers += [layer_of(name) for name in odd if vector_kind(name)]
        others = [name for name in odd if is_saved(name)]
        remedies = [f"no slots for {summary(layers)}: export the base with 'bundle make --peft'"] if layers else []
        virtual = [name for name in odd if name in VIRTUAL]
        remedies += [f"no slot for {virtual[0]}: export the base with 'bundle make --peft'"] if virtual else []
        remedies += [f"no place for {', '.join(others)}: train without modules_to_save"] if others else []
        raise DataError(f"the base has {'; '.join(remedies)}", about=odd[0])
    if missing := sorted(name for name in set(slots) - names if is_saved(name)):
        raise DataError(
            f"the adapter lacks {missing[0]!r}, which every adapter of this base must have: train its module in "
            'modules_to_save (task_type="SEQ_CLS" does)',
            about=missing[0],
        )
    full, loras, vectors = dict(tensors), list(inputs.loras), list(inputs.vectors)
    virtual, empty = list(inputs.virtual), empty_inputs(slots)
    for name in slots:
        if name in VIRTUAL and name not in names:
            full[PEFT_PREFIX + name] = empty[name]
            virtual.append(name)
        if vector_kind(name) and name not in names:
            full[PEFT_PREFIX + name] = empty[name]
            vectors.append(name)
        path = name.removesuffix(LORA_A)
        if name == path or path in inputs.scaling or path + LORA_B not in slots:
            continue
        width, out = int(slots[name][0]), int(slots[path + LORA_B][-1])
        full[PEFT_PREFIX + name] = np.empty((0, width), np.float32)
        full[PEFT_PREFIX + path + LORA_B] = np.empty((out, 0), np.float32)
        loras.append(LoraSlot(path, 1.0))
    return full, replace(inputs, loras=tuple(loras), vectors=tuple(vectors), virtual=tuple(virtual))


def unfolded(adapter: VerifiedAdapter) -> tuple[Tensors, PeftConfig]:
    """Restore the adapter's tensors under peft's names, and the PEFT config that gives its layers their scaling. Layers
    that the adapter does not change are dropped. Where the manifest has no PEFT config, the scaling stays in B, and the
    PEFT config that is returned gives every layer the scaling 1."""
    kept = {name: value for name, value in adapter.inputs.items() if value.size}
    config = adapter.manifest.peft_config or _folded(kept)
    renamed = from_inputs(kept, dict.fromkeys(lora_paths(kept), 1.0))
    return from_inputs(kept, AdapterInputs.of_tensors(config, renamed).scaling), config


def _folded(inputs: Tensors) -> PeftConfig:
    paths = (path for path in sorted(lora_paths(inputs)) if path + LORA_B in inputs)
    return plain({path: inputs[path + LORA_A].shape[1] for path in paths})
