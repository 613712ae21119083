"""Weights as a profile rounds them, so that a device trains on those with which it answers."""

import copy
import shutil
from collections.abc import Collection, Set
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from edgeadapt.bases.base import INDEX, Base
from edgeadapt.bases.pretrained import is_linear
from edgeadapt.formats.layout import Floats
from export.onnx.blocks import BLOCK, eight_bits, four_bits, four_bits_exactly
from export.onnx.exported import Profile
from export.onnx.peftmodel import SlottedModel, layer_weight
from export.onnx.storedweights import float_weights, in_integers, integer_weights, is_among
from export.onnx.tensorstore import MEMORY, TensorStore

BITS = {Profile.NATIVE_INT8: 8, Profile.NATIVE_INT4: 4}


def copy_others(base: Base, stage: Path, *but: str) -> None:
    replaced = {INDEX, *but, *(file.name for file in base.weight_files)}
    for file in base.folder.iterdir():
        if file.is_file() and file.name not in replaced:
            shutil.copyfile(file, stage / file.name)


def as_stored(
    slotted: SlottedModel, profile: Profile, answering: onnx.ModelProto, store: TensorStore = MEMORY
) -> SlottedModel:
    """Give a model the weights that a graph in ``profile`` computes with: a copy, or itself if these are its own.
    ``answering`` says which weights are integers or floats."""
    if profile is Profile.FP32:
        return slotted
    model = copy.deepcopy(slotted.model)
    if profile is Profile.WEB_INT8:
        round_integers(model, integer_weights(answering, store))
    else:
        round_weights(model, BITS[profile], float_weights(answering, store))
    return SlottedModel(model, slotted.inputs)


def round_integers(model: nn.Module, integers: Collection[str]) -> None:
    """Round as ``quantize.in_integers``, in place. A weight that is also an embedding becomes another one than that."""
    for module in model.modules():
        if is_linear(module):
            weight: Floats = layer_weight(module).T
            if weight.shape[0] % BLOCK == 0 and (integer := in_integers(weight, integers)) is not None:
                rounded = integer[0] * integer[1]
                rows = rounded if type(module) is Conv1D else rounded.T
                module.weight = nn.Parameter(torch.from_numpy(np.ascontiguousarray(rows)), requires_grad=False)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.shape[1] % BLOCK == 0:
            table = module.weight.detach().numpy()
            blocks = four_bits_exactly(table) or eight_bits(table)
            module.weight = nn.Parameter(torch.from_numpy(blocks.values), requires_grad=False)


def round_weights(model: nn.Module, bits: int, floats: Set[str] = frozenset()) -> None:
    """Round as ``quantize.in_blocks``, in place: embeddings, also as output layers, in eight bits, others in ``bits``.
    Weights whose width is not divisible by a block stay as they are, as do those among ``floats``
    (``float_weights``)."""
    done: set[int] = set()  # tied weights are one tensor under two names
    for module in sorted(model.modules(), key=lambda module: not isinstance(module, nn.Embedding)):
        embedding, turned = isinstance(module, nn.Embedding), type(module) is Conv1D
        if not (embedding or turned or isinstance(module, nn.Linear)):
            continue
        weight: torch.Tensor = module.get_parameter("weight").detach()
        rows = weight.numpy().T if turned else weight.numpy()
        if weight.data_ptr() in done or rows.shape[1] % BLOCK:
            continue
        done.add(weight.data_ptr())
        if is_among(rows, floats):
            continue
        blocks = four_bits_exactly(rows) or (eight_bits if embedding or bits == 8 else four_bits)(rows)
        weight.copy_(torch.from_numpy(blocks.values.T if turned else blocks.values))
