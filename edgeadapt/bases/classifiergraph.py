"""Runs an exported classifier as devices run it: one text, or a mixed batch in which each row uses another adapter.

Devices answer with it (``client.inference``), and the exporter measures with it (``export.parity``), so that what is
measured is what runs. ``x @ A @ B`` broadcasts: with A of shape ``(rows, in, rank)`` and B of shape ``(rows, rank,
out)``, each row has its own A and B. So do scales and offsets of shape ``(rows, given, width)``; a row without one gets
ones or zeros. Heads with fewer labels are padded with zeros, and the surplus logits are cut off. Ranks are not padded
(docs/decisions/0013-slots-and-composition.md). Where all rows use one adapter, A and B have two dimensions, and layers
may read inputs of any shape.

Where the last layers alone have slots, a text passes through the layers below once, whatever adapters answer it, also
in later calls: their states are kept in memory (``states.py``)."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np  # before onnxruntime, as in ``container``
import onnxruntime as ort
from numpy.typing import NDArray

from edgeadapt.bases.slotshapes import without_shapes
from edgeadapt.bases.states import STATES, LowerLayers, Tokens
from edgeadapt.formats.bundle import LOWER, MODEL, UPPER
from edgeadapt.formats.graphinputs import OFFSET, PROMPT, RANKED, SCALES, UP_BIAS
from edgeadapt.formats.layout import Floats, Tensors

LABELS = "labels"  # the symbolic dimension of a head's rows in the base's manifest
RANK = "rank_"  # prefix of the symbolic dimension of a rank
BY_ADAPTER = (*RANKED, *SCALES, OFFSET, *UP_BIAS)  # end the slots that each row of a batch may fill otherwise
MIN_RANK = 2  # ONNX Runtime adds up a product with one column in an order that depends on the rows
MEAN_HEAD = ("classifier.bias", "classifier.weight")  # a head over the mean of the tokens, as federations train it
ENCODER = "encoder."  # begins the path of everything below a head over the mean of the tokens
MAX_TOKENS = 128  # a longer text is cut
MAX_ROWS = 16  # more are no faster, and each takes up to 5 MB on MiniLM
MAX_STATES = 2**23  # bytes of states in memory: 390 texts of 14 tokens at a width of 384
Slots = Mapping[str, Sequence[str]]  # graph input → its symbolic dimensions, from the base's manifest
Feeds = Mapping[str, Any]  # graph input → OrtValue


class ClassifierGraph:
    """Runs a loaded graph of an exported classifier. Threads may share it."""

    def __init__(
        self, session: ort.InferenceSession, slots: Slots, independent_rows: bool, lower: LowerLayers | None = None
    ) -> None:
        """Run ``session``, which reads the states of ``lower`` if that is not None. Without ``independent_rows``,
        ``mixed`` runs each row alone."""
        self._session, self._slots, self._rows = session, slots, MAX_ROWS if independent_rows else 1
        self._lower, self._inputs = lower, {value.name for value in session.get_inputs()}

    @classmethod
    def open(
        cls, files: Mapping[str, bytes], folder: Path, slots: Slots, independent_rows: bool, threads: int = 1
    ) -> Self:
        """Load the verified graph of a base in ``folder`` or, if ``files`` has them, the two parts of it, which
        together hold each weight once. Raises what ONNX Runtime raises."""
        if UPPER not in files:
            return cls(open_session(files[MODEL], folder, slots, threads), slots, independent_rows)
        lower = LowerLayers(open_session(files[LOWER], folder, (), threads), MAX_STATES)
        return cls(open_session(files[UPPER], folder, slots, threads), slots, independent_rows, lower)

    def feeds(self, inputs: Tensors) -> Feeds:
        return _ort_values({name: _padded([inputs[name]], self._slots[name])[0] for name in self._slots})

    def logits(self, tokens: Tokens, adapter: Feeds) -> Floats:
        """Return the logits of one text, shape ``(labels,)``. Raises what ONNX Runtime raises."""
        logits: Floats = self._run([tokens], adapter)[0]
        return logits

    def mixed(self, tokens: Sequence[Tokens], inputs: Sequence[Tensors]) -> list[Floats]:
        """Return the logits of a batch, from each row's tokens and its adapter's tensors, one for each slot. Each row's
        are what ``logits`` returns, up to rounding; after the adapter's own labels, a row may have more."""
        logits: dict[int, Floats] = {}
        for run in group_rows(inputs, self._slots, self._rows):
            texts, adapters = [tokens[row] for row in run], [inputs[row] for row in run]
            same_adapter = all(adapter is adapters[0] for adapter in adapters)
            feeds = self.feeds(adapters[0]) if same_adapter else _ort_values(stack(adapters, self._slots))
            logits.update(zip(run, self._run(texts, feeds), strict=True))
        return [logits[row] for row in range(len(tokens))]

    def embed(self, tokens: Sequence[Tokens], inputs: Tensors) -> Floats:
        """Return what ``MEAN_HEAD``, which the base must have, reads: the logits of a head that is the identity.
        ``inputs``: of an adapter, one for each slot. Shape ``(len(tokens), hidden)``."""
        bias, weight = MEAN_HEAD
        hidden = int(self._slots[weight][1])
        if not tokens:
            return np.zeros((0, hidden), np.float32)
        identity = {bias: np.zeros(hidden, np.float32), weight: np.eye(hidden, dtype=np.float32)}
        return self.rows(tokens, inputs | identity)

    def rows(self, tokens: Sequence[Tokens], inputs: Tensors) -> Floats:
        """Return the logits of at least one text by one adapter, shape ``(len(tokens), labels)``."""
        order = sorted(range(len(tokens)), key=lambda text: len(tokens[text]))  # texts of a run need little padding
        rows = self.mixed([tokens[text] for text in order], [inputs] * len(order))
        result: Floats = np.stack(rows)[np.argsort(order)]
        return result

    def _run(self, tokens: Sequence[Tokens], adapter: Feeds) -> Floats:
        ids, mask = pad(tokens)
        values: dict[str, NDArray[Any]] = {"input_ids": ids, "attention_mask": mask}
        if self._lower is not None:
            values[STATES] = self._lower.states(ids, mask)
        feeds = _ort_values({name: value for name, value in values.items() if name in self._inputs})
        logits: Floats = self._session.run_with_ort_values(["logits"], feeds | dict(adapter))[0].numpy()
        return logits


