"""A base whose weights are already what a profile makes of them, so that what is trained on is what a device runs.

A profile's rounding changes the base by more than an adapter's own rounding changes the adapter. An adapter trained on
the rounded base has learnt around it; docs/decisions/0012 says how to measure what that is worth.
"""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from adapters import pretrained
from adapters.base import Base, find_base
from adapters.manifest import Task
from adapters.storage import new_folder
from aggregation.errors import ConfigError
from export.onnx.blocks import BLOCK, eight_bits, four_bits
from export.onnx.exported import Profile

WEIGHTS = "model.safetensors"
BITS = {Profile.NATIVE_INT8: 8, Profile.NATIVE_INT4: 4}


def dequantized(base: Base, profile: Profile, out: Path, task: Task = "text-classification") -> Base:
    """Write a base folder with the weights that ``profile`` gives; exporting it in ``profile`` changes them no more.

    Everything else is copied. The new base has a digest of its own: adapters trained on it are for it alone.

    Args:
        base: A base in float32.
        profile: In blocks of eight or four bits; float32 has nothing to round.
        out: A new or empty folder. It appears whole or not at all.
        task: What the base is opened for.

    Raises:
        ConfigError: The profile rounds nothing, or ``out`` is not empty.
    """
    if profile not in BITS:
        raise ConfigError(
            f"the profile {profile.value} rounds no weights; choose {' or '.join(BITS)}",
            about="profile",
            value=profile.value,
        )
    with new_folder(out) as stage:
        model = pretrained.load(base, AutoModelForCausalLM if task == "text-generation" else AutoModel)
        _round(model, BITS[profile])
        model.save_pretrained(stage)
        for file in base.folder.iterdir():
            if file.is_file() and file.name != WEIGHTS:
                shutil.copyfile(file, stage / file.name)
    return find_base(str(out))


def _round(model: nn.Module, bits: int) -> None:
    """As ``quantize`` does in the graph: tables in eight bits, an output layer that is one too; products in ``bits``.

    Widths that no block divides stay as they are.
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
