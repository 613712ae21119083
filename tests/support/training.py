"""What a training graph must be: over the bytes with which the device answers, and torch on these."""

from pathlib import Path

import onnx
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base, find_base
from edgeadapt.formats.bundle import MODEL, TRAINING, WEIGHTS
from edgeadapt.formats.manifest import Task
from export.onnx.dequantize import BITS, copy_others, round_integers, round_weights
from export.onnx.exported import ExportedBase, Profile
from export.onnx.storedweights import integer_weights
from export.onnx.tensorstore import MEMORY


def dequantized(base: Base, profile: Profile, out: Path, task: Task = "text-classification") -> Base:
    """Write a base folder with the weights with which ``profile`` answers, for torch to train on."""
    out.mkdir(parents=True)
    model = pretrained.load(base, AutoModelForCausalLM if task == "text-generation" else AutoModel)
    round_weights(model, BITS[profile])
    model.save_pretrained(out)
    copy_others(base, out)
    return find_base(str(out))


def check_shared_weights(exported: ExportedBase, own: int) -> None:
    """The training graph has at most ``own`` bytes in the file of weights that the answering graph does not read."""
    answering, training = (_places(exported, name) for name in (MODEL, TRAINING))
    end = max(offset + length for offset, length in answering.values())
    added = {name: length for name, (offset, length) in training.items() if offset >= end}
    assert sum(added.values()) <= own, added
    assert (exported.folder / WEIGHTS).stat().st_size <= end + own + 4096 * len(added)
    assert any(offset < end for offset, _ in training.values())


def round_as(exported: ExportedBase, model: nn.Module) -> None:
    """Give a model the weights with which an exported base answers, in place."""
    if exported.manifest.profile in BITS:
        round_weights(model, BITS[exported.manifest.profile])
    elif exported.manifest.profile == Profile.WEB_INT8:
        round_integers(model, integer_weights(onnx.load(exported.folder / MODEL), MEMORY))


def _places(exported: ExportedBase, header: str) -> dict[str, tuple[int, int]]:
    """Offset and length of each tensor in the file of weights; no large one is elsewhere."""
    tensors = onnx.load_from_string(exported.read(header)).graph.initializer
    stated = {t.name: {e.key: e.value for e in t.external_data} for t in tensors}
    assert all(stated[t.name] for t in tensors if len(t.raw_data) > 1024)
    return {name: (int(e["offset"]), int(e["length"])) for name, e in stated.items() if e}
