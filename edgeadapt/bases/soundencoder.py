"""Google's speech embedding (Lin et al. 2020, "Training keyword spotters with limited and synthesized speech data") as
an encoder of samples, with its logarithmic mel spectrum. It is a model of transformers' by this module's import.

The network's last layer, which it was trained with, is left out: what enters it tells words apart better. Adapters
change the last convolution that is left, as a linear layer; its states are pooled to their mean and deviation.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from aggregation.errors import ConfigError
from edgeadapt.bases.mediaencoder import MediaEncoder, Shift
from edgeadapt.bases.sounds import SoundReader

KIND = "speech_embedding"
RATE, WINDOW, HOP, BINS, BANDS = 16_000, 512, 160, 257, 32  # of the spectrum
FRAMES = 76  # of it that the network needs at least
STAGES = ((24, (2, 2)), (48, (1, 2)), (72, (2, 2)), (96, (1, 2)), (96, (2, 2)))  # channels, and what is pooled after
WIDTH, TAPS = 96, 3


class SpeechEmbeddingConfig(PretrainedConfig):
    model_type = KIND

    def __init__(self, **stated: Any) -> None:
        super().__init__(**stated)
        self.hidden_size = 2 * WIDTH


class SpeechEmbedding(PreTrainedModel, MediaEncoder):
    config_class = SpeechEmbeddingConfig
    main_input_name = "input_ids"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.layer = nn.ModuleList([_Below(), _Top()])
        self.post_init()

    def reading(self, reader: SoundReader) -> "SpeechEmbedding":
        """Set what reads its sounds. Raises ConfigError: of another rate or number of channels, or too short."""
        shortest = WINDOW + (FRAMES - 1) * HOP
        if (reader.rate, reader.channels) != (RATE, 1) or reader.length < shortest:
            reason = f"it hears {shortest} samples or more of one channel at {RATE} Hz: copy the base again"
            raise ConfigError(reason, about="tokenizer.json")
        self.reader = reader
        return self

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        states = input_ids.to(torch.float32)
        for layer in self.layer:
            states = layer(states)
        return (states,)


class _Below(nn.Module):
    """Maps samples to what the last convolution reads, shape ``(sounds, 2 * places, TAPS * WIDTH)``."""

    def __init__(self) -> None:
        super().__init__()
        self.real, self.imaginary = (nn.Conv1d(1, BINS, WINDOW, HOP, bias=False) for _ in range(2))
        self.bands = nn.Parameter(torch.zeros(BINS, BANDS))
        layers, width = list[nn.Module](), 1
        for number, (wide, pooled) in enumerate(STAGES):
            along, across = ((1, 3), (0, 1)), ((TAPS, 1), (0, 0))
            kinds = [((TAPS, 3), (0, 1)), along, across] if number == 0 else [along, across, along, across]
            for size, padding in kinds:
                layers += [nn.Conv2d(width, wide, size, padding=padding), _Bent()]
                width = wide
            layers.append(nn.MaxPool2d(pooled))
        named = OrderedDict((f"below_{number}", layer) for number, layer in enumerate(layers[:-3]))
        self.convolutions = nn.Sequential(named)  # no layer in it has a number, as far as peft and the exporter see

    def forward(self, samples: Tensor) -> Tensor:
        power = self.real(samples[:, None]) ** 2 + self.imaginary(samples[:, None]) ** 2
        decibels = 10 * torch.log10(torch.clamp(power.transpose(1, 2) @ self.bands, min=1e-10))
        decibels = torch.maximum(decibels, decibels.amax((1, 2), keepdim=True) - 80)
        states = self.convolutions(decibels[:, None] / 10 + 2).permute(0, 2, 3, 1)
        places = states.shape[1] - TAPS + 1
        return torch.cat([states[:, tap : tap + places] for tap in range(TAPS)], -1).flatten(1, 2)


class _Top(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense, self.bent, self.shift = nn.Linear(TAPS * WIDTH, WIDTH), _Bent(), Shift(2 * WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        moments = states.shape[1] // 2
        bent = self.bent(self.dense(states)).reshape(-1, moments, 2, WIDTH)
        wide = larger(bent[:, :, 0], bent[:, :, 1])
        pairs = wide[:, : moments // 2 * 2].reshape(-1, moments // 2, 2, WIDTH)
        places = larger(pairs[:, :, 0], pairs[:, :, 1])
        mean = places.mean(1, keepdim=True)
        deviation = torch.sqrt(((places - mean) ** 2).mean(1, keepdim=True) + 1e-6)
        shifted: Tensor = self.shift(torch.cat([mean, deviation], -1))
        return shifted


class _Bent(nn.Module):
    """Is the larger of -0.4, a fifth of a number, and the number; in operators that a training graph has."""

    def forward(self, states: Tensor) -> Tensor:
        return torch.relu(states) + 0.2 * torch.clamp(states, -2.0, 0.0)


def larger(one: Tensor, other: Tensor) -> Tensor:
    return one + torch.relu(other - one)


AutoConfig.register(KIND, SpeechEmbeddingConfig)
AutoModel.register(SpeechEmbeddingConfig, SpeechEmbedding)
