"""A base as a module whose adapter is an argument of its forward pass, ready to be traced (``graph.trace``). Each
adapted layer computes what ``edgeadapt.formats.graphinputs`` states, with slots from the arguments and a rank dimension
of its own. Modules in ``modules_to_save`` read their parameters from arguments too."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers.pytorch_utils import Conv1D

from aggregation.errors import ConfigError, one_line
from edgeadapt.bases.mediaencoder import numbers_of
from edgeadapt.formats.graphinputs import (
    ACTIVATIONS,
    INPUT_SCALE,
    LORA_A,
    LORA_B,
    OFFSET,
    OUTPUT_SCALE,
    PROMPT,
    REPLACED,
    UP_BIAS,
    VIRTUAL,
    dimensions_of,
    layer_of,
    vector_site,
)
from edgeadapt.formats.layout import Floats, TensorSpec
from edgeadapt.methods.bottleneck import adds_before, change
from edgeadapt.methods.peft.inputs import LABELS, AdapterInputs, SavedSlot

TOKENS = ("input_ids", "attention_mask")
EXAMPLE_RANK = 2  # torch.export treats a size of 0 or 1 as a constant


class _Values:
    """Hold the slots' tensors during one forward pass; neither module nor container, so that tracing sees them."""

    def __init__(self) -> None:
        self.now: dict[str, Tensor] = {}


class LayerInput(nn.Module):
    """A layer with the slots of ``edgeadapt.formats.graphinputs``, of which it has some. To be traced."""

    def __init__(self, base: nn.Module, path: str, names: set[str], values: _Values) -> None:
        super().__init__()
        self.base, self.path, self.values = base, path, values
        self.kinds = {name.removeprefix(path) for name in names}
        self.bottlenecks = [method for method in ACTIVATIONS if f".{method}_down" in self.kinds]
        self.before = adds_before(base.module if isinstance(base, ReplacedInput) else base)

    def forward(self, x: Tensor) -> Tensor:
        if self.before:
            changed: Tensor = self.base(x + self._added(self.base(x)))
            return changed
        # Every slot may have a leading dimension for the rows of a batch; between them and the width, x has the tokens.
        flat = x.ndim == 2
        rows = x.unsqueeze(1) if flat else x
        read = rows * self._vector(INPUT_SCALE, 1.0) if INPUT_SCALE in self.kinds else rows
        result: Tensor = self.base(x if read is rows else read.squeeze(1) if flat else read)
        plain = result
        if OUTPUT_SCALE in self.kinds:
            scaled = (result.unsqueeze(1) if flat else result) * self._vector(OUTPUT_SCALE, 1.0)
            result = scaled.squeeze(1) if flat else scaled
        if LORA_A in self.kinds:
            update = (rows @ self._now(LORA_A)) @ self._now(LORA_B)
            result = result + (update.squeeze(1) if flat else update)
        if OFFSET in self.kinds:
            moved = (result.unsqueeze(1) if flat else result) + self._vector(OFFSET, 0.0)
            result = moved.squeeze(1) if flat else moved
        return result + self._added(plain) if self.bottlenecks else result

    def _added(self, y: Tensor) -> Tensor:
        flat = y.ndim == 2
        rows = y.unsqueeze(1) if flat else y
        added = reduce(torch.add, (change(method, rows, partial(self._part, method)) for method in self.bottlenecks))
        return added.squeeze(1) if flat else added

    def _part(self, method: str, part: str) -> Tensor:
        kind = f".{method}_{part}"
        return self._vector(kind, 0.0) if kind in UP_BIAS else self._now(kind)

    def _now(self, kind: str) -> Tensor:
        return self.values.now[self.path + kind]

    def _vector(self, kind: str, neutral: float) -> Tensor:
        """Read the first row of what an adapter gives, or else ``neutral``, in the rank of what is given. Products and
        sums over no row would do, but onnxruntime-web 1.30 takes them for no result."""
        value = self._now(kind)
        if not torch.compiler.is_exporting():  # torch computes no symbolic operator
            return torch.cat([value, torch.full((1, value.shape[1]), neutral)])[:1]
        (rows, width), operator = value.shape, torch.onnx.ops.symbolic
        padding = (torch.tensor([0, 1]), torch.tensor(neutral), torch.tensor([-2]))  # a row at the end
        both = operator("Pad", (value, *padding), dtype=value.dtype, shape=(rows + 1, width))
        return operator("Gather", (both, torch.tensor([0])), {"axis": -2}, dtype=value.dtype, shape=(1, width))


