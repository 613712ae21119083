"""Bottleneck adapters in torch, of which peft has no type: this module adds one for each of ``ACTIVATIONS``. After a
linear layer with the output ``y``, an adapter adds ``f(y @ down + down_bias) @ up + up_bias`` (Houlsby et al. 2019). At
a normalization N of ``s``, it reads ``N(s)`` and adds to ``s`` (Pfeiffer et al. 2020): ``N(s + B(N(s)))``."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from peft import mapping
from peft.tuners.beft.model import BeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from edgeadapt.formats.graphinputs import ACTIVATIONS, PARTS

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swish": functional.silu,
    "relu": functional.relu,
    "gelu": functional.gelu,
}


def change(method: str, y: Tensor, part: Callable[[str], Tensor]) -> Tensor:
    """Compute what an adapter of one of ``ACTIVATIONS`` adds. ``part`` returns one of ``PARTS``."""
    low = FUNCTIONS[ACTIVATIONS[method]](y @ part("down") + part("down_bias"))
    return low @ part("up") + part("up_bias")


def adds_before(module: nn.Module) -> bool:
    """Check whether the adapter at a module adds to what it reads: at a normalization, not at a linear layer."""
    return module.get_parameter("weight").ndim == 1


@dataclass
class BottleneckConfig(peft.PeftConfig):
    """Configures an adapter of rank ``r``; ``peft_type`` is one of ``ACTIVATIONS`` in capitals."""

    r: int = 8
    target_modules: Any = None
    modules_to_save: list[str] | None = None


class _Layer(nn.Module, BaseTunerLayer):
    __getattr__: Any  # of submodules

    def __init__(self, base_layer: Any, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer, self.method = base_layer, str(config.peft_type).lower()
        self.adapter_layer_names = tuple(f"{self.method}_{part}" for part in PARTS)
        self._disable_adapters, self._active_adapter = False, adapter_name
        self.merged_adapters: list[str] = []
        self.before = adds_before(base_layer)
        width, rank = base_layer.weight.shape[1 if isinstance(base_layer, Conv1D) else 0], config.r
        shapes = ((width, rank), (1, rank), (rank, width), (1, width))
        for name, shape in zip(self.adapter_layer_names, shapes, strict=True):
            setattr(self, name, nn.ParameterDict({adapter_name: nn.Parameter(torch.zeros(shape))}))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base: Any = self.base_layer
        y: Tensor = base(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        added = change(self.method, y, self._part)
        changed: Tensor = base(x + added, *args, **kwargs) if self.before else y + added
        return changed

    def _part(self, name: str) -> Tensor:
        parameters: Any = getattr(self, f"{self.method}_{name}")
        parameter: Tensor = parameters[self.active_adapters[0]]
        return parameter


class _Model(BeftModel):
    prefix, tuner_layer_cls = "bottleneck_", _Layer

    @staticmethod
    def _create_new_module(config: BottleneckConfig, adapter_name: str, target: nn.Module, **_: Any) -> nn.Module:
        return _Layer(target, adapter_name, config)


for _method in ACTIVATIONS:  # as register_peft_method does for the types of peft's own enumeration
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[_method.upper()] = BottleneckConfig
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[_method.upper()] = _Model
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[_method.upper()] = _Model.prefix
