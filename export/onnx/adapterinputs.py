"""What of a PEFT model becomes graph input: its LoRA layers and the modules trained whole.

Found by walking the module tree, never by the names of an architecture. Whatever peft can put there and the graph
cannot say (DoRA, biases, other methods, merged weights) is refused by name, because dropping it would only show as
worse answers on a device.
"""

from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters.layout import TensorSpec
from adapters.ondevice import graph_name
from aggregation.errors import ConfigError
from export.onnx.slots import AdapterInputs, LoraSlot, SavedSlot, plan_of

__all__ = ["AdapterInputs", "LoraSlot", "SavedSlot", "plan", "plan_of"]


def plan(model: PeftModel) -> AdapterInputs:
    """Find the slots of ``model``'s active adapter; honours ``rank_pattern`` and ``alpha_pattern`` layer by layer.

    Raises:
        ConfigError: Several adapters are active, a layer uses what a graph cannot take, or a saved tensor has no slot.
    """
    if len(active := model.active_adapters) != 1:
        raise ConfigError(f"exactly one adapter can be exported at a time, {len(active)} are active")
    adapter = active[0]
    loras, saved = [], []
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            loras.append(_lora(path, module, adapter))
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            saved.append(_saved(path, module.modules_to_save[adapter]))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            raise ConfigError(f"{path}: {type(module).__name__} cannot be exported; train it in modules_to_save")
    found = AdapterInputs(adapter, tuple(loras), tuple(saved))
    _check_complete(found, model)
    return found


def _lora(path: str, layer: Any, adapter: str) -> LoraSlot:
    if type(layer) is not LoraLinear or type(layer.get_base_layer()) not in (nn.Linear, Conv1D):
        raise ConfigError(f"{path}: an adapter on {_kind(layer)} cannot be exported, only LoRA on a linear layer")
    if adapter not in layer.lora_A:
        raise ConfigError(f"{path}: the adapter {adapter!r} has no weights in this layer")
    if variant := layer.lora_variant.get(adapter):
        raise ConfigError(f"{path}: {type(variant).__name__.removesuffix('LinearVariant')} cannot be exported")
    if layer.lora_bias[adapter]:
        raise ConfigError(f"{path}: LoRA with a bias (lora_bias) cannot be exported")
    if layer.merged or layer.disable_adapters:
        raise ConfigError(f"{path}: the adapter is merged or disabled; unmerge and enable it before the export")
    return LoraSlot(path, float(layer.scaling[adapter]))


def _kind(layer: Any) -> str:
    within = type(layer.get_base_layer()).__name__ if isinstance(layer, LoraLayer) else "a layer"
    return f"{within} through peft's {type(layer).__module__.rpartition('peft.tuners.')[2]}.{type(layer).__name__}"


def _saved(path: str, module: nn.Module) -> SavedSlot:
    if buffers := [name for name, _ in module.named_buffers()]:
        raise ConfigError(f"{path}: trained whole and with a buffer ({buffers[0]!r}), which no adapter can carry")
    return SavedSlot(path, tuple(TensorSpec(name, tuple(p.shape)) for name, p in module.named_parameters()))


def _check_complete(found: AdapterInputs, model: PeftModel) -> None:
    state = {graph_name(name) for name in get_peft_model_state_dict(model, adapter_name=found.adapter)}
    if odd := sorted(state.symmetric_difference(found.inputs)):
        raise ConfigError(f"tensor {odd[0]!r} of the adapter has no place in a graph and cannot be exported")
