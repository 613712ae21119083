"""The trainable view of a frozen causal language model: LoRA through peft on chosen projections, nothing else.

``tensors`` and ``load`` are those of a classifier.
"""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from adapters import pretrained
from adapters.base import Base
from adapters.classifier import LoraSpec, load, tensors
from aggregation.errors import ConfigError

__all__ = ["LORA", "build", "load", "tensors"]

LORA = LoraSpec(targets=("q_proj", "v_proj"))


def build(base: Base, lora: LoraSpec = LORA) -> PeftModel:
    """The base with a fresh adapter, in evaluation mode: every parameter frozen but LoRA's.

    Raises:
        ConfigError: The base is no causal language model, or no module of it has a target's name.
    """
    model = pretrained.load(base, AutoModelForCausalLM)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config).eval()
    except ValueError as error:
        names = pretrained.layer_names(model)
        raise ConfigError(
            f"the base has no module named as in {list(lora.targets)}; it has {names}", about="target_modules"
        ) from error