class ReplacedInput(nn.Module):
    """A module some of whose vectors an adapter may replace: the first row of what it gives and of the base's own."""

    def __init__(self, module: nn.Module, path: str, names: set[str], values: _Values) -> None:
        super().__init__()
        self.module, self.path, self.values = module, path, values
        self.names = sorted(name.removeprefix(f"{path}.").removesuffix(REPLACED) for name in names)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own = {name: self.module.get_parameter(name)[None] for name in self.names}
        brought = {name: self.values.now[f"{self.path}.{name}{REPLACED}"] for name in self.names}
        chosen = {name: torch.cat([brought[name], own[name]])[0] for name in self.names}
        return torch.func.functional_call(self.module, chosen, args, kwargs)


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
        if PROMPT not in adapter:
            return logits_of(self.inner(input_ids=input_ids, attention_mask=attention_mask))
        model: Any = self.inner
        tokens = model.get_input_embeddings()(input_ids)
        prompt = adapter[PROMPT].expand(tokens.shape[0], -1, -1)
        mask = torch.cat([torch.ones_like(prompt[..., 0], dtype=attention_mask.dtype), attention_mask], 1)
        return logits_of(self.inner(inputs_embeds=torch.cat([prompt, tokens], 1), attention_mask=mask))


def logits_of(answer: Any) -> Tensor:
    """Find the logits in what a model returns: the tensor itself, or the field of a transformers output."""
    logits: Tensor = getattr(answer, "logits", answer)
    return logits


@dataclass(frozen=True, slots=True)
class SlottedModel:
    """A base in torch, and the slots that its graph gets. ``model`` holds no adapter's tensors but a head's."""

    model: nn.Module
    inputs: AdapterInputs
    cut: bool = False  # whether devices train from the states of the layers below all slots


def with_inputs(slotted: SlottedModel) -> nn.Module:
    """Wrap the model so that it takes ``input_ids``, ``attention_mask`` and ``adapter``, the slots' tensors by name. It
    shares the parameters of the model."""
    shared: dict[int, Any] = {id(parameter): parameter for parameter in slotted.model.parameters()}
    inner, values, inputs = copy.deepcopy(slotted.model, shared).eval(), _Values(), slotted.inputs
    for path, names in _grouped(inputs, replaced=True).items():
        replace_module(inner, path, ReplacedInput(inner.get_submodule(path), path, names, values))
    for path, names in _grouped(inputs, replaced=False).items():
        replace_module(inner, path, LayerInput(inner.get_submodule(path), path, names, values))
    for saved in inputs.saved:
        replace_module(inner, saved.path, _saved_input(slotted, saved, values))
    replace_conv1d(inner)
    return _WithInputs(inner, values)


def _grouped(inputs: AdapterInputs, *, replaced: bool) -> dict[str, set[str]]:
    groups: dict[str, set[str]] = {}
    for name in (*inputs.vectors, *(slot.path + part for slot in inputs.loras for part in (LORA_A, LORA_B))):
        if name.endswith(REPLACED) == replaced:
            groups.setdefault(layer_of(name), set()).add(name)
    return groups


