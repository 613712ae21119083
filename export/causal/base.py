"""A frozen causal language model, exported once for every adapter of its layers."""

from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from adapters import pretrained
from adapters.base import Base
from adapters.layout import Floats, Tensors
from aggregation.errors import ConfigError
from export.bundle.base import MAX_RANK, TOKENIZER, ExportedBase
from export.causal import builder, slots, traced
from export.causal.sample import Sample, ask
from export.onnx import headers
from export.onnx.adapterinputs import AdapterInputs, LoraSlot
from export.onnx.calibrate import TEXT, TOKENS
from export.onnx.merge import merge
from export.onnx.quantize import Profile, quantize


def export_causal(base: Base, targets: Sequence[str], profile: Profile, max_rank: int = MAX_RANK) -> ExportedBase:
    """Export ``base`` with a slot at each linear layer whose name ends in one of ``targets``; takes some seconds.

    Args:
        base: A causal language model.
        targets: As peft's ``target_modules``: names of layers, such as ``("q_proj", "v_proj")``.
        profile: How weights are stored.
        max_rank: What the card allows an adapter.

    Raises:
        ConfigError: The base cannot be exported, no layer bears one of the names, or a layer's place in the graph
            cannot be found.
    """
    model = pretrained.load(base, AutoModelForCausalLM)
    weights = _weights(model, targets)
    sample = ask(model, pretrained.tokenizer(base))
    config = model.config
    del model  # each road loads it again, and only the layers' weights are needed until the end
    built = _built(base, config, sample)
    products = slots.find(built.graph, weights)
    ids = Tokenizer.from_str(built.files[TOKENIZER].decode()).encode(TEXT).ids[:TOKENS]
    graph = quantize(built.graph, profile, ids)
    found = slots.insert(graph, products)
    merge(graph)
    return ExportedBase(
        base_digest=base.digest,
        task="text-generation",
        profile=profile,
        # What an adapter scales its layers by stands in its own plan; 1 is the factor of one that is ready to be used.
        plan=AdapterInputs("default", tuple(LoraSlot(path, 1.0) for path in weights), ()),
        slots=found,
        max_rank=max_rank,
        files=headers.split(graph, found) | built.files,
    )


def _built(base: Base, config: Any, sample: Sample) -> builder.Built:
    """By the fast road where it leads to the right answers, else by the general one."""
    try:
        return builder.build(base, config, sample)
    except builder.NoFastRoadError:
        return traced.build(base, sample)


def _weights(model: Any, targets: Sequence[str]) -> Tensors:
    """The weights of the layers that get slots, by path, in the order of the module tree."""
    found = {}
    for target in targets:
        layers = [path for path, _ in model.named_modules() if path == target or path.endswith(f".{target}")]
        if not layers:
            raise ConfigError(f"the base has no layer named {target!r}; it has {pretrained.layer_names(model)}")
        found.update({path: model.get_submodule(path) for path in layers})
    for path, module in found.items():
        if type(module) not in (nn.Linear, Conv1D):
            raise ConfigError(f"{path}: an adapter on {type(module).__name__} cannot be exported, only on Linear")
    return {path: _weight(m) for path, m in model.named_modules() if path in found}


def _weight(layer: nn.Module) -> Floats:
    """Of shape ``(out, in)``."""
    weight: Floats = layer.weight.detach().numpy()  # type: ignore[operator]
    return weight.T if type(layer) is Conv1D else weight
