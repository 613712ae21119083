"""One batch, another adapter for each row: adapters of different ranks and heads put side by side.

In the graph ``x @ A @ B`` broadcasts: with A of shape ``(rows, in, rank)`` each row meets its own. A rank below the
greatest is filled up with zeros, which add nothing to a product; a head with fewer labels is filled up likewise, and
its surplus answers are cut off.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from adapters.layout import Floats, Tensors
from adapters.ondevice import LORA_A, LORA_B
from aggregation.errors import ConfigError
from client.compose import Adapter

LABELS = "labels"  # the free dimension of a head's rows, as the card of the base calls it


def stacked(adapters: Sequence[Adapter], slots: Mapping[str, Sequence[str]]) -> Tensors:
    """The graph's inputs for a batch.

    Args:
        adapters: One for each row, at least one.
        slots: Of the base's card.

    Returns:
        Each tensor with a leading dimension for the rows, but for modules trained whole that are no head: they have
        the shape of one adapter.

    Raises:
        ConfigError: A module trained whole that is no head differs between two rows.
    """
    return {name: _rows(name, [one.inputs[name] for one in adapters], slots[name], adapters) for name in slots}


def _rows(name: str, values: Sequence[Floats], dimensions: Sequence[str], adapters: Sequence[Adapter]) -> Floats:
    if not (name.endswith((LORA_A, LORA_B)) or LABELS in dimensions):
        return _same(name, values, adapters)
    shape = tuple(max(sizes) for sizes in zip(*(value.shape for value in values), strict=True))
    result = np.zeros((len(values), *shape), np.float32)
    for row, value in zip(result, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return result


def _same(name: str, values: Sequence[Floats], adapters: Sequence[Adapter]) -> Floats:
    for value, adapter in zip(values, adapters, strict=True):
        if value is not values[0] and not np.array_equal(value, values[0]):
            raise ConfigError(
                f"adapters {adapters[0].name!r} and {adapter.name!r} trained {name!r} whole, "
                "which the rows of a batch share; answer them one after the other"
            )
    return values[0]


def padded(tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, both int64 of shape ``(rows, longest)``; where the mask is 0, nothing is read."""
    longest = max(map(len, tokens))
    ids, mask = np.zeros((len(tokens), longest), np.int64), np.zeros((len(tokens), longest), np.int64)
    for row, (into, seen) in zip(tokens, zip(ids, mask, strict=True), strict=True):
        into[: len(row)] = row
        seen[: len(row)] = 1
    return ids, mask
