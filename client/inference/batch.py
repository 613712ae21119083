"""Mixed batches: one run of the graph in which each row uses another adapter.

``x @ A @ B`` broadcasts: with A of shape ``(rows, in, rank)`` and B of shape ``(rows, rank, out)``, each row is
multiplied by its own A and B. A head with fewer labels than another is padded with zeros, and the surplus logits are
cut off. Why ranks are not padded: docs/decisions/0013-composing-adapters.md.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from adapters.graphinputs import LORA_A, LORA_B
from adapters.layout import Floats, Tensors
from client.inference.library import Adapter

LABELS = "labels"  # the symbolic dimension of a head's rows in the base's manifest
RANK = "rank_"  # prefix of the symbolic dimension of a rank
MIN_RANK = 2  # of a graph input; ONNX Runtime adds up a product with one column in an order that depends on the rows
MAX_ROWS = 16  # of one run; more rows are no faster, and each takes up to 5 MB on MiniLM
Slots = Mapping[str, Sequence[str]]  # graph input → its symbolic dimensions, from the base's manifest


def group_rows(adapters: Sequence[Adapter], slots: Slots) -> list[list[int]]:
    """Group the rows that can share a run.

    Adapters share a run if their ranks agree in every layer, and their ``modules_to_save`` other than a head are equal.

    Args:
        adapters: One for each row.
        slots: Of the base's manifest.

    Returns:
        The row numbers of each run, at most ``MAX_ROWS``. Every row is in exactly one run, and rows keep their order.
    """
    runs: list[list[int]] = []
    for row, adapter in enumerate(adapters):
        open_runs = (run for run in runs if len(run) < MAX_ROWS)
        run = next((run for run in open_runs if _compatible(adapters[run[0]], adapter, slots)), None)
        if run is None:
            runs.append([row])
        else:
            run.append(row)
    return runs


def stack(adapters: Sequence[Adapter], slots: Slots) -> Tensors:
    """Stack the inputs of one run.

    Args:
        adapters: One for each row, at least one, from one group of ``group_rows``.
        slots: Of the base's manifest.

    Returns:
        A, B and the head's tensors in float32, with the rows as first dimension and zeros as padding. Other
        ``modules_to_save`` keep the shape of one adapter. A single row that needs no padding is a view.
    """
    return {name: _stacked(name, [one.inputs[name] for one in adapters], slots[name]) for name in slots}


def pad(tokens: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Token ids and attention mask, both of shape ``(rows, longest)``; padding is 0 in both.

    Args:
        tokens: The token ids of each row; at least one row.

    >>> ids, mask = pad([[5, 6, 7], [8]])
    >>> ids.tolist(), mask.tolist()
    ([[5, 6, 7], [8, 0, 0]], [[1, 1, 1], [1, 0, 0]])
    """
    longest = max(map(len, tokens))
    ids, mask = np.zeros((len(tokens), longest), np.int64), np.zeros((len(tokens), longest), np.int64)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = 1
    return ids, mask


def _compatible(one: Adapter, other: Adapter, slots: Slots) -> bool:
    return one is other or all(_stackable(name, one.inputs[name], other.inputs[name], slots[name]) for name in slots)


def _stackable(name: str, one: Floats, other: Floats, dimensions: Sequence[str]) -> bool:
    if name.endswith((LORA_A, LORA_B)):
        return one.shape == other.shape
    return LABELS in dimensions or np.array_equal(one, other)


def _stacked(name: str, values: Sequence[Floats], dimensions: Sequence[str]) -> Floats:
    if not (name.endswith((LORA_A, LORA_B)) or LABELS in dimensions):
        return values[0]
    least = (MIN_RANK if dimension.startswith(RANK) else 0 for dimension in dimensions)
    shape = tuple(map(max, zip(least, *(value.shape for value in values), strict=True)))
    if len(values) == 1 and values[0].shape == shape:
        return values[0][np.newaxis]  # no copy
    result = np.zeros((len(values), *shape), np.float32)
    for row, value in zip(result, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return result
