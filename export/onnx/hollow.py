"""A model without its large weights, to be traced: tracing needs shapes and types, and values only to store them.

A hollow weight is memory that the system never has to provide, because nothing is written to it. What the exporter
computes while it traces (constant folding) it computes from small weights, which are there.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from accelerate.hooks import SequentialHook, remove_hook_from_module
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

SMALL = 2**19  # numbers of a weight that is loaded; onnxscript folds constants of up to 2**18

Weights = Mapping[int, Callable[[], Tensor]]  # by the address of the hollow weight


def hollow(model: nn.Module) -> Weights:
    """Replace the weights that ``pretrained.load`` left on disk, in place: by themselves or, if large, by hollow ones.

    Returns what reads the value of each hollow weight, in its memory's layout.
    """
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
