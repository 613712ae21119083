"""The frozen base as one ONNX graph whose adapter is an input.

Each adapted layer computes ``base(x) + (x @ A) @ B`` with A and B from the graph's inputs, the rank being a dimension
of the layer's own; modules trained whole read their parameters from inputs too. Nothing of an adapter is in the file.
Quantization is a step of its own (``quantize.py``), between ``trace`` and
``headers.split``, never after the latter, whose defaults a quantizer would take for weights.
"""

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

import onnx
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.export import Dim

from adapters.ondevice import LORA_A, LORA_B
from aggregation.errors import ConfigError
from export.products import replace_conv1d
from export.slots import LABELS, Plan, SavedSlot

OPSET = 20
TOKENS = ("input_ids", "attention_mask")
ANSWER = "logits"
MAX_REASON = 200  # letters of what torch says
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
        logits: Tensor = self.inner(input_ids=input_ids, attention_mask=attention_mask)
        return logits


def trace(model: PeftModel, found: Plan) -> onnx.ModelProto:
    """Export ``model`` in float32: ``input_ids``, ``attention_mask`` (batch, sequence) and the slots → ``logits``.

    The result names no file or line of the machine that made it, and equal models give equal graphs.

    Raises:
        ConfigError: torch cannot trace the model.
    """
    example, dynamic = _slots(model, found)
    batch, sequence = Dim("batch"), Dim("sequence")
    tokens = {name: torch.ones(2, 3, dtype=torch.int64) for name in TOKENS}
    shapes = {name: {0: batch, 1: sequence} for name in TOKENS}
    return export(
        _with_inputs(model, found),
        {**tokens, "adapter": example},
        {**shapes, "adapter": dynamic},
        inputs=[*TOKENS, *example],
        outputs=[ANSWER],
    )


def export(
    module: nn.Module,
    example: dict[str, Any],
    dynamic: dict[str, Any],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> onnx.ModelProto:
    """Trace ``module`` with the keywords ``example``, whose free dimensions ``dynamic`` tells in the same structure.

    Args:
        module: In evaluation mode.
        example: Tensors, or lists and dictionaries of them.
        dynamic: In the place of each tensor its free dimensions.
        inputs: The names of all tensors of ``example``, in order.
        outputs: The names of what the module returns.

    Raises:
        ConfigError: torch cannot trace it.
    """
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module,
                (),
                kwargs=example,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        cause = error.__cause__ or error
        reason = " ".join(str(cause).split())
        raise ConfigError(f"torch cannot export this model: {reason[:MAX_REASON]}") from error
    assert program is not None  # noqa: S101  # only the legacy exporter returns None
    return _anonymous(program.model_proto)


def slots(graph: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """The inputs that an adapter fills, with their dimensions as text: a number, or the name of a free one."""
    return {
        value.name: tuple(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim)
        for value in graph.graph.input
        if value.name not in TOKENS
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports its progress, and that torchvision is absent, to whoever runs it; neither concerns them."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _with_inputs(model: PeftModel, found: Plan) -> nn.Module:
    inner, values = copy.deepcopy(model.base_model.model).eval(), _Values()
    for lora in found.loras:
        _replace(inner, lora.path, _LoraInput(inner.get_submodule(lora.path).get_base_layer(), lora.path, values))
    for saved in found.saved:
        module = inner.get_submodule(saved.path).modules_to_save[found.adapter]
        head = _gives_the_answer(model, found, saved)
        slot = _HeadInput(saved.path, module.bias is not None, values) if head else None
        _replace(inner, saved.path, slot or _SavedInput(module, saved.path, values))
    replace_conv1d(inner)
    return _Graph(inner, values)


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


def _slots(model: PeftModel, found: Plan) -> tuple[dict[str, Tensor], dict[str, dict[int, Dim]]]:
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
        free = _gives_the_answer(model, found, saved)
        for spec in saved.parameters:
            name = f"{saved.path}.{spec.name}"
            # Two rows at least, for the same reason as EXAMPLE_RANK; a model with one label is refused earlier.
            example[name] = torch.ones(spec.shape)
            dynamic[name] = {0: labels} if free else {}
    return example, dynamic


def _gives_the_answer(model: PeftModel, found: Plan, saved: SavedSlot) -> bool:
    """Whether this module is the linear layer whose output is the model's: then its rows are labels, of any number."""
    module = model.base_model.model.get_submodule(saved.path).modules_to_save[found.adapter]
    if type(module) is not nn.Linear:
        return False
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _module, _args, output: seen.append(output))
    try:
        with torch.no_grad():
            answer = model.base_model.model(**{name: torch.ones(1, 2, dtype=torch.int64) for name in TOKENS})
    finally:
        hook.remove()
    return bool(seen) and seen[-1] is answer and answer.ndim == 2


def _anonymous(graph: onnx.ModelProto) -> onnx.ModelProto:
    # The exporter notes the Python stack of every node: paths of this machine, and another file on every machine.
    inner = graph.graph
    for item in (graph, inner, *inner.node, *inner.input, *inner.output, *inner.value_info, *inner.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    _tell_ranks(inner)
    return graph


def _tell_ranks(graph: onnx.GraphProto) -> None:
    """Of all shapes keep the number of dimensions of what layers read, where it is not the usual three."""
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    read = {node.input[0] for node in products if node.input[1] in weights}
    kept = [v for v in graph.value_info if v.name in read and len(v.type.tensor_type.shape.dim) != 3]
    told = [(v.name, v.type.tensor_type.elem_type, [None] * len(v.type.tensor_type.shape.dim)) for v in kept]
    del graph.value_info[:]
    graph.value_info.extend(onnx.helper.make_tensor_value_info(*parts) for parts in told)
