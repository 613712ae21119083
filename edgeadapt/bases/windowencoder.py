"""Random convolutions as an encoder of windows of sensors, a model of transformers' by this module's import.

Each kernel has a weight -1 or 2 for each of nine moments of each channel (MiniRocket, Dempster et al. 2021), is applied
with three dilations, and is pooled to its maximum and to the share of moments at which it is positive (Rocket, Dempster
et al. 2020), with a slope, for gradients. Windows are scaled to equal power, over all channels; level and
power of each channel stand beside the rest. Adapters change the kernels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from aggregation.errors import ConfigError
from edgeadapt.bases.mediaencoder import MediaEncoder, Shift
from edgeadapt.bases.soundencoder import larger
from edgeadapt.bases.sounds import SoundReader
from edgeadapt.bases.windowbase import DILATIONS, KERNELS, KIND, TAPS, width

LEVEL, POWER, MAXIMUM = 5.0, 0.15, 0.1  # factors that let all numbers of a window vary about as much
FLOOR = 1e-6  # of power, which is 1 at most: a window below it is silent


class RandomConvolutionsConfig(PretrainedConfig):
    model_type = KIND

    def __init__(self, channels: int = 1, **stated: Any) -> None:
        super().__init__(**stated)
        self.channels = channels
        self.hidden_size = width(channels)


class RandomConvolutions(PreTrainedModel, MediaEncoder):
    config_class, main_input_name = RandomConvolutionsConfig, "input_ids"
    reader: SoundReader

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.ModuleList([_Below(), _Top(config.channels)])
        self.post_init()

    def reading(self, reader: SoundReader) -> "RandomConvolutions":
        """Set what reads its windows. Raises ConfigError: of another number of channels."""
        if reader.channels != (channels := self.config.channels):
            reason = f"it reads windows of {channels} channels, not {reader.channels}: copy the base again"
            raise ConfigError(reason, about="tokenizer.json")
        self.reader = reader
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        states = input_ids.to(torch.float32).reshape(-1, self.reader.length, self.reader.channels)
        for layer in self.layer:
            states = layer(states)
        return (states,)


class _Below(nn.Module):
    """Maps samples to what the kernels read, shape ``(windows, 1 + dilations * length, TAPS * channels)``. First come
    level and power."""

    def forward(self, samples: Tensor) -> Tensor:
        _, length, channels = samples.shape
        waves = samples / 2**15
        level = waves.mean(1, keepdim=True)
        waves = waves - level
        power = (waves * waves).mean(1, keepdim=True) + FLOOR
        waves = waves / torch.sqrt(power.mean(2, keepdim=True))
        beside = torch.cat([LEVEL * level, POWER * torch.log(power)], -1)
        read = [nn.functional.pad(beside, (0, (TAPS - 2) * channels))]
        for dilation in DILATIONS:
            padded = nn.functional.pad(waves, (0, 0, TAPS // 2 * dilation, TAPS // 2 * dilation))
            read.append(torch.cat([padded[:, tap * dilation :][:, :length] for tap in range(TAPS)], -1))
        return torch.cat(read, 1)


class _Top(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.beside = 2 * channels
        self.dense = nn.Linear(TAPS * channels, KERNELS)
        self.shift = Shift(width(channels))

    def forward(self, states: Tensor) -> Tensor:
        length = (states.shape[1] - 1) // len(DILATIONS)
        found = self.dense(states[:, 1:]).reshape(-1, len(DILATIONS), length, KERNELS)
        positive = torch.clamp(found + 0.5, 0.0, 1.0).mean(2)
        while (length := found.shape[2]) > 1:  # the maximum, in operators that a training graph has
            half = (length + 1) // 2
            found = larger(found[:, :, :half], found[:, :, length - half :])
        pooled = [positive.flatten(1), MAXIMUM * found.flatten(1), states[:, 0, : self.beside]]
        shifted: Tensor = self.shift(torch.cat(pooled, -1)[:, None])
        return shifted


AutoConfig.register(KIND, RandomConvolutionsConfig)
AutoModel.register(RandomConvolutionsConfig, RandomConvolutions)
