"""The trainable view of a frozen causal language model: an adapter of one of peft's methods, nothing else. ``tensors``
and ``load`` are those of a classifier."""

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

from aggregation.errors import ConfigError
from edgeadapt.bases import pretrained
from edgeadapt.bases.base import Base
from edgeadapt.formats.graphinputs import PEFT_PREFIX
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.trainable import adapted, initial, load, tensors

__all__ = ["LORA", "build", "initial", "load", "require_private", "tensors"]

LORA = PeftConfig.lora(targets=("q_proj", "v_proj"))


def build(base: Base, config: PeftConfig = LORA) -> PeftModel:
    """Build the base with a fresh adapter, in evaluation mode: every parameter frozen but the adapter's. Raises
    ConfigError: the base is not a causal language model, or as ``trainable.adapted``."""
    return adapted(pretrained.load(base, AutoModelForCausalLM), config, task="CAUSAL_LM")


def require_private(model: PeftModel) -> None:
    """Check that no layer that the adapter changes has a row for each token. Raises ConfigError. The gradient at the
    output layer (of LoRA's B, a scale or a bias) has another sign for the tokens of the examples than for all others,
    so that a sum would name them, as it would at the embedding."""
    output = model.get_base_model().get_output_embeddings()
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (layer is output or layer.get_base_layer() is output):
            name = path.removeprefix(PEFT_PREFIX)
            reason = f"target_modules name {name}, which has a row for each token: an adapter of it would show which "
            reason += "tokens the examples have; name other layers"
            raise ConfigError(reason, about="target_modules")
    if output is not None and any(value.requires_grad for value in output.parameters()):
        raise ConfigError(
            "bias is 'all', and the base's output layer has a bias with a number for each token: it would show which "
            "tokens the examples have; choose lora_only",
            about="bias",
        )
