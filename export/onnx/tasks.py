"""What an architecture's configuration says, under the names that transformers gives to the numbers of every family.

So no exporter needs a table of architectures of its own.
"""

from dataclasses import dataclass
from typing import Any

import torch

from aggregation.errors import ConfigError

OFFSETS = 8  # positions that a family may reserve; RoBERTa's numbering begins at 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a decoder."""

    layers: int
    heads: int  # of queries; keys and values may have fewer
    hidden: int
    vocabulary: int


def sizes(config: Any) -> Sizes:
    """The sizes in a configuration of transformers, which maps each family's own names to common ones.

    Raises:
        ConfigError: The configuration lacks a size, or its layers differ in one.
    """
    names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    try:
        found = [int(getattr(config, name)) for name in names]
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"the configuration of {config.model_type!r} does not state one of {', '.join(names)} for all layers: "
            f"{str(error)[:100]}",
            about="config.json",
        ) from error
    return Sizes(*found)


def readable_length(model: Any, config: Any, length: int) -> int:
    """The number of tokens of the longest text that an encoder reads: ``length`` or slightly less, found by trying.

    ``max_position_embeddings`` counts the rows of an embedding, and some families reserve the first ones.

    Raises:
        ConfigError: The model cannot read ``length - OFFSETS + 1`` tokens.
    """
    token = 1 if config.pad_token_id == 0 else 0  # padding may have no position of its own
    for tried in range(length, max(0, length - OFFSETS), -1):
        ids = torch.full((1, tried), token)
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            continue
        return tried
    raise ConfigError(
        f"the model states {length} positions, but cannot read a text of {max(0, length - OFFSETS) + 1} tokens",
        about="max_position_embeddings",
        value=length,
    )
