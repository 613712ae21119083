"""A frozen causal language model, exported once for every adapter of its layers."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from adapters import pretrained
from adapters.base import Base
from adapters.bundle import TOKENIZER
from adapters.layout import Floats, Tensors
from adapters.peft.inputs import AdapterInputs, LoraSlot
from aggregation.errors import ConfigError
from export.causal import builder, traced
from export.causal.sample import Sample, sample_logits
from export.onnx import headers, matmuls
from export.onnx.calibrate import TEXT, TOKENS
from export.onnx.exported import MAX_RANK, ExportedBase, Profile
from export.onnx.quantize import quantize


def export_causal(base: Base, targets: Sequence[str], profile: Profile, max_rank: int = MAX_RANK) -> ExportedBase:
    """Export ``base`` with a slot at each linear layer whose name ends in one of ``targets``; takes some seconds.

    Args:
        base: A causal language model.
        targets: As peft's ``target_modules``: names of layers, such as ``("q_proj", "v_proj")``.
        profile: How weights are stored.
        max_rank: The highest rank that the base manifest allows an adapter.

    Raises:
        ConfigError: The base cannot be exported, no layer has one of the names, or a layer's MatMul cannot be found in
            the graph.
    """
    model = pretrained.load(base, AutoModelForCausalLM)
    weights = _weights(model, targets)
    sample = sample_logits(model, pretrained.tokenizer(base))
    config = model.config
    del model  # each path loads it again, and until the end only the layers' weights are needed
    decoder = _decoder(base, config, sample)
    layers = matmuls.find(decoder.graph, weights)
    ids = Tokenizer.from_str(decoder.files[TOKENIZER].decode()).encode(TEXT).ids[:TOKENS]
    graph = quantize(decoder.graph, profile, ids)
    slots = matmuls.insert_lora(graph, layers)
    matmuls.merge(graph)
    return ExportedBase(
        base_digest=base.digest,
        task="text-generation",
        profile=profile,
        # An adapter of a language model brings its own scaling (AdapterSource.adapter_inputs); 1 leaves B as it is.
        adapter_inputs=AdapterInputs("default", tuple(LoraSlot(path, 1.0) for path in weights), ()),
        slots=slots,
        max_rank=max_rank,
        files=headers.split(graph, slots) | decoder.files,
    )


def _decoder(base: Base, config: Any, sample: Sample) -> builder.DecoderGraph:
    """By the builder path if its graph gives torch's logits, else by the traced path."""
    try:
        return builder.build(base, config, sample)
    except builder.BuilderPathError:
        return traced.build(base, sample)


def _weights(model: Any, targets: Sequence[str]) -> Tensors:
    """The weights of the layers that get slots, by path, in the order of the module tree."""
    found = {}
    for target in targets:
        layers = [path for path, _ in model.named_modules() if path == target or path.endswith(f".{target}")]
        if not layers:
            raise ConfigError(
                f"the base has no layer named {target!r}; it has {pretrained.layer_names(model)}",
                about="--targets",
                value=target,
            )
        found.update({path: model.get_submodule(path) for path in layers})
    for path, module in found.items():
        if type(module) not in (nn.Linear, Conv1D):
            kind = type(module).__name__
            raise ConfigError(
                f"{path}: an adapter on {kind} cannot be exported, only on Linear", about=kind, value=path
            )
    return {path: _weight(m) for path, m in model.named_modules() if path in found}


def _weight(layer: nn.Module) -> Floats:
    """Of shape ``(out, in)``."""
    weight: Floats = layer.weight.detach().numpy()  # type: ignore[operator]
    return weight.T if type(layer) is Conv1D else weight
