"""A PEFT model as one ONNX graph of its frozen base, whose adapter is an input. ``peftmodel.py`` makes the adapter an
argument of the model; the graph contains nothing of the adapter. Quantization (``quantize.py``) comes between ``trace``
and ``headers.split``, whose empty defaults it would mistake for weights."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from accelerate.hooks import SequentialHook, remove_hook_from_module
from torch import Tensor, nn
from torch.export import Dim
from transformers.pytorch_utils import Conv1D

from aggregation.errors import ConfigError, one_line
from edgeadapt.bases.mediaencoder import numbers_of
from edgeadapt.bases.states import STATES
from edgeadapt.bases.traininggraph import POSITIONS
from edgeadapt.formats.graphinputs import PROMPT
from export.onnx.matmuls import USUAL_RANK
from export.onnx.peftmodel import TOKENS, SlottedModel, examples, with_inputs
from export.onnx.tensorstore import MEMORY, OnDisk, TensorStore
from export.onnx.virtualtokens import accept_rows

SMALL = 2**19  # numbers of a weight that is loaded; onnxscript folds constants of up to 2**18

Weights = Mapping[int, Callable[[], Tensor]]  # by the address of the hollow weight


def hollow(model: nn.Module) -> Weights:
    """Replace the weights that ``pretrained.load`` left on disk, in place: by themselves or, if large, by hollow ones.

    Tracing needs shapes and types, and values only to store them: a hollow weight is memory that the system never has
    to provide, because nothing is written to it. What the exporter computes while it traces (constant folding) it
    computes from small weights, which are there. Returns what reads the value of each hollow weight, in its memory's
    layout."""
    on_disk = [(module, dict(_on_disk(module))) for module in model.modules()]
    remove_hook_from_module(model, recurse=True)
    weights: dict[int, Callable[[], Tensor]] = {}
    for module, readers in on_disk:
        for name, read in readers.items():
            value: Tensor = module.get_parameter(name)
            if value.numel() <= SMALL:
                value = read()
            else:
                # Conv1D's weight in the layout of the Linear that replace_conv1d makes of it.
                flipped = type(module) is Conv1D and value.ndim == 2
                memory = torch.empty(value.T.shape if flipped else value.shape)
                weights[memory.data_ptr()] = _transposed(read) if flipped else read
                value = memory.T if flipped else memory
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    return weights


def _on_disk(module: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the own parameters of a module that are on disk, by name, and what reads each."""
    hook = getattr(module, "_hf_hook", None)
    for part in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
        if (source := getattr(part, "weights_map", None)) is not None:
            for name, value in module.named_parameters(recurse=False):
                if value.device.type == "meta":
                    yield name, _reader(source, name)


def _reader(source: Mapping[str, Any], name: str) -> Callable[[], Tensor]:
    return lambda: torch.as_tensor(source[name])


def _transposed(read: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: read().T.contiguous()


OPSET = 20
ANSWER = "logits"


def trace(slotted: SlottedModel) -> onnx.ModelProto:
    """Export ``slotted`` in float32: ``input_ids``, ``attention_mask`` (batch, sequence) and the slots → ``logits``.
    The result names no file or line of the machine that exports it, and equal models give equal graphs. Raises
    ConfigError: torch cannot trace the model."""
    example, dynamic = examples(slotted)
    batch, sequence = Dim("batch"), Dim("sequence")
    length = numbers_of(slotted.model)
    tokens = {name: torch.ones(2, length or 3, dtype=torch.int64) for name in TOKENS}
    shapes = {name: {0: batch} if length else {0: batch, 1: sequence} for name in TOKENS}
    traced = export(
        with_inputs(slotted),
        {**tokens, "adapter": example},
        {**shapes, "adapter": dynamic},
        inputs=[*TOKENS, *example],
        outputs=[ANSWER],
    )
    if PROMPT in example:
        accept_rows(traced)
    return traced


def export(
    module: nn.Module,
    example: dict[str, Any],
    dynamic: dict[str, Any],
    *,
    inputs: Sequence[str],
    outputs: Sequence[str],
    store: TensorStore = MEMORY,
    weights: Weights | None = None,
) -> onnx.ModelProto:
    """Trace ``module``, in evaluation mode, with the keyword arguments ``example``: tensors, or lists and dictionaries.

    ``dynamic`` has the dynamic dimensions of each tensor in the structure of ``example``, ``inputs`` the names of all
    its tensors in order, ``weights`` those of a module that is ``hollow``, which are read one by one. Raises
    ConfigError: torch cannot trace it."""
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
        reason = one_line(error.__cause__ or error)
        raise ConfigError(
            f"torch cannot export this model, use a base of another architecture ({reason})", about="torch.onnx"
        ) from error
    assert program is not None  # noqa: S101  # only the legacy exporter returns None
    if isinstance(store, OnDisk):
        for value in program.model.graph.initializers.values():
            value.const_value = _stored(value, store, weights or {})
    return _without_metadata(program.model_proto)


def slots(graph: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Dimensions as text: a number, or the name of a symbolic one."""
    return {
        value.name: tuple(d.dim_param or str(d.dim_value) for d in value.type.tensor_type.shape.dim)
        for value in graph.graph.input
        if value.name not in (*TOKENS, STATES, POSITIONS)
    }


def _stored(value: Any, store: OnDisk, weights: Weights) -> Any:
    """Convert the tensor of an initializer into onnx_ir's form, in the store if it is large."""
    values = value.const_value.numpy()
    if (read := weights.get(values.__array_interface__["data"][0])) is not None:
        # The weight or, because the exporter folds every Transpose, a transposed view of it.
        values = np.lib.stride_tricks.as_strided(read().numpy(), values.shape, values.strides)
    return ir.serde.deserialize_tensor(store.tensor(values, value.name), store.place)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's progress reports, its warnings, and the graph that it prints where it fails."""
    levels = {logger: logger.level for logger in map(logging.getLogger, ("torch", "torch.onnx"))}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _without_metadata(graph: onnx.ModelProto) -> onnx.ModelProto:
    # The exporter records the Python stack of every node, which contains paths of this machine.
    inner = graph.graph
    for item in (graph, inner, *inner.node, *inner.input, *inner.output, *inner.value_info, *inner.initializer):
        del item.metadata_props[:]
        item.doc_string = ""
    _keep_unusual_ranks(inner)
    return graph


def _keep_unusual_ranks(graph: onnx.GraphProto) -> None:
    """Drop all shape information except the rank of what layers read, where it is not USUAL_RANK."""
    weights = {tensor.name for tensor in graph.initializer}
    matmuls = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    read = {node.input[0] for node in matmuls if node.input[1] in weights}
    kept = [v for v in graph.value_info if v.name in read and len(v.type.tensor_type.shape.dim) != USUAL_RANK]
    infos = [
        onnx.helper.make_tensor_value_info(
            v.name, v.type.tensor_type.elem_type, [None] * len(v.type.tensor_type.shape.dim)
        )
        for v in kept
    ]
    del graph.value_info[:]
    graph.value_info.extend(infos)
