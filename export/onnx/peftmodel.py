"""A PEFT model as a module whose adapter is an argument of its forward pass, ready to be traced (``graph.trace``).

``find_adapter_inputs`` walks the module tree, independent of the architecture's names. What peft can attach to a model
and a graph cannot express (DoRA, biases, methods other than LoRA, merged weights) is refused by name, because leaving
it out would only show as worse answers on a device.

Each adapted layer computes ``base(x) + (x @ A) @ B`` with A and B from the arguments and a rank dimension of its own.
Modules in ``modules_to_save`` read their parameters from arguments too.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.export import Dim
from transformers.pytorch_utils import Conv1D

from adapters.graphinputs import LORA_A, LORA_B, input_name
from adapters.layout import TensorSpec
from adapters.peft.inputs import LABELS, AdapterInputs, LoraSlot, SavedSlot
from adapters.pretrained import is_linear
from aggregation.errors import ConfigError

TOKENS = ("input_ids", "attention_mask")
EXAMPLE_RANK = 2  # torch.export treats a size of 0 or 1 as a constant


def find_adapter_inputs(model: PeftModel) -> AdapterInputs:
    """The inputs of ``model``'s active adapter, with the scaling of each layer under its rank and alpha patterns.

    Raises:
        ConfigError: Several adapters are active, a layer has what a graph cannot express, or a tensor of the adapter
            belongs to no slot.
    """
    if len(active := model.active_adapters) != 1:
        raise ConfigError(
            f"exactly one adapter can be exported at a time, {len(active)} are active",
            about="active_adapters",
            value=len(active),
        )
    adapter = active[0]
    loras, saved = [], []
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            loras.append(_lora(path, module, adapter))
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            saved.append(_saved(path, module.modules_to_save[adapter]))
        elif isinstance(module, AuxiliaryTrainingWrapper):
            kind = type(module).__name__
            raise ConfigError(f"{path}: {kind} cannot be exported; train it in modules_to_save", about=kind, value=path)
    inputs = AdapterInputs(adapter, tuple(loras), tuple(saved))
    _check_complete(inputs, model)
    return inputs


def _lora(path: str, layer: Any, adapter: str) -> LoraSlot:
    if type(layer) is not LoraLinear or not is_linear(layer.get_base_layer()):
        within = type(layer.get_base_layer()).__name__ if isinstance(layer, LoraLayer) else "a layer"
        module = type(layer).__module__.rpartition("peft.tuners.")[2]
        raise ConfigError(
            f"{path}: an adapter on {within} through peft's {module}.{type(layer).__name__} cannot be exported, only "
            "LoRA on a linear layer",
            about=within if isinstance(layer, LoraLayer) else module,
            value=path,
        )
    if adapter not in layer.lora_A:
        raise ConfigError(f"{path}: the adapter {adapter!r} has no weights in this layer", about="lora_A", value=path)
    if variant := layer.lora_variant.get(adapter):
        name = type(variant).__name__.removesuffix("LinearVariant")
        raise ConfigError(f"{path}: {name} cannot be exported", about=name, value=path)
    if layer.lora_bias[adapter]:
        raise ConfigError(f"{path}: LoRA with a bias (lora_bias) cannot be exported", about="lora_bias", value=path)
    if layer.merged or layer.disable_adapters:
        raise ConfigError(
            f"{path}: the adapter is merged or disabled; unmerge and enable it before the export",
            about="merged",
            value=path,
        )
    return LoraSlot(path, float(layer.scaling[adapter]))


def _saved(path: str, module: nn.Module) -> SavedSlot:
    if buffers := [name for name, _ in module.named_buffers()]:
        raise ConfigError(
            f"{path}: a module in modules_to_save with a buffer ({buffers[0]!r}) cannot be exported: no adapter holds "
            "buffers",
            about="modules_to_save",
            value=path,
        )
    return SavedSlot(path, tuple(TensorSpec(name, tuple(p.shape)) for name, p in module.named_parameters()))


def _check_complete(inputs: AdapterInputs, model: PeftModel) -> None:
    state = {input_name(name) for name in get_peft_model_state_dict(model, adapter_name=inputs.adapter)}
    if odd := sorted(state.symmetric_difference(inputs.names)):
        raise ConfigError(
            f"tensor {odd[0]!r} of the adapter belongs to no slot of a graph and cannot be exported", about=odd[0]
        )


class _Values:
    """The slots' tensors during one forward pass. Neither module nor container, so that tracing looks through it."""

    def __init__(self) -> None:
        self.now: dict[str, Tensor] = {}


class _LoraInput(nn.Module):
    def __init__(self, base: nn.Module, path: str, values: _Values) -> None:
        super().__init__()
        self.base, self.path, self.values = base, path, values

    def forward(self, x: Tensor) -> Tensor:
        now = self.values.now
        rows = x.unsqueeze(1) if x.ndim == 2 else x  # A and B may have a leading dimension for the rows of a batch
        update: Tensor = (rows @ now[self.path + LORA_A]) @ now[self.path + LORA_B]
        result: Tensor = self.base(x) + (update.squeeze(1) if x.ndim == 2 else update)
        return result


class _SavedInput(nn.Module):
    def __init__(self, module: nn.Module, path: str, values: _Values) -> None:
        super().__init__()
        self.module, self.path, self.values = module, path, values

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        names = [name for name, _ in self.module.named_parameters()]
        parameters = {name: self.values.now[f"{self.path}.{name}"] for name in names}
        return torch.func.functional_call(self.module, parameters, args, kwargs)


