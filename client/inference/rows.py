"""One batch, another adapter for each row: adapters of different heads put side by side.

In the graph ``x @ A @ B`` broadcasts: with A of shape ``(rows, in, rank)`` each row meets its own. A head with fewer
labels than another is filled up with zeros, and its surplus answers are cut off.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from adapters.layout import Floats, Tensors
from adapters.ondevice import LORA_A, LORA_B
from client.inference.compose import Adapter

LABELS = "labels"  # the free dimension of a head's rows, as the card of the base calls it
RANK = "rank_"  # begins the name of a rank there
WIDTH = 2  # at least, of a rank: ONNX Runtime sums up a product of one column as its number of rows suggests
MAX_ROWS = 16  # of a run; more are no faster, and each takes 5 MB on MiniLM where texts are as long as it reads
Slots = Mapping[str, Sequence[str]]


def alike(adapters: Sequence[Adapter], slots: Slots) -> list[list[int]]:
    """The numbers of the rows that can share a run, run by run.

    Adapters share one if their ranks are equal in every layer, and so are modules trained whole that are no head; as
    many as ``MAX_ROWS``, so that a batch of any size takes little memory.
    Filling up ranks would be right on paper; but the order in which a product is summed up depends on its sizes, and a
    base that rounds activations makes much of a last bit (docs/decisions/0013-composing-adapters.md).

    Args:
        adapters: One for each row.
        slots: Of the base's card.
    """
    runs: list[list[int]] = []
    for row, adapter in enumerate(adapters):
        open_runs = (run for run in runs if len(run) < MAX_ROWS)
        run = next((run for run in open_runs if _alike(adapters[run[0]], adapter, slots)), None)
        if run is None:
            runs.append([row])
        else:
            run.append(row)
    return runs


def stacked(adapters: Sequence[Adapter], slots: Slots) -> Tensors:
    """The graph's inputs for one run.

    Args:
        adapters: One for each row, at least one; all ``alike``.
        slots: Of the base's card.

    Returns:
        Each tensor with a leading dimension for the rows, but for modules trained whole that are no head: they have
        the shape of one adapter.
    """
    return {name: _rows(name, [one.inputs[name] for one in adapters], slots[name]) for name in slots}


def _alike(one: Adapter, other: Adapter, slots: Slots) -> bool:
    return one is other or all(_fit(name, one.inputs[name], other.inputs[name], slots[name]) for name in slots)


def _fit(name: str, one: Floats, other: Floats, dimensions: Sequence[str]) -> bool:
    if name.endswith((LORA_A, LORA_B)):
        return one.shape == other.shape
    return LABELS in dimensions or np.array_equal(one, other)


def _rows(name: str, values: Sequence[Floats], dimensions: Sequence[str]) -> Floats:
    if not (name.endswith((LORA_A, LORA_B)) or LABELS in dimensions):
        return values[0]
    least = (WIDTH if dimension.startswith(RANK) else 0 for dimension in dimensions)
    sizes = zip(least, *(value.shape for value in values), strict=True)
    shape = tuple(map(max, sizes))
    if len(values) == 1 and values[0].shape == shape:
        return values[0][np.newaxis]  # one adapter in use is not held twice
    result = np.zeros((len(values), *shape), np.float32)
    for row, value in zip(result, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return result


def padded(tokens: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, both int64 of shape ``(rows, longest)``; where the mask is 0, nothing is read."""
    longest = max(map(len, tokens))
    ids, mask = np.zeros((len(tokens), longest), np.int64), np.zeros((len(tokens), longest), np.int64)
    for row, (into, seen) in zip(tokens, zip(ids, mask, strict=True), strict=True):
        into[: len(row)] = row
        seen[: len(row)] = 1
    return ids, mask
