"""An image model as an encoder of tokens, which are pixels (``edgeadapt.bases.pictures``), with states for each place.

In convolutional networks, adapters change the last layer before the mean over places. It reads each place alone, so it
is a linear layer, as peft and the exporter know it; the layers below are one frozen layer.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgeadapt.bases.mediaencoder import MediaEncoder
from edgeadapt.bases.pictures import PIXEL_MEAN, PIXEL_STD, PictureReader

# Kind of model → convolution of one pixel, normalization and activation after all others.
TOPS = {
    "efficientnet": ("encoder.top_conv", "encoder.top_bn", "encoder.top_activation"),
    "mobilenet_v2": ("conv_1x1.convolution", "conv_1x1.normalization", "conv_1x1.activation"),
}


class PictureEncoder(nn.Module, MediaEncoder):
    reader: PictureReader
    mean: Tensor
    std: Tensor

    def __init__(self, model: Any, reader: PictureReader) -> None:
        super().__init__()
        self.config, self.reader = copy.copy(model.config), reader
        for name, neutral in ((PIXEL_MEAN, 0.0), (PIXEL_STD, 1.0)):
            numbers = getattr(self.config, name, [neutral] * reader.channels)
            self.register_buffer(name.removeprefix("pixel_"), torch.tensor(numbers), persistent=False)
        for block in model.modules():  # the lite networks have no gates (picturebase.py)
            if (gate := getattr(block, "squeeze_excite", None)) is not None and not gate.expand.weight.any():
                block.squeeze_excite = nn.Identity()
        top = [model.get_submodule(path) for path in TOPS.get(self.config.model_type, ())]
        for path in _whole(model, TOPS.get(self.config.model_type, ())):
            model.set_submodule(path, nn.Identity())
        if top:  # then no layer below has a number, as far as peft and the exporter see
            for name, blocks in [(name, one) for name, one in model.named_modules() if isinstance(one, nn.ModuleList)]:
                named = OrderedDict((f"below_{number}", block) for number, block in enumerate(blocks))
                model.set_submodule(name, nn.Sequential(named))
        self.layer = nn.ModuleList([_Below(model), *([_Top(*top)] if top else [])])
        with torch.inference_mode():
            self.config.hidden_size = self(torch.zeros(1, reader.size, dtype=torch.int64))[0].shape[-1]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        reader = self.reader
        colours = input_ids.reshape(-1, reader.height, reader.width, reader.channels)
        states = ((colours.to(torch.float32) - self.mean) / self.std).permute(0, 3, 1, 2)
        for layer in self.layer:
            states = layer(states)
        return (states,)


def _whole(model: nn.Module, paths: Sequence[str]) -> Sequence[str]:
    """Name the module that has nothing but ``paths``, or these if there is none."""
    parent = paths[0].rpartition(".")[0] if paths else ""
    within = [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]
    return [parent] if set(within) == set(paths) else paths


class _Below(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, colours: Tensor) -> Tensor:
        states: Tensor = self.model(pixel_values=colours)[0]
        return states.flatten(2).transpose(1, 2) if states.ndim == 4 else states


class _Top(nn.Module):
    """Holds a convolution of one pixel with its normalization, in one linear layer, and the activation."""

    def __init__(self, convolution: nn.Conv2d, normalization: Any, activation: nn.Module) -> None:
        super().__init__()
        self.dense = nn.Linear(convolution.in_channels, convolution.out_channels)
        deviation = torch.sqrt(normalization.running_var + normalization.eps)
        scale = normalization.weight / deviation
        with torch.no_grad():
            self.dense.weight.copy_(convolution.weight.flatten(1) * scale[:, None])
            self.dense.bias.copy_(normalization.bias - normalization.running_mean * scale)
        self.activation = activation

    def forward(self, states: Tensor) -> Tensor:
        changed: Tensor = self.activation(self.dense(states))
        return changed
