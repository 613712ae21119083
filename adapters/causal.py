"""The trainable view of a frozen causal language model: LoRA through peft on chosen projections, nothing else.

``tensors`` and ``load`` are those of a classifier.
"""

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from adapters import pretrained
from adapters.base import Base
from adapters.classifier import LoraSpec, adapted, load, tensors
from adapters.graphinputs import PEFT_PREFIX
from adapters.layout import Tensors
from aggregation.errors import ConfigError

__all__ = ["LORA", "build", "load", "seeded", "tensors"]

LORA = LoraSpec(targets=("q_proj", "v_proj"))


def build(base: Base, lora: LoraSpec = LORA) -> PeftModel:
    """The base with a fresh adapter, in evaluation mode: every parameter frozen but LoRA's.

    Raises:
        ConfigError: The base is no causal language model, no module of it has a target's name, or one that has is not a
            linear layer.
    """
    return adapted(pretrained.load(base, AutoModelForCausalLM), lora, task_type="CAUSAL_LM")


def require_private(model: PeftModel) -> None:
    """Return if no layer on which the adapter has LoRA has a row for each token.

    The gradient of B at the output layer has another sign for the tokens of the examples than for all others, so that a
    sum would name them, as it would at the embedding.

    Raises:
        ConfigError: One has.
    """
    output = model.get_base_model().get_output_embeddings()
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and (layer is output or layer.get_base_layer() is output):
            name = path.removeprefix(PEFT_PREFIX)
            raise ConfigError(
                f"target_modules name {name}, which has a row for each token: LoRA on it would show which tokens the "
                "examples have; name other layers",
                about="target_modules",
            )


def seeded(model: PeftModel, generator: torch.Generator) -> Tensors:
    """The first adapter of a federation: LoRA that changes nothing (B = 0, A drawn as in its paper).

    Args:
        model: From ``build``.
        generator: Draws A; the same generator state gives the same adapter.
    """
    start = tensors(model)
    for name, value in start.items():
        bound = 1 / np.sqrt(value.shape[1])
        draw = torch.rand(value.shape, generator=generator, dtype=torch.float32)
        start[name] = ((2 * draw - 1) * bound).numpy() if ".lora_A." in name else np.zeros_like(value)
    return start
