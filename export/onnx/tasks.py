"""What an architecture's configuration says: by optimum's table of names, or by transformers' own names. So no exporter
needs a table of architectures of its own. Optimum is imported on first use, which takes seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aggregation.errors import ConfigError, one_line

CLOSE = 1e-3  # share of the largest logit
OFFSETS = 8  # positions that a family may reserve; RoBERTa's numbering begins at 2


@dataclass(frozen=True, slots=True)
class Sizes:
    layers: int
    heads: int  # heads of queries; keys and values may have fewer
    hidden: int
    vocabulary: int


def sizes(config: Any) -> Sizes:
    """Read the sizes in a configuration of transformers. Optimum says what each family calls them. For a family that it
    does not list, and where its names are not the installed transformers', the names are those to which transformers
    maps each family's own. Raises ConfigError: the configuration lacks a size, or its layers differ in one."""
    from optimum.utils.normalized_config import NormalizedConfigManager

    try:
        normalized = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
        return Sizes(
            *map(
                int,
                (normalized.num_layers, normalized.num_attention_heads, normalized.hidden_size, normalized.vocab_size),
            )
        )
    except (KeyError, AttributeError, TypeError):
        names = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
    try:
        return Sizes(*(int(getattr(config, name)) for name in names))
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"the configuration of {config.model_type!r} does not state one of {', '.join(names)} for all layers: "
            f"{str(error)[:100]}",
            about="config.json",
        ) from error


def check_classifies(model: Any, ids: Sequence[int]) -> None:
    """Check that a model, in evaluation mode, turns the tokens of one text, and their mask, into one row of logits.
    Raises ConfigError."""
    try:
        answer = _read(model, ids)
    except Exception as error:  # whatever the code of a model raises
        raise ConfigError(
            f"{type(model).__name__} cannot be exported: it does not read a text from its tokens and their mask "
            f"({one_line(error)}); use an encoder that does",
            about="model_type",
        ) from error
    logits = getattr(answer, "logits", answer)
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        raise ConfigError(
            f"{type(model).__name__} cannot be exported: it does not answer with one row of logits for each text",
            about="model_type",
        )


def check_reads_embeddings(model: Any, ids: Sequence[int]) -> None:
    """Check that a model reads nothing of tokens but their embeddings, as peft assumes of virtual tokens. Raises
    ConfigError: it does not take embeddings, or answers differently."""
    tokens = torch.tensor([list(ids)])
    try:
        with torch.no_grad():
            embeddings = model.get_input_embeddings()(tokens)
            embedded = model(inputs_embeds=embeddings, attention_mask=torch.ones_like(tokens)).logits
            expected = model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
        same = bool((embedded - expected).abs().max() <= CLOSE * expected.abs().max())
        reason = "it reads more of a token than its embedding"
    except Exception as error:  # whatever the code of a model raises
        same, reason = False, one_line(error)
    if not same:
        raise ConfigError(
            f"{type(model).__name__} cannot have virtual tokens ({reason}); use an adapter of another method",
            about="inputs_embeds",
        )


def readable_length(model: Any, ids: Sequence[int], length: int) -> int:
    """Count the tokens of the longest text that an encoder reads: ``length`` or slightly less, found by trying.

    ``max_position_embeddings`` counts the rows of an embedding, and some families reserve the first ones. ``model``: in
    evaluation mode; ``ids``: of a text without padding; ``length``: what the model states. Raises ConfigError: the
    model cannot read ``length - OFFSETS + 1`` tokens."""
    reason = ""
    for tried in range(length, max(0, length - OFFSETS), -1):
        try:
            _read(model, np.resize(ids, tried).tolist())
        except Exception as error:  # whatever the code of a model raises
            reason = one_line(error)
            continue
        return tried
    raise ConfigError(
        f"the model states {length} positions, but cannot read a text of {max(0, length - OFFSETS) + 1} tokens: "
        f"{reason}; use another base",
        about="max_position_embeddings",
    )


def _read(model: Any, ids: Sequence[int]) -> Any:
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
