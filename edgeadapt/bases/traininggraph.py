"""Runs the training graph of an exported base: the loss of a batch, and its gradient by each tensor of an adapter.

Devices train with it (``client.training.graphengine``), and the exporter compares it with torch's gradients
(``export.parity.compare``), so that what is measured is what runs. The graph reads the weights that the device answers
with, from the same file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np  # before onnxruntime, as in ``container``
import onnxruntime as ort
from numpy.typing import NDArray

from edgeadapt.bases.states import STATES, LowerLayers
from edgeadapt.formats.layout import Floats, Tensors

TARGETS, SHARES, LOSS = "targets", "shares", "loss"  # of the graph, besides the tokens and the slots
POSITIONS = "positions"  # of a language model's learned tokens
LOG_LIKELIHOOD, HITS = "log_likelihood", "hits"  # of each target
GRADIENT = ".gradient"  # ends the name of the output that holds the gradient by a slot
# End the names of outputs of a layer that has slots for DoRA: ``‖W + A B‖`` of each output's weights, and its own bias.
WEIGHT_NORM, OWN_BIAS = ".weight_norm", ".own_bias"
MAX_STATES = 2**26  # bytes of states in memory: 3,000 texts of 14 tokens at a width of 384


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Holds texts with their answers: a label for each text or, for a language model, the learned tokens.

    Attributes:
        ids, mask: Token ids and attention mask, shape ``(texts, longest)``.
        targets: The number of each text's label, shape ``(texts,)``; each learned token, ``(learned,)``; or the target
            of each text in a task of others, ``(texts, width)`` in float32.
        shares: The factor of each target's loss, shape ``(len(targets),)``; with 1 / targets, a mean. A batch can be
            run in parts, whose losses and gradients add up to its own.
        positions: For a language model: where in ``ids``, flattened, is the token before each target.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.int64]
    targets: NDArray[Any]
    shares: Floats
    positions: NDArray[np.int64] | None = None


class TrainingGraph:
    """Runs a loaded training graph. Threads may share it. ONNX Runtime's errors have no common base but Exception."""

    def __init__(self, model: bytes, weights: Path, threads: int = 1, lower: bytes | None = None) -> None:
        """Load a verified graph; its weights in the folder ``weights`` are mapped into memory. Guarantee: with one
        thread, equal batches give equal gradients on one machine, also where states come from the cache. ``lower``
        computes the states that the graph reads instead of the tokens, if it reads such."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # errors are raised
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
        # A pattern of a shape of batches is one block of memory besides the arena, and batches have many shapes.
        options.enable_mem_pattern = False
        providers = ["CPUExecutionProvider"]
        # Folding would store each weight once more: in float, or transposed.
        off = ["ConstantFolding"]
        self._session = ort.InferenceSession(model, options, providers=providers, disabled_optimizers=off)
        self.lower: LowerLayers | None = None
        if lower is not None:
            self.lower = LowerLayers(ort.InferenceSession(lower, options, providers=providers), MAX_STATES)
        self._inputs = {value.name for value in self._session.get_inputs()}
        self._outputs = [output.name for output in self._session.get_outputs()]

    @property
    def slots(self) -> tuple[str, ...]:
        return self._named(GRADIENT)

    @property
    def normed(self) -> tuple[str, ...]:
        return self._named(WEIGHT_NORM)

    def gradients(self, batch: TrainingBatch, inputs: Tensors) -> tuple[float, Tensors]:
        """Return the loss of a batch of at least one text, in nats, and its gradient by each slot, in the slot's shape.
        ``inputs`` is the adapter, a tensor for each slot (``edgeadapt.formats.graphinputs.to_inputs``)."""
        names = [LOSS, *(name for name in self._outputs if name.endswith(GRADIENT))]
        loss, *values = self._session.run(names, self._feeds(batch, inputs))
        return float(loss), {name.removesuffix(GRADIENT): value for name, value in zip(names[1:], values, strict=True)}

    def scores(self, batch: TrainingBatch, inputs: Tensors) -> tuple[Floats, NDArray[np.bool_]]:
        """Return a language model's log-likelihood of each target in nats, and whether it is the most likely one. ONNX
        Runtime runs the whole graph, the backward pass too, whatever outputs are asked for. Shares do not matter."""
        nats, hits = self._session.run([LOG_LIKELIHOOD, HITS], self._feeds(batch, inputs))
        return nats, hits

    def weight_norms(self, inputs: Tensors, layers: Sequence[str]) -> dict[str, Floats]:
        """Return the norm of each output's weights with the update, ``‖W + A B‖``, shape ``(out,)``, by layer.
        ``inputs`` has A and B by slot, for ``layers``, some of ``normed``."""
        return self._of_layers(layers, WEIGHT_NORM, inputs)

    def own_biases(self) -> dict[str, Floats]:
        return self._of_layers(self._named(OWN_BIAS), OWN_BIAS, {})

    def _feeds(self, batch: TrainingBatch, inputs: Tensors) -> dict[str, Any]:
        tokens: dict[str, Any] = {"input_ids": batch.ids, "attention_mask": batch.mask, POSITIONS: batch.positions}
        if self.lower is not None:
            tokens[STATES] = self.lower.states(batch.ids, batch.mask)
        read = {name: value for name, value in tokens.items() if name in self._inputs and value is not None}
        return read | {TARGETS: batch.targets, SHARES: batch.shares, **inputs}

    def _named(self, ending: str) -> tuple[str, ...]:
        return tuple(name.removesuffix(ending) for name in self._outputs if name.endswith(ending))

    def _of_layers(self, layers: Sequence[str], ending: str, inputs: Tensors) -> dict[str, Floats]:
        """Return outputs that depend on no text; ONNX Runtime wants all inputs all the same."""
        kinds = {"tensor(int64)": np.int64, "tensor(float)": np.float32}
        feeds = {
            each.name: np.zeros([size if isinstance(size, int) else 1 for size in each.shape], kinds[each.type])
            for each in self._session.get_inputs()
        }
        values = self._session.run([path + ending for path in layers], feeds | inputs) if layers else []
        return dict(zip(layers, values, strict=True))


def batch_of(tokens: Sequence[Sequence[int]], targets: Sequence[int], shares: Sequence[float]) -> TrainingBatch:
    """Pad at least one text to the longest; ``targets`` and ``shares`` are by text."""
    from edgeadapt.bases.classifiergraph import pad

    ids, mask = pad(tokens)
    return TrainingBatch(ids, mask, np.array(targets, np.int64), np.array(shares, np.float32))


def missing_slots(graph: TrainingGraph, slots: Mapping[str, Sequence[str]]) -> list[str]:
    return sorted(set(slots) - set(graph.slots))