def open_session(model: bytes, folder: Path, slots: Collection[str], threads: int = 1) -> ort.InferenceSession:
    """Open a verified graph, whose slots take an adapter for each row. The file of weights in ``folder`` is mapped into
    memory, so that processes share it."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    return ort.InferenceSession(without_shapes(model, slots), options, providers=["CPUExecutionProvider"])


def group_rows(adapters: Sequence[Tensors], slots: Slots, most: int = MAX_ROWS) -> list[list[int]]:
    """Group the rows that can share a run, in order, every row once, at most ``most``. They share it if their ranks
    agree in every layer, they have as many virtual tokens, and the parameters that they replace, except a head's, are
    equal."""
    runs: list[list[int]] = []
    for row, adapter in enumerate(adapters):
        open_runs = (run for run in runs if len(run) < most)
        run = next((run for run in open_runs if _compatible(adapters[run[0]], adapter, slots)), None)
        if run is None:
            runs.append([row])
        else:
            run.append(row)
    return runs


def stack(adapters: Sequence[Tensors], slots: Slots) -> Tensors:
    """Stack the graph inputs of the rows of one group of ``group_rows``: A, B, scales, offsets and the head's tensors
    in float32, with the rows as first dimension and padding that changes nothing. Replaced parameters keep one
    adapter's shape."""
    return {
        name: _padded([one[name] for one in adapters], slots[name], 1.0 if name.endswith(SCALES) else 0.0)
        if _per_row(name, slots[name])
        else adapters[0][name]
        for name in slots
    }


def pad(tokens: Sequence[Tokens]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return token ids and attention mask, both of shape ``(rows, longest)``; padding is 0 in both.

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


def _compatible(one: Tensors, other: Tensors, slots: Slots) -> bool:
    return one is other or all(_stackable(name, one[name], other[name], slots[name]) for name in slots)


def _stackable(name: str, one: Floats, other: Floats, dimensions: Sequence[str]) -> bool:
    if name.endswith(RANKED) or name == PROMPT:
        return one.shape == other.shape
    return _per_row(name, dimensions) or np.array_equal(one, other)


def _per_row(name: str, dimensions: Sequence[str]) -> bool:
    return name.endswith(BY_ADAPTER) or name == PROMPT or LABELS in dimensions


def _padded(values: Sequence[Floats], dimensions: Sequence[str], fill: float = 0.0) -> Floats:
    """Stack ``values``, padded with ``fill`` to one shape; a single value that needs no padding is a view."""
    least = (MIN_RANK if dimension.startswith(RANK) else 0 for dimension in dimensions)
    shape = tuple(map(max, zip(least, *(value.shape for value in values), strict=True)))
    if len(values) == 1 and values[0].shape == shape:
        return values[0][np.newaxis]  # no copy
    result = np.full((len(values), *shape), fill, np.float32)
    for row, value in zip(result, values, strict=True):
        row[tuple(slice(size) for size in value.shape)] = value
    return result


def _ort_values(tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    return {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in tensors.items()}
