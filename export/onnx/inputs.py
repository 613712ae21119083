"""A model whose adapter is an argument of its forward pass, to be traced by ``graph.py``.

Each adapted layer computes ``base(x) + (x @ A) @ B`` with A and B from the arguments, the rank being a dimension of the
layer's own; modules trained whole read their parameters from arguments too.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.export import Dim

from adapters.ondevice import LORA_A, LORA_B
from export.onnx.matmuls import replace_conv1d
from export.onnx.slots import LABELS, AdapterInputs, SavedSlot

TOKENS = ("input_ids", "attention_mask")
EXAMPLE_RANK = 2  # torch.export takes a size of 0 or 1 for a constant


class _Values:
    """What the slots read during one forward pass. No module and no container, so that tracing looks through it."""

    def __init__(self) -> None:
        self.now: dict[str, Tensor] = {}


class _LoraInput(nn.Module):
    def __init__(self, base: nn.Module, path: str, values: _Values) -> None:
        super().__init__()
        self.base, self.path, self.values = base, path, values

    def forward(self, x: Tensor) -> Tensor:
        now = self.values.now
        result: Tensor = self.base(x) + (x @ now[self.path + LORA_A]) @ now[self.path + LORA_B]
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
    """The linear layer that gives the answer. Its weight may also have a leading dimension for the rows of a batch."""

    def __init__(self, path: str, bias: bool, values: _Values) -> None:
        super().__init__()
        self.path, self.bias, self.values = path, bias, values

    def forward(self, x: Tensor) -> Tensor:
        now = self.values.now
        logits: Tensor = (now[self.path + ".weight"] @ x.unsqueeze(-1)).squeeze(-1)
        return logits + now[self.path + ".bias"] if self.bias else logits


class _Graph(nn.Module):
    def __init__(self, inner: nn.Module, values: _Values) -> None:
        super().__init__()
        self.inner, self.values = inner, values

    def forward(self, input_ids: Tensor, attention_mask: Tensor, adapter: dict[str, Tensor]) -> Tensor:
        self.values.now = adapter
        return logits_of(self.inner(input_ids=input_ids, attention_mask=attention_mask))


def logits_of(answer: Any) -> Tensor:
    """The logits in what a model returns: themselves, or a record of transformers that has them."""
    logits: Tensor = getattr(answer, "logits", answer)
    return logits


def with_inputs(model: PeftModel, found: AdapterInputs) -> nn.Module:
    """A copy of ``model`` that takes ``input_ids``, ``attention_mask`` and ``adapter``, the slots' tensors by name."""
    inner, values = copy.deepcopy(model.base_model.model).eval(), _Values()
    for lora in found.loras:
        _replace(inner, lora.path, _LoraInput(inner.get_submodule(lora.path).get_base_layer(), lora.path, values))
    for saved in found.saved:
        _replace(inner, saved.path, _saved_input(model, found, saved, values))
    replace_conv1d(inner)
    return _Graph(inner, values)


def _saved_input(model: PeftModel, found: AdapterInputs, saved: SavedSlot, values: _Values) -> nn.Module:
    module, head = copy.deepcopy(_saved(model, found, saved)), _head(model, found, saved)
    if head is None:
        return _SavedInput(module, saved.path, values)
    linear = module.get_submodule(head)
    slot = _HeadInput(_join(saved.path, head), linear.bias is not None, values)
    if not head:
        return slot
    _replace(module, head, slot)
    return _SavedInput(module, saved.path, values)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def examples(model: PeftModel, found: AdapterInputs) -> tuple[dict[str, Tensor], dict[str, dict[int, Dim]]]:
    """Example tensors and free dimensions of every slot."""
    example: dict[str, Tensor] = {}
    dynamic: dict[str, dict[int, Dim]] = {}
    for number, lora in enumerate(found.loras):
        layer, rank = model.base_model.model.get_submodule(lora.path), Dim(f"rank_{number}")
        example[lora.path + LORA_A] = torch.ones(layer.in_features, EXAMPLE_RANK)
        example[lora.path + LORA_B] = torch.ones(EXAMPLE_RANK, layer.out_features)
        dynamic[lora.path + LORA_A], dynamic[lora.path + LORA_B] = {1: rank}, {0: rank}
    labels = Dim(LABELS)
    for saved in found.saved:
        head = _head(model, found, saved)
        for spec in saved.parameters:
            name = f"{saved.path}.{spec.name}"
            # Two rows at least, for the same reason as EXAMPLE_RANK; a model with one label is refused earlier.
            example[name] = torch.ones(spec.shape)
            dynamic[name] = {0: labels} if spec.name.rpartition(".")[0] == head else {}
    return example, dynamic


def _head(model: PeftModel, found: AdapterInputs, saved: SavedSlot) -> str | None:
    """The place, within a module trained whole, of the linear layer whose output is the model's; "" is itself.

    Its rows are labels, of any number.
    """
    seen: list[tuple[str, Tensor]] = []

    def noting(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: seen.append((name, output))

    parts = _saved(model, found, saved).named_modules()
    hooks = [part.register_forward_hook(noting(name)) for name, part in parts if type(part) is nn.Linear]
    try:
        with torch.no_grad():
            tokens = {name: torch.ones(1, 2, dtype=torch.int64) for name in TOKENS}
            answer = logits_of(model.base_model.model(**tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, output in seen if output is answer), None) if answer.ndim == 2 else None


def _saved(model: PeftModel, found: AdapterInputs, saved: SavedSlot) -> nn.Module:
    module: nn.Module = model.base_model.model.get_submodule(saved.path).modules_to_save[found.adapter]
    return module


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
