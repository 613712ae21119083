"""Do the exported files answer as the model that was trained? Measured on texts, and a gate on the result.

A quantized base is never assumed to be good: the pair that ships is the pair that is measured. A classifier gives one
answer for a text, a language model one after each token: which of the two it is, its logits' dimensions tell.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from peft import PeftModel
from tokenizers import Tokenizer

from adapters.layout import Floats, Tensors
from aggregation.errors import DataError, EdgeAdaptError
from export.bundle.base import TOKENIZER
from export.onnx import headers
from export.onnx.graph import ANSWER
from export.parity.limits import Limits

MAX_TOKENS = 256  # of one text, where the tokenizer itself sets no limit; what is longer is cut off
PAST = "past"  # in the name of every input that holds what was read before


class ParityError(EdgeAdaptError):
    """The exported files answer too differently from the model that was trained; they must not ship."""

    exit_code = 6


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison of ``count`` answers.

    ``agreement``: the share with the same most likely label or next token. ``max_abs_diff``: the largest difference of
    any choice's probability in any answer. The losses are a language model's, of the next token in nats, a mean; their
    powers of e are perplexities. Held-out texts carry no labels, so a classifier has none.
    """

    agreement: float
    max_abs_diff: float
    count: int
    loss: float | None = None
    loss_of_torch: float | None = None

    @property
    def perplexity_ratio(self) -> float:
        """The exported pair's perplexity over torch's; 1 without losses."""
        if self.loss is None or self.loss_of_torch is None:
            return 1.0
        return math.exp(self.loss - self.loss_of_torch)

    def __str__(self) -> str:
        """One line for a person."""
        if self.loss is None or self.loss_of_torch is None:
            rest = f"largest difference of a probability {self.max_abs_diff:.2g}"
        else:
            ours, theirs = math.exp(self.loss), math.exp(self.loss_of_torch)
            rest = f"perplexity {ours:.3f}, torch's {theirs:.3f} (ratio {self.perplexity_ratio:.4f})"
        return f"{self.agreement:.2%} of {self.count} answers as in torch, {rest}"


@dataclass(frozen=True, slots=True)
class OnnxRunner:
    """An exported base in ONNX Runtime, to be asked with any adapter."""

    session: ort.InferenceSession
    tokenizer: Tokenizer

    @classmethod
    def open(cls, files: Mapping[str, bytes]) -> "OnnxRunner":
        """Load the files of a base (``ExportedBase.files``) as a device does."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        data = files[headers.DATA]
        options.add_external_initializers_from_files_in_memory([headers.DATA], [data], [len(data)])
        session = ort.InferenceSession(files[headers.NATIVE], options, providers=["CPUExecutionProvider"])
        tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
        if tokenizer.truncation is None:
            tokenizer.enable_truncation(MAX_TOKENS)
        return cls(session, tokenizer)

    def probabilities(self, texts: Sequence[str], inputs: Tensors) -> Floats:
        """Shape ``(texts, labels)``, of a classifier. One text at a time, as a device asks."""
        rows = [self.logits(encoding.ids, inputs) for encoding in self.tokenizer.encode_batch(list(texts))]
        return np.exp(_log_softmax(np.concatenate(rows)))

    def logits(self, ids: Sequence[int], inputs: Tensors) -> Floats:
        """Shape ``(1, labels)``, or of a language model ``(1, tokens, vocabulary)``."""
        tokens = np.array([ids], dtype=np.int64)
        feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **inputs}
        for value in self.session.get_inputs():
            if value.name == "position_ids":
                feeds[value.name] = np.arange(len(ids), dtype=np.int64)[None]
            elif value.name.startswith(PAST):  # (batch, heads, tokens so far, width)
                _, heads, _, width = value.shape
                feeds[value.name] = np.zeros((1, heads, 0, width), np.float32)
        answer: Floats = self.session.run([ANSWER], feeds)[0]
        return answer


def torch_logits(model: PeftModel, ids: Sequence[int]) -> Floats:
    """What torch says, in the shape of ``OnnxRunner.logits``."""
    tokens = torch.tensor([list(ids)])
    with torch.no_grad():
        answer = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    logits: Floats = getattr(answer, "logits", answer).numpy()
    return logits


def compare(
    model: PeftModel,
    runner: OnnxRunner,
    inputs: Tensors,
    texts: Sequence[str],
    step: Callable[[], object] = lambda: None,
) -> Parity:
    """Ask torch and ONNX Runtime the same texts.

    Args:
        model: With the trained adapter.
        runner: The exported base.
        inputs: The exported adapter, read back from its file (``adapter.decode``).
        texts: Held-out texts; at least one, and for a language model one of two tokens.
        step: Called after each text.

    Raises:
        DataError: No answer to compare, or one that is not finite.
    """
    rows = []
    for encoding in runner.tokenizer.encode_batch(list(texts)):
        expected, found = torch_logits(model, encoding.ids), runner.logits(encoding.ids, inputs)
        if not (np.isfinite(expected).all() and np.isfinite(found).all()):
            raise DataError("an answer is NaN or infinite; the adapter or the exported base is broken")
        following = encoding.ids[1:] if expected.ndim == 3 else None
        rows.append(_compared(_log_softmax(expected[0]), _log_softmax(found[0]), following))
        step()
    if not sum(map(len, rows)):
        raise DataError("parity needs at least one text, and of a language model one that has two tokens")
    agreement, difference, *losses = np.concatenate(rows).T.astype(np.float64)
    means = [float(loss.mean()) for loss in losses]
    return Parity(float(agreement.mean()), float(difference.max()), len(agreement), *means)


def gate(parity: Parity, limits: Limits) -> None:
    """Return if the files may ship.

    Raises:
        ParityError: They are further from torch than ``limits`` allow.
    """
    broken = []
    if not parity.agreement >= limits.agreement:
        broken.append(f"agreement {parity.agreement:.2%}, at least {limits.agreement:.2%}")
    if not parity.max_abs_diff <= limits.max_abs_diff:
        broken.append(f"largest difference {parity.max_abs_diff:.3g}, at most {limits.max_abs_diff:.3g}")
    if not parity.perplexity_ratio <= limits.perplexity_ratio:
        broken.append(f"perplexity {parity.perplexity_ratio:.3f} times torch's, at most {limits.perplexity_ratio:.3f}")
    if broken:
        raise ParityError(
            f"the exported files are too far from torch on {parity.count} answers ({'; '.join(broken)}); "
            "export with another profile or adapter format"
        )


def _compared(expected: Floats, found: Floats, following: Sequence[int] | None) -> Floats:
    """Of each answer: is it the same, the largest difference, and of a language model both losses (ours first).

    Args:
        expected: Log probabilities, ``(answers, choices)``; a single answer may lack the first dimension.
        found: The same.
        following: The tokens that came after each but the last; None of a classifier.
    """
    p, q = (np.atleast_2d(x)[: None if following is None else -1] for x in (expected, found))
    columns = [p.argmax(axis=1) == q.argmax(axis=1), np.abs(np.exp(p) - np.exp(q)).max(axis=1)]
    if following is not None:
        at = (np.arange(len(p)), np.array(following, dtype=np.int64))
        columns += [-q[at], -p[at]]
    return np.stack(columns, axis=1)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
