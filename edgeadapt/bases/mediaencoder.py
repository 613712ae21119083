"""What maps tokens of pictures or sounds to states, in place of a language model."""

from typing import Any

import torch
from torch import Tensor, nn

from edgeadapt.bases.media import MediaReader


class MediaEncoder:
    """Maps tokens to ``(states,)``, shape ``(files, places, hidden_size)``, as a Module with a ModuleList ``layer``."""

    reader: MediaReader


class Shift(nn.Module):
    """Adds a ``bias``: zeros, until the base is centered."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        return states + self.bias


def numbers_of(model: Any) -> int:
    """Count the tokens of each file that a classifier reads; 0 for one of texts."""
    encoder = getattr(model, "encoder", None)
    return encoder.reader.size if isinstance(encoder, MediaEncoder) else 0
