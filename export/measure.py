"""The gate before a release: an exported pair as it lies in a bundle, against torch, on held-out texts.

Nothing is assumed of a quantized base: the very files that ship are read back, verified and asked, and so is the model
that was trained, opened through peft. A profile's limits say how far the two may be apart.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from adapters.base import Base, find_base
from adapters.classifier import PhraseClassifier
from adapters.layout import Floats, Tensors
from adapters.manifest import BaseCard, Task
from aggregation.errors import ConfigError, DataError
from aggregation.identity import PublicKey
from export import headers, opened
from export.base import TOKENIZER
from export.parity import ParityError
from export.peft import to_peft
from export.sources import Origin

MAX_TOKENS = 256  # of one text; what is longer is cut off
PAST = "past"  # in the name of every input that holds what was read before


@dataclass(frozen=True, slots=True)
class Limits:
    """How far an exported pair may be from torch."""

    agreement: float  # least share of answers with the same most likely label or token
    divergence: float  # greatest mean divergence (Kullback and Leibler 1951) of an answer, nats


# Set where the profiles' own pairs are, with room for another adapter; docs/export.md has the measurements.
LIMITS = {"fp32": Limits(0.995, 1e-4), "native-int8": Limits(0.95, 0.02), "web-int8": Limits(0.85, 0.15)}
COARSE = Limits(0.7, 0.4)  # of every other profile: four bits


@dataclass(frozen=True, slots=True)
class Measured:
    """The comparison. An answer is a label for a text, or a token after each token of one.

    ``loss`` and ``loss_of_torch`` are of the next token, in nats; their powers of e are perplexities. A classifier's
    held-out texts carry no labels, so it has none.
    """

    task: Task
    profile: str
    format: str
    texts: int
    answers: int
    agreement: float
    divergence: float
    loss: float | None
    loss_of_torch: float | None


def measure(
    bundle: Path, name: str, trusted: Sequence[PublicKey], base_name: str, origin: Origin, texts: Sequence[str]
) -> Measured:
    """Ask the pair in ``bundle`` and torch the same texts.

    Args:
        bundle: With the base and the adapter.
        name: Of the adapter.
        trusted: The keys that may have signed the bundle's files.
        base_name: Where the base that was exported is found.
        origin: What the adapter was exported from.
        texts: Held-out ones; at least one.

    Raises:
        ConfigError: ``base_name`` is another base than the bundle's.
        DataError: The adapter was exported from another file than ``origin``, or an answer is not finite.
        TrustError: A file of the bundle is not what was signed.
    """
    card = opened.read_card(bundle, trusted)
    sidecar, inputs = opened.read_adapter(bundle, name, card, trusted)
    if sidecar.source != origin.sha256:
        raise DataError(f"{name!r} in {bundle} was exported from another file ({sidecar.source[:12]}); export it again")
    base = find_base(base_name)
    if base.digest != card.base_digest:
        raise ConfigError(f"{base_name} is the base {base.digest[:12]}, {bundle} was made from {card.base_digest[:12]}")
    files = opened.read_base(bundle, card)
    tokenizer = Tokenizer.from_str(files[TOKENIZER].decode())
    tokenizer.enable_truncation(min(MAX_TOKENS, (tokenizer.truncation or {}).get("max_length", MAX_TOKENS)))
    exported, trained = _Exported(files, inputs), _model(base, card.task, origin, len(sidecar.labels))
    rows = [_row(exported, trained, tokenizer.encode(text).ids, card.task) for text in texts]
    return _summary(card, sidecar.format, np.concatenate(rows), len(texts))


def gate(found: Measured) -> None:
    """Return if the pair may ship.

    Raises:
        ParityError: It is further from torch than its profile allows.
    """
    limits = LIMITS.get(found.profile, COARSE)
    if not (found.agreement >= limits.agreement and found.divergence <= limits.divergence):
        raise ParityError(
            f"the exported pair is too far from torch for {found.profile}: agreement {found.agreement:.1%} (at least "
            f"{limits.agreement:.1%}), divergence {found.divergence:.4f} (at most {limits.divergence}); export with "
            "another profile or format"
        )


def described(found: Measured) -> str:
    """One line for a person."""
    losses = "" if found.loss is None else f", loss {found.loss:.4f} against {found.loss_of_torch:.4f}"
    return (
        f"{found.agreement:.1%} of {found.answers} answers agree, divergence {found.divergence:.5f} nats{losses} "
        f"({found.profile} base, {found.format} adapter, {found.texts} texts)"
    )


class _Exported:
    """A base and an adapter in ONNX Runtime."""

    def __init__(self, files: dict[str, bytes], inputs: Tensors) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        data = files[headers.DATA]
        options.add_external_initializers_from_files_in_memory([headers.DATA], [data], [len(data)])
        self.session = ort.InferenceSession(files[headers.NATIVE], options, providers=["CPUExecutionProvider"])
        self.inputs = inputs

    def logits(self, ids: Sequence[int]) -> Floats:
        """Shape ``(answers, choices)``."""
        tokens = np.array([ids], dtype=np.int64)
        feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **self.inputs}
        for value in self.session.get_inputs():
            if value.name == "position_ids":
                feeds[value.name] = np.arange(len(ids), dtype=np.int64)[None]
            elif value.name.startswith(PAST):  # (batch, heads, tokens so far, width)
                _, heads, _, width = value.shape
                feeds[value.name] = np.zeros((1, heads, 0, width), np.float32)
        answer: Floats = self.session.run(["logits"], feeds)[0]
        return answer.reshape(-1, answer.shape[-1])


def _model(base: Base, task: Task, origin: Origin, labels: int) -> PeftModel:
    transformers_logging.disable_progress_bar()
    kind = AutoModelForCausalLM if task == "text-generation" else AutoModel
    inner: Any = kind.from_pretrained(base.folder, local_files_only=True, dtype=torch.float32)
    if task == "text-classification":
        inner = PhraseClassifier(inner, inner.config.hidden_size, labels)
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        to_peft(origin.tensors, origin.method, Path(folder) / "peft")
        return PeftModel.from_pretrained(inner, Path(folder) / "peft").eval()


def _row(exported: _Exported, trained: PeftModel, ids: list[int], task: Task) -> Floats:
    """Shape ``(answers, 4)``: agreement, divergence, and the losses of the pair and of torch."""
    with torch.no_grad():
        answer = trained(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64))
    theirs = (answer.logits if task == "text-generation" else answer).numpy()
    p, q = (_log_softmax(x.reshape(-1, x.shape[-1])) for x in (theirs, exported.logits(ids)))
    losses = np.zeros((2, len(p)))
    if task == "text-generation":
        p, q, following = p[:-1], q[:-1], np.array(ids[1:], dtype=np.int64)
        losses = np.stack([-np.take_along_axis(x, following[:, None], axis=1)[:, 0] for x in (q, p)])
    divergence = (np.exp(p) * (p - q)).sum(axis=1)
    return np.stack([p.argmax(axis=1) == q.argmax(axis=1), divergence, *losses], axis=1)


def _summary(card: BaseCard, form: str, rows: Floats, texts: int) -> Measured:
    if not len(rows) or not np.isfinite(rows).all():
        raise DataError("no answer to compare, or one that is not finite: the texts are too short or a file is broken")
    agreement, divergence, *losses = (float(value) for value in rows.mean(axis=0))
    loss, loss_of_torch = losses if card.task == "text-generation" else (None, None)
    return Measured(card.task, card.profile, form, texts, len(rows), agreement, divergence, loss, loss_of_torch)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
