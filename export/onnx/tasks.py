"""What optimum knows of an architecture: which class loads it for a task, and what its configuration calls its numbers.

With that no exporter needs a table of architectures of its own. Optimum is imported only when it is asked: that takes
seconds.
"""

from dataclasses import dataclass
from typing import Any

import torch

from adapters import pretrained
from adapters.base import Base
from adapters.manifest import Task
from aggregation.errors import ConfigError

OFFSETS = 8  # that a family may lose of its positions; RoBERTa's numbers begin at 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """The numbers of a decoder, whatever its configuration calls them."""

    layers: int
    heads: int  # of queries; of keys and values there may be fewer
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
        raise ConfigError(f"exporting this model needs {error.name}: pip install 'edgeadapt[export]'") from error
    config = pretrained.configuration(base)
    try:
        kind = TasksManager.get_model_class_for_task(task, model_type=config.model_type)
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{base.folder} holds no model for {task}: {str(error).splitlines()[0]}") from error
    return pretrained.load(base, kind)


def sizes(config: Any) -> Sizes:
    """The numbers in a configuration of transformers.

    Raises:
        ConfigError: Optimum does not know the architecture, or the configuration lacks one.
    """
    from optimum.utils.normalized_config import NormalizedConfigManager

    try:
        known = NormalizedConfigManager.get_normalized_config_class(config.model_type)(config)
    except KeyError as error:
        raise ConfigError(
            f"optimum does not know the architecture {config.model_type!r}; take a base that it or onnxruntime-genai's"
            " builder knows"
        ) from error
    try:
        return Sizes(known.num_layers, known.num_attention_heads, known.hidden_size, known.vocab_size)
    except AttributeError as error:
        raise ConfigError(f"the configuration of {config.model_type!r} is incomplete: {error}") from error


def readable(model: Any, config: Any, length: int) -> int:
    """How many tokens of one text an encoder can read: ``length``, or a few fewer, found by trying.

    ``max_position_embeddings`` counts rows of a table, and some families leave the first rows out.

    Raises:
        ConfigError: It cannot read nearly so many.
    """
    token = 1 if config.pad_token_id == 0 else 0  # padding may bear no position of its own
    for tried in range(length, max(0, length - OFFSETS), -1):
        ids = torch.full((1, tried), token)
        try:
            with torch.no_grad():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (IndexError, RuntimeError):
            continue
        return tried
    raise ConfigError(f"the model states {length} positions, but cannot read a text of {length - OFFSETS} tokens")
