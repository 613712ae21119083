"""What optimum knows of an architecture: the class that loads it for a task, and the sizes in its configuration.

So no exporter needs a table of architectures of its own. Optimum is imported on first use, which takes seconds.
"""

from dataclasses import dataclass
from typing import Any

import torch

from adapters import pretrained
from adapters.base import Base
from adapters.manifest import Task
from aggregation.errors import ConfigError

OFFSETS = 8  # positions that a family may reserve; RoBERTa's numbering begins at 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a decoder, whatever names its configuration gives them."""

    layers: int
    heads: int  # of queries; keys and values may have fewer
    hidden: int
    vocabulary: int


def load(base: Base, task: Task) -> Any:
    """The base as the model of ``task``, in float32 and evaluation mode.

    Raises:
        ConfigError: It is no model for this task, cannot be opened, or optimum is not installed.
    """
    try:
        from optimum.exporters.tasks import TasksManager
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"exporting this model needs {error.name}: pip install 'edgeadapt[export]'", about="optimum"
        ) from error
    config = pretrained.configuration(base)
    try:
        kind = TasksManager.get_model_class_for_task(task, model_type=config.model_type)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"{base.folder} holds no model for {task}: {str(error).splitlines()[0]}", about="--task", value=task
        ) from error
    return pretrained.load(base, kind)


def sizes(config: Any) -> Sizes:
    """The sizes in a configuration of transformers.

    Raises:
        ConfigError: Optimum does not know the architecture, or the configuration lacks a size.
    """
    from optimum.utils.normalized_config import NormalizedConfigManager

    try:
        known = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError as error:
        raise ConfigError(
            f"optimum does not know the architecture {config.model_type!r}; use a base that optimum or "
            "onnxruntime-genai's builder knows",
            about="model_type",
            value=config.model_type,
        ) from error
    try:
        return Sizes(known.num_layers, known.num_attention_heads, known.hidden_size, known.vocab_size)
    except AttributeError as error:
        raise ConfigError(
            f"the configuration of {config.model_type!r} is incomplete: {error}", about="config.json"
        ) from error


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
