"""A base whose weights are rounded as a profile rounds them, so that training runs on the weights of the device.

The rounding of a profile changes the base more than an adapter's rounding changes the adapter. An adapter that is
trained on the rounded base compensates for it; docs/decisions/0012 says how to measure the gain.
"""

import copy
import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from adapters import pretrained
from adapters.base import INDEX, Base, find_base
from adapters.manifest import Task
from adapters.storage import new_folder
from aggregation.errors import ConfigError
from export.onnx.blocks import BLOCK, eight_bits, four_bits
from export.onnx.exported import Profile
from export.onnx.peftmodel import SlottedModel

BITS = {Profile.NATIVE_INT8: 8, Profile.NATIVE_INT4: 4}


def dequantized(base: Base, profile: Profile, out: Path, task: Task = "text-classification") -> Base:
    """Write a base folder with weights rounded as in ``profile``; exporting it in ``profile`` does not change them.

    Everything else is copied. The new base has its own digest, so adapters trained on it fit no other base.

    Args:
        base: A base in float32.
        profile: ``native-int8`` or ``native-int4``; the others do not round in blocks.
        out: A new or empty folder. It is written atomically.
        task: The task that the base is opened for.

    Raises:
        ConfigError: The profile does not round in blocks, or ``out`` is not empty.
    """
    if profile not in BITS:
        raise ConfigError(
            f"the profile {profile.value} does not round weights in blocks; choose {' or '.join(BITS)}",
            about="profile",
            value=profile.value,
        )
    with new_folder(out) as stage:
        model = pretrained.load(base, AutoModelForCausalLM if task == "text-generation" else AutoModel)
        round_weights(model, BITS[profile])
        model.save_pretrained(stage)
        replaced = {file.name for file in base.weight_files} | {INDEX}
        for file in base.folder.iterdir():
            if file.is_file() and file.name not in replaced:
                shutil.copyfile(file, stage / file.name)
    return find_base(str(out))


def as_stored(slotted: SlottedModel, profile: Profile) -> SlottedModel:
    """A model with the weights that a graph in ``profile`` computes with: a copy, or itself if these are its own."""
    if profile not in BITS:
        return slotted
    model = copy.deepcopy(slotted.model)
    round_weights(model, BITS[profile])
    return SlottedModel(model, slotted.inputs)


def round_weights(model: nn.Module, bits: int) -> None:
    """Round as ``quantize.in_blocks``, in place: embeddings, also as output layers, in eight bits, others in ``bits``.

    Weights whose width is not divisible by a block stay as they are.
    """
    done: set[int] = set()  # tied weights are one tensor under two names
    kinds: list[tuple[type[nn.Embedding | nn.Linear], int]] = [(nn.Embedding, 8), (nn.Linear, bits)]
    for module_type, chosen in kinds:
        for module in model.modules():
            if not isinstance(module, module_type):
                continue
            weight: torch.Tensor = module.weight.detach()
            if weight.data_ptr() in done or weight.shape[1] % BLOCK:
                continue
            done.add(weight.data_ptr())
            blocks = (eight_bits if chosen == 8 else four_bits)(weight.numpy())
            weight.copy_(torch.from_numpy(blocks.values))