def examples(slotted: SlottedModel) -> tuple[dict[str, Tensor], dict[str, dict[int, Dim]]]:
    """Make example tensors and dynamic dimensions of every slot, by name, for ``torch.export``."""
    example: dict[str, Tensor] = {}
    dynamic: dict[str, dict[int, Dim]] = {}
    for number, lora in enumerate(slotted.inputs.loras):
        (out, width), rank = weight_shape(slotted.model.get_submodule(lora.path)), Dim(f"rank_{number}")
        example[lora.path + LORA_A] = torch.ones(width, EXAMPLE_RANK)
        example[lora.path + LORA_B] = torch.ones(EXAMPLE_RANK, out)
        dynamic[lora.path + LORA_A], dynamic[lora.path + LORA_B] = {1: rank}, {0: rank}
    ranks: dict[str, Dim] = {}
    for number, name in enumerate(slotted.inputs.vectors):
        texts = dimensions_of(name, number, vector_width(slotted.model, name))
        example[name] = torch.ones([int(text) if text.isdigit() else EXAMPLE_RANK for text in texts])
        dynamic[name] = {i: ranks.setdefault(text, Dim(text)) for i, text in enumerate(texts) if not text.isdigit()}
    if PROMPT in slotted.inputs.virtual:
        # One row, which every row of a batch reads; virtualtokens.accept_rows makes it any number.
        model: Any = slotted.model
        example[PROMPT] = torch.ones(1, EXAMPLE_RANK, model.get_input_embeddings().weight.shape[1])
        dynamic[PROMPT] = {1: Dim(VIRTUAL[PROMPT])}
    labels = Dim(LABELS)
    for saved in slotted.inputs.saved:
        head = _head(slotted.model, saved)
        for spec in saved.parameters:
            name = f"{saved.path}.{spec.name}"
            # At least two rows, for the reason of EXAMPLE_RANK; a model with one label is refused earlier.
            example[name] = torch.ones(spec.shape)
            dynamic[name] = {0: labels} if spec.name.rpartition(".")[0] == head else {}
    return example, dynamic


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs, inputs."""
    first, second = layer.get_parameter("weight").shape
    return (int(second), int(first)) if type(layer) is Conv1D else (int(first), int(second))


def layer_weight(layer: nn.Module) -> Floats:
    weight: Floats = layer.get_parameter("weight").detach().numpy()
    return weight.T if type(layer) is Conv1D else weight


def vector_width(model: nn.Module, name: str) -> int:
    """Count the numbers of the vector ``name``, one of ``AdapterInputs.vectors``."""
    if name.endswith(REPLACED):
        return model.get_parameter(vector_site(name)).numel()
    layer = model.get_submodule(vector_site(name))
    if adds_before(layer):
        return layer.get_parameter("weight").numel()
    out, width = weight_shape(layer)
    return width if name.endswith(INPUT_SCALE) else out


def replace_conv1d(root: nn.Module) -> None:
    """Replace each Conv1D, GPT-2's linear layer with a transposed weight, by an equal Linear, in place."""
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Conv1D:
                setattr(parent, name, as_linear(child))


def as_linear(layer: Conv1D) -> nn.Linear:
    """Share the bias and copy the weight."""
    width, out = layer.weight.shape
    with torch.device("meta"):
        linear = nn.Linear(width, out)
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
    linear.bias = layer.bias
    return linear


def saved_slot(path: str, module: nn.Module) -> SavedSlot:
    """Describe the slot of a module in ``modules_to_save``. Raises ConfigError for a buffer, which no adapter holds."""
    if buffers := [name for name, _ in module.named_buffers()]:
        raise ConfigError(
            f"{path}: a module in modules_to_save with a buffer ({buffers[0]!r}) cannot be exported: no adapter holds "
            "buffers",
            about="modules_to_save",
        )
    return SavedSlot(path, tuple(TensorSpec(name, tuple(p.shape)) for name, p in module.named_parameters()))


def _saved_input(slotted: SlottedModel, saved: SavedSlot, values: _Values) -> nn.Module:
    module, head = copy.deepcopy(slotted.model.get_submodule(saved.path)), _head(slotted.model, saved)
    if head is None:
        return _SavedInput(module, saved.path, values)
    bias = module.get_submodule(head).bias is not None
    if not head:
        return _HeadInput(saved.path, bias, values)
    replace_module(module, head, _HeadInput(f"{saved.path}.{head}", bias, values))
    return _SavedInput(module, saved.path, values)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _head(model: nn.Module, saved: SavedSlot) -> str | None:
    """Find the linear layer that returns the logits: its path in a module of ``modules_to_save``, "" for the module.
    Its rows are labels, any number of them."""
    outputs: list[tuple[str, Tensor]] = []

    def record(name: str) -> Callable[..., None]:
        return lambda _module, _args, output: outputs.append((name, output))

    parts = model.get_submodule(saved.path).named_modules()
    hooks = [part.register_forward_hook(record(name)) for name, part in parts if type(part) is nn.Linear]
    try:
        with torch.no_grad():
            tokens = {name: torch.ones(1, numbers_of(model) or 2, dtype=torch.int64) for name in TOKENS}
            answer = logits_of(model(**tokens))
    except Exception as error:  # whatever the code of a model raises
        reason = one_line(error)
        raise ConfigError(
            f"{type(model).__name__} cannot be exported: it does not read two tokens ({reason})", about="model_type"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return next((name for name, output in outputs if output is answer), None) if answer.ndim == 2 else None
