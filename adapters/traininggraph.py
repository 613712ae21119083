"""Runs the training graph of an exported base: the loss of a batch, and its gradient by each tensor of an adapter.

Devices train with it (``client.training.engine``), and the exporter holds it to torch's gradients
(``export.parity.training``), so that what is measured is what runs. The graph reads the weights that the device answers
with, from the same file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np  # before onnxruntime, as in ``container``
import onnxruntime as ort
from numpy.typing import NDArray

from adapters.layout import Floats, Tensors

TARGETS, SHARES, LOSS = "targets", "shares", "loss"  # of the graph, besides the tokens and the slots
POSITIONS = "positions"  # of a language model's learned tokens
LOG_LIKELIHOOD, HITS = "log_likelihood", "hits"  # of each target
GRADIENT = ".gradient"  # ends the name of the output that holds the gradient by a slot


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Texts with their answers: a label for each text or, of a language model, the learned tokens.

    Attributes:
        ids, mask: Token ids and attention mask, shape ``(texts, longest)``.
        targets: The number of each text's label, shape ``(texts,)``; or each learned token, ``(learned,)``.
        shares: The factor of each target's cross-entropy in the loss, of the shape of ``targets``; with 1 / targets, a
            mean. A batch can be run in parts, whose losses and gradients add up to its own.
        positions: Of a language model: where in ``ids``, flattened, is the token before each target.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    targets: NDArray[np.int64]
    shares: Floats
    positions: NDArray[np.int64] | None = None


class TrainingGraph:
    """A training graph, loaded. Threads may share it."""

    def __init__(self, model: bytes, weights: Path, threads: int = 1) -> None:
        """Load a graph.

        Args:
            model: The graph, verified.
            weights: The folder with the file of weights, which is mapped into memory.
            threads: Of each run. Guarantee: with 1, equal batches give equal gradients on one machine.

        Raises:
            Exception: ONNX Runtime does not load it; its classes have no common base.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        # A pattern of a shape of batches is one block of memory besides the arena, and batches have many shapes.
        options.enable_mem_pattern = False
        # Folding would store each weight once more: in float, or transposed.
        self._session = ort.InferenceSession(
            model, options, providers=["CPUExecutionProvider"], disabled_optimizers=["ConstantFolding"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    @property
    def slots(self) -> tuple[str, ...]:
        """The slots by which it has gradients."""
        return tuple(name.removesuffix(GRADIENT) for name in self._outputs if name.endswith(GRADIENT))

    def gradients(self, batch: TrainingBatch, inputs: Tensors) -> tuple[float, Tensors]:
        """The loss of a batch in nats, and its gradient by each slot, of the shape of the slot's input.

        Args:
            batch: At least one text.
            inputs: The adapter, a tensor for each slot (``adapters.graphinputs.to_inputs``).

        Raises:
            Exception: ONNX Runtime does not run it, as for a target that the head has no row for.
        """
        names = [LOSS, *(name for name in self._outputs if name.endswith(GRADIENT))]
        loss, *found = self._session.run(names, _feeds(batch, inputs))
        return float(loss), {name.removesuffix(GRADIENT): value for name, value in zip(names[1:], found, strict=True)}

    def scores(self, batch: TrainingBatch, inputs: Tensors) -> tuple[Floats, NDArray[np.bool_]]:
        """The log-likelihood of each target in nats, and whether it is the most likely one. Runs no backward pass.

        Args:
            batch: At least one text, whose shares do not matter.
            inputs: As of ``gradients``.

        Raises:
            Exception: As ``gradients``, or the graph is of a classifier.
        """
        options = ort.RunOptions()
        options.only_execute_path_to_fetches = True
        nats, hits = self._session.run([LOG_LIKELIHOOD, HITS], _feeds(batch, inputs), options)
        return nats, hits


def _feeds(batch: TrainingBatch, inputs: Tensors) -> dict[str, Any]:
    tokens: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask}
    if batch.positions is not None:
        tokens[POSITIONS] = batch.positions
    return tokens | {TARGETS: batch.targets, SHARES: batch.shares, **inputs}


def batch_of(tokens: Sequence[Sequence[int]], targets: Sequence[int], shares: Sequence[float]) -> TrainingBatch:
    """A batch of texts, padded to the longest.

    Args:
        tokens: The token ids of each text; at least one text.
        targets, shares: Of each text.
    """
    from adapters.classifiergraph import pad

    ids, mask = pad(tokens)
    return TrainingBatch(ids, mask, np.array(targets, np.int64), np.array(shares, np.float32))


def missing_slots(graph: TrainingGraph, slots: Mapping[str, Sequence[str]]) -> list[str]:
    """The slots of a base by which a graph has no gradient, sorted."""
    return sorted(set(slots) - set(graph.slots))