class _HeadInput(nn.Module):
    """The linear layer that returns the logits. Its weight may have a leading dimension for the rows of a batch."""

    def __init__(self, path: str, bias: bool, values: _Values) -> None:
        super().__init__()
        self.path, self.bias, self.values = path, bias, values

    def forward(self, x: Tensor) -> Tensor:
        now = self.values.now
        logits: Tensor = (now[self.path + ".weight"] @ x.unsqueeze(-1)).squeeze(-1)
        return logits + now[self.path + ".bias"] if self.bias else logits


class _WithInputs(nn.Module):
    def __init__(self, inner: nn.Module, values: _Values) -> None:
        super().__init__()
        self.inner, self.values = inner, values

    def forward(self, input_ids: Tensor, attention_mask: Tensor, adapter: dict[str, Tensor]) -> Tensor:
        self.values.now = adapter
        return logits_of(self.inner(input_ids=input_ids, attention_mask=attention_mask))


def logits_of(answer: Any) -> Tensor:
    """The logits in what a model returns: the tensor itself, or the field of a transformers output."""
    logits: Tensor = getattr(answer, "logits", answer)
    return logits


def with_inputs(model: PeftModel, inputs: AdapterInputs) -> nn.Module:
    """A copy of ``model`` that takes ``input_ids``, ``attention_mask`` and ``adapter``, the slots' tensors by name."""
    inner, values = copy.deepcopy(model.base_model.model).eval(), _Values()
    for lora in inputs.loras:
        _replace(inner, lora.path, _LoraInput(inner.get_submodule(lora.path).get_base_layer(), lora.path, values))
    for saved in inputs.saved:
        _replace(inner, saved.path, _saved_input(model, inputs, saved, values))
    replace_conv1d(inner)
    return _WithInputs(inner, values)


def examples(model: PeftModel, inputs: AdapterInputs) -> tuple[dict[str, Tensor], dict[str, dict[int, Dim]]]:
    """Example tensors and dynamic dimensions of every slot, by name, for ``torch.export``."""
    example: dict[str, Tensor] = {}
    dynamic: dict[str, dict[int, Dim]] = {}
    for number, lora in enumerate(inputs.loras):
        layer, rank = model.base_model.model.get_submodule(lora.path), Dim(f"rank_{number}")
        example[lora.path + LORA_A] = torch.ones(layer.in_features, EXAMPLE_RANK)
        example[lora.path + LORA_B] = torch.ones(EXAMPLE_RANK, layer.out_features)
        dynamic[lora.path + LORA_A], dynamic[lora.path + LORA_B] = {1: rank}, {0: rank}
    labels = Dim(LABELS)
    for saved in inputs.saved:
        head = _head(model, inputs, saved)
        for spec in saved.parameters:
            name = f"{saved.path}.{spec.name}"
            # At least two rows, for the reason of EXAMPLE_RANK; a model with one label is refused earlier.
            example[name] = torch.ones(spec.shape)
            dynamic[name] = {0: labels} if spec.name.rpartition(".")[0] == head else {}
    return example, dynamic


def replace_conv1d(root: nn.Module) -> None:
    """Replace each Conv1D, GPT-2's linear layer with a transposed weight, by an equal Linear, in place."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Conv1D:
                setattr(parent, name, as_linear(child))


def as_linear(layer: Conv1D) -> nn.Linear:
    """The Linear that computes what ``layer`` does. Shares the bias and copies the weight."""
    width, out = layer.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(width, out)
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear


def _saved_input(model: PeftModel, inputs: AdapterInputs, saved: SavedSlot, values: _Values) -> nn.Module:
    module, head = copy.deepcopy(_saved_module(model, inputs, saved)), _head(model, inputs, saved)
    if head is None:
        return _SavedInput(module, saved.path, values)
    bias = module.get_submodule(head).bias is not None
    if not head:
        return _HeadInput(saved.path, bias, values)
    _replace(module, head, _HeadInput(f"{saved.path}.{head}", bias, values))
    return _SavedInput(module, saved.path, values)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _head(model: PeftModel, inputs: AdapterInputs, saved: SavedSlot) -> str | None:
    """The path, within a module of ``modules_to_save``, of the linear layer that returns the logits; "" is the module.

    Its rows are labels, any number of them.
    """
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.append((name, output))

    parts = _saved_module(model, inputs, saved).named_modules()
    hooks = [part.register_forward_hook(record(name)) for name, part in parts if type(part) is nn.Linear]
    try:
        with torch.no_grad():
            tokens = {name: torch.ones(1, 2, dtype=torch.int64) for name in TOKENS}
            answer = logits_of(model.base_model.model(**tokens))
    except Exception as error:  # whatever the code of a model raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ConfigError(
            f"{type(model.base_model.model).__name__} cannot be exported: it does not read two tokens ({reason})",
            about="model_type",
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, output in outputs if output is answer), None) if answer.ndim == 2 else None


def _saved_module(model: PeftModel, inputs: AdapterInputs, saved: SavedSlot) -> nn.Module:
    module: nn.Module = model.base_model.model.get_submodule(saved.path).modules_to_save[inputs.adapter]
    return module
