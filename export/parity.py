"""Do the exported files answer as the model that was trained? Measured on texts, and a gate on the result.

A quantized base is never assumed to be good: the pair that ships is the pair that is measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from peft import PeftModel
from tokenizers import Tokenizer

from adapters.layout import Floats, Tensors
from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from export import headers
from export.base import ExportedBase
from export.graph import ANSWER, TOKENS

BATCH = 32  # texts that torch sees at once


class ParityError(EdgeAdaptError):
    """The exported files answer too differently from the model that was trained; they must not ship."""

    exit_code = 6


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison on ``count`` texts.

    ``agreement``: the share of texts with the same most likely label. ``max_abs_diff``: the largest difference of any
    label's probability on any text.
    """

    agreement: float
    max_abs_diff: float
    count: int


@dataclass(frozen=True, slots=True)
class OnnxRunner:
    """An exported base in ONNX Runtime, to be asked with any adapter."""

    session: ort.InferenceSession
    tokenizer: Tokenizer

    @classmethod
    def open(cls, exported: ExportedBase) -> "OnnxRunner":
        """Load the graph as a device does."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        data = exported.files[headers.DATA]
        options.add_external_initializers_from_files_in_memory([headers.DATA], [data], [len(data)])
        session = ort.InferenceSession(exported.model, options, providers=["CPUExecutionProvider"])
        return cls(session, Tokenizer.from_str(exported.tokenizer.decode()))

    def probabilities(self, texts: Sequence[str], inputs: Tensors) -> Floats:
        """Shape ``(texts, labels)``. One text at a time, as a device asks."""
        rows = [self._logits(encoding.ids, inputs) for encoding in self.tokenizer.encode_batch(list(texts))]
        return _softmax(np.concatenate(rows))

    def _logits(self, ids: Sequence[int], inputs: Tensors) -> Floats:
        tokens: NDArray[np.int64] = np.array([ids], dtype=np.int64)
        feeds = dict(zip(TOKENS, (tokens, np.ones_like(tokens)), strict=True))
        logits: Floats = self.session.run([ANSWER], {**feeds, **inputs})[0]
        return logits


def compare(model: PeftModel, runner: OnnxRunner, inputs: Tensors, texts: Sequence[str]) -> Parity:
    """Ask torch and ONNX Runtime the same texts.

    Args:
        model: With the adapter's registry tensors loaded (``adapters.classifier.load``).
        runner: The exported base.
        inputs: The exported adapter, read back from its file (``adapter.decode``).
        texts: Held-out texts; at least one.

    Raises:
        DataError: No texts, or an answer that is not finite.
    """
    if not texts:
        raise DataError("parity needs at least one text")
    expected, found = _torch(model, runner.tokenizer, texts), runner.probabilities(texts, inputs)
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise DataError("an answer is NaN or infinite; the adapter or the exported base is broken")
    agreement = float((expected.argmax(1) == found.argmax(1)).mean())
    return Parity(agreement, float(np.abs(expected - found).max()), len(texts))


def gate(parity: Parity, minimum_agreement: float) -> None:
    """Return if the files may ship.

    Raises:
        ParityError: The agreement is below ``minimum_agreement`` (a share, 0 to 1).
        ConfigError: The minimum is no share.
    """
    if not 0 <= minimum_agreement <= 1:
        raise ConfigError(f"the minimum agreement {minimum_agreement} is not between 0 and 1")
    if not parity.agreement >= minimum_agreement:
        raise ParityError(
            f"the exported files agree with torch on {parity.agreement:.1%} of {parity.count} texts, below "
            f"{minimum_agreement:.1%}; export with another profile or adapter format"
        )


def _torch(model: PeftModel, tokenizer: Tokenizer, texts: Sequence[str]) -> Floats:
    encodings = tokenizer.encode_batch(list(texts))
    rows = []
    with torch.no_grad():
        for start in range(0, len(texts), BATCH):
            ids = [torch.tensor(encoding.ids) for encoding in encodings[start : start + BATCH]]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
            mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
            rows.append(model(input_ids=padded, attention_mask=mask).numpy())
    return _softmax(np.concatenate(rows))


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Floats = powers / powers.sum(axis=1, keepdims=True)
    return result
