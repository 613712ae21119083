"""Exported files against the trained model: measured on texts, and held to limits.

A quantized base is never assumed to be good: the very files that ship are measured. A classifier gives one answer for a
text, a language model one after each token; the dimensions of the logits show which of the two it is. The limits are
about twice as far as what was measured; docs/explanation/export.md has the measurements and the two exceptions."""

import math
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from peft import PeftModel

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, check_fields
from edgeadapt.bases.base import find_base
from edgeadapt.bases.classifiergraph import MAX_ROWS, ClassifierGraph, open_session
from edgeadapt.bases.readers import open_reader
from edgeadapt.formats.bundle import MODEL, TOKENIZER, Bundle, VerifiedAdapter
from edgeadapt.formats.calibration import Calibration, calibrate
from edgeadapt.formats.graphinputs import BY_ROW, OFFSET, PROMPT, SCALES, UP_BIAS, virtual_tokens, with_placeholders
from edgeadapt.formats.layout import Floats, Tensors
from edgeadapt.formats.manifest import BaseManifest, PrivacyBound, Task
from edgeadapt.formats.phrases import read_phrases
from edgeadapt.methods.peft.folder import to_peft
from export.bundle.base import bare_model
from export.bundle.sources import Origin, as_slots, fitted
from export.onnx.classifier import open_base
from export.onnx.exported import Profile
from export.onnx.graph import ANSWER

MAX_TOKENS = 256  # tokens of one text, where the tokenizer itself sets no limit; longer texts are truncated
MAX_TOGETHER = 64  # texts of one run in torch
MIXED_TEXTS = 128  # texts that are asked in mixed batches too
MIXED_LIMIT = 0.001  # difference of a probability; a base that exceeds it must not state independent rows
PAST = "past"  # part of the name of every input that holds the KV cache


class ParityError(EdgeAdaptError):
    """The exported files differ too much from the trained model; they must not ship."""

    exit_code = 6


@dataclass(frozen=True, slots=True)
class Limits:
    """What ``gate`` demands.

    A classifier is held to the largest difference of a probability, a language model to its perplexity: among tens of
    thousands of tokens the one largest difference says little. Raises ConfigError: ``agreement`` is not between 0 and
    1.
    """

    agreement: float  # least fraction of answers with the same most likely label or token, 0 to 1
    max_abs_diff: float = inf  # greatest difference of a probability
    perplexity_ratio: float = inf  # greatest perplexity, over torch's

    def __post_init__(self) -> None:
        check_fields(self, "", [("agreement", 0 <= self.agreement <= 1, "between 0 and 1")], "the minimum ")


LIMITS: dict[Task, dict[Profile, Limits]] = {
    "text-classification": {
        Profile.FP32: Limits(0.995, 0.01),
        Profile.NATIVE_INT8: Limits(0.965, 0.05),
        Profile.NATIVE_INT4: Limits(0.83, 0.35),
        Profile.WEB_INT8: Limits(0.95, 0.16),
    },
    "text-generation": {
        Profile.FP32: Limits(0.995, perplexity_ratio=1.001),
        Profile.NATIVE_INT8: Limits(0.9, perplexity_ratio=1.01),
        Profile.NATIVE_INT4: Limits(0.85, perplexity_ratio=1.1),
        Profile.WEB_INT8: Limits(0.7, perplexity_ratio=1.04),
    },
}


def limits_of(profile: str, task: Task) -> Limits:
    """Raises ConfigError: this release does not know the profile."""
    try:
        return LIMITS[task][Profile(profile)]
    except ValueError:
        reason = f"the bundle's profile {profile!r} has no limits here; export the base again"
        raise ConfigError(reason, about="profile") from None


@dataclass(frozen=True, slots=True)
class Parity:
    """The comparison of ``count`` answers.

    ``agreement``: the fraction with the same most likely label or next token. ``max_abs_diff``: the largest difference
    of any probability in any answer, 0 to 1. ``mixed_diff``: the same between a classifier's answer to a text alone
    and in a mixed batch. The losses are a language model's mean negative log likelihood of the next
    token in nats; their exponentials are perplexities. The accuracies are a classifier's shares of right answers, where
    the labels of the texts are known.

    >>> round(Parity(1.0, 0.0, 8, loss=1.1, torch_loss=1.0).perplexity_ratio, 3)
    1.105
    >>> str(Parity(0.99, 0.03, 200))
    '99.00% of 200 answers as in torch, largest difference of a probability 0.03, in a mixed batch 0'
    """

    agreement: float
    max_abs_diff: float
    count: int
    loss: float | None = None
    torch_loss: float | None = None
    mixed_diff: float = 0.0
    accuracy: float | None = None
    torch_accuracy: float | None = None

    @property
    def perplexity_ratio(self) -> float:
        """The exported files' perplexity over torch's; 1 without losses."""
        if self.loss is None or self.torch_loss is None:
            return 1.0
        return math.exp(self.loss - self.torch_loss)

    def __str__(self) -> str:
        if self.loss is None or self.torch_loss is None:
            rest = (
                f"largest difference of a probability {self.max_abs_diff:.2g}, in a mixed batch {self.mixed_diff:.2g}"
            )
        else:
            ours, theirs = math.exp(self.loss), math.exp(self.torch_loss)
            rest = f"perplexity {ours:.3f}, torch's {theirs:.3f} (ratio {self.perplexity_ratio:.4f})"
        return f"{self.agreement:.2%} of {self.count} answers as in torch, {rest}"


@dataclass(frozen=True, slots=True)
class OnnxRunner:
    tokenizer: Any
    graph: ClassifierGraph | None  # None for a language model
    session: ort.InferenceSession | None  # of a language model

    @classmethod
    def open(cls, folder: Path, manifest: BaseManifest) -> "OnnxRunner":
        """Open the base in ``folder``, whose weights are mapped into memory."""
        tokenizer = open_reader((folder / TOKENIZER).read_bytes())
        if tokenizer.truncation is None:
            tokenizer.enable_truncation(MAX_TOKENS)
        if manifest.task == "text-classification":
            graph = open_base(folder, manifest.files, manifest.slots, manifest.independent_rows)
            return cls(tokenizer, graph, None)
        return cls(tokenizer, None, open_session((folder / MODEL).read_bytes(), folder, manifest.slots))

    def encode(self, texts: Sequence[str], inputs: Tensors) -> Sequence[Any]:
        """Tokenize texts, truncated to what the virtual tokens of an adapter leave."""
        if virtual := virtual_tokens(inputs):
            limit = (self.tokenizer.truncation or {})["max_length"]
            self.tokenizer.enable_truncation(limit - virtual)
            encoded: Sequence[Any] = self.tokenizer.encode_batch(list(texts))
            self.tokenizer.enable_truncation(limit)
            return encoded
        whole: Sequence[Any] = self.tokenizer.encode_batch(list(texts))
        return whole

    def classify(self, texts: Sequence[str], inputs: Tensors, step: Callable[[], object] = lambda: None) -> Floats:
        """Compute a classifier's logits, shape ``(texts, labels)``, or ``(0, 0)`` without texts. It runs one text at a
        time, as a device does, and calls ``step`` after each."""
        rows = []
        for encoding in self.encode(texts, inputs):
            rows.append(self.logits(encoding.ids, inputs))
            step()
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

    def logits(self, ids: Sequence[int], inputs: Tensors) -> Floats:
        """Compute a classifier's logits, shape ``(1, labels)``, or a language model's, ``(1, tokens, vocabulary)``."""
        if self.graph is not None:
            return self.graph.logits(ids, self.graph.feeds(inputs))[np.newaxis]
        assert self.session is not None  # noqa: S101
        virtual = virtual_tokens(inputs)
        tokens = np.array([with_placeholders(ids, virtual)], dtype=np.int64)
        feeds: dict[str, Any] = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **inputs}
        for value in self.session.get_inputs():
            if value.name == "position_ids":
                feeds[value.name] = np.arange(tokens.shape[1], dtype=np.int64)[None]
            elif value.name.startswith(PAST):  # (batch, heads, past tokens, width)
                _, heads, _, width = value.shape
                feeds[value.name] = np.zeros((1, heads, 0, width), np.float32)
        answer: Floats = self.session.run([ANSWER], feeds)[0]
        return answer[:, virtual:]

    def mixed(self, texts: Sequence[Sequence[int]], inputs: Tensors) -> list[Floats]:
        """Compute a classifier's logits, ``(labels,)`` for each text, in a batch whose other rows have no updates."""
        assert self.graph is not None  # noqa: S101
        without = {name: _without(name, value) for name, value in inputs.items()}
        return self.graph.mixed([text for text in texts for _ in range(2)], [inputs, without] * len(texts))[::2]


def _without(name: str, value: Floats) -> Floats:
    if name.endswith(BY_ROW) or name == PROMPT:
        return np.zeros_like(value)  # the same rank or length, so that the rows can share a run
    return value[:0] if name.endswith((*SCALES, OFFSET, *UP_BIAS)) else value


def torch_logits(model: PeftModel, ids: Sequence[int]) -> Floats:
    """Compute torch's logits, in the shape of ``OnnxRunner.logits``."""
    return _torch_batch(model, [ids])


def _torch_batch(model: PeftModel, rows: Sequence[Sequence[int]]) -> Floats:
    tokens = torch.tensor([list(ids) for ids in rows])
    with torch.no_grad():
        answer = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    logits: Floats = getattr(answer, "logits", answer).numpy()
    return logits[:, -len(rows[0]) :] if logits.ndim == 3 else logits  # without those of virtual tokens


def compare(
    model: PeftModel,
    runner: OnnxRunner,
    inputs: Tensors,
    texts: Sequence[str],
    step: Callable[[], object] = lambda: None,
    labels: Sequence[int] | None = None,
) -> Parity:
    """Run torch, with the trained adapter, and ONNX Runtime on the same held-out texts; call ``step`` after each.
    ``inputs`` is the exported adapter, read back from its file; ``labels`` are a classifier's right answers, if they
    are known. Raises DataError: there is no answer to compare, or one is not finite."""
    rows: list[Floats] = []
    alone: list[tuple[Sequence[int], Floats]] = []
    tokens = [encoding.ids for encoding in runner.encode(texts, inputs)]
    for ids, expected in zip(tokens, _in_torch(model, tokens, together=runner.graph is not None), strict=True):
        measured = runner.logits(ids, inputs)
        if not (np.isfinite(expected).all() and np.isfinite(measured).all()):
            raise DataError("an answer is NaN or infinite; the adapter or the exported base is broken", about="logits")
        following = ids[1:] if expected.ndim == 3 else None
        rows.append(_compared(log_softmax(expected[0]), log_softmax(measured[0]), following))
        alone.append((ids, measured[0]))
        step()
    if not sum(map(len, rows)):
        raise DataError(
            "parity needs at least one text, and for a language model one of at least two tokens", about="texts"
        )
    agreement, difference, *rest = np.concatenate(rows).T.astype(np.float64)
    parity = Parity(float(agreement.mean()), float(difference.max()), len(agreement))
    if runner.graph is None:
        return replace(parity, loss=float(rest[0].mean()), torch_loss=float(rest[1].mean()))
    parity = replace(parity, mixed_diff=_mixed_diff(runner, inputs, alone))
    if labels is None:
        return parity
    ours, theirs = (float((answers == labels).mean()) for answers in rest)
    return replace(parity, accuracy=ours, torch_accuracy=theirs)


def _in_torch(model: PeftModel, rows: Sequence[Sequence[int]], *, together: bool) -> Iterator[Floats]:
    """Compute ``torch_logits`` of each row. ``together``: rows of one length share a run, which needs no padding."""
    if not together:
        yield from (torch_logits(model, ids) for ids in rows)
        return
    by_row: dict[int, Floats] = {}
    for length in sorted({len(ids) for ids in rows}):
        same = [row for row, ids in enumerate(rows) if len(ids) == length]
        for at in range(0, len(same), MAX_TOGETHER):
            part = same[at : at + MAX_TOGETHER]
            logits = _torch_batch(model, [rows[row] for row in part])
            by_row.update(zip(part, logits[:, np.newaxis], strict=True))
    yield from (by_row[row] for row in range(len(rows)))


def gate(parity: Parity, limits: Limits, *, privacy: PrivacyBound | None = None) -> None:
    """Check that the files may ship.

    ``privacy``: as the adapter's manifest states it. With the noise of differential privacy, the labels of a classifier
    are near ties where the noise is as large as the update, and rounding turns them. Raises ParityError: a measure
    exceeds ``limits`` or is NaN; ``value`` names the fields of ``Parity`` that do."""
    broken = too_far(parity, limits)
    if broken:
        remedy = "export with another profile or adapter format"
        if privacy is not None:
            remedy += (
                f". The adapter has the noise of differential privacy ({privacy}): where it outweighs the "
                "update (edgeadapt simulate privacy), answers are near ties, which rounding turns; take profile fp32, "
                "more devices, fewer rounds or a larger epsilon"
            )
        raise ParityError(
            f"the exported files are too far from torch on {parity.count} answers ({'; '.join(broken.values())}); "
            f"{remedy}",
            about="parity",
        )


def too_far(parity: Parity, limits: Limits) -> dict[str, str]:
    """Each field that exceeds ``limits`` or is NaN, with a reason; empty if files may ship."""
    broken = {}
    if not parity.agreement >= limits.agreement:
        broken["agreement"] = f"agreement {parity.agreement:.2%}, at least {limits.agreement:.2%}"
    if not parity.max_abs_diff <= limits.max_abs_diff:
        broken["max_abs_diff"] = f"largest difference {parity.max_abs_diff:.3g}, at most {limits.max_abs_diff:.3g}"
    if not parity.perplexity_ratio <= limits.perplexity_ratio:
        broken["perplexity_ratio"] = (
            f"perplexity {parity.perplexity_ratio:.3f} times torch's, at most {limits.perplexity_ratio:.3f}"
        )
    if not parity.mixed_diff <= MIXED_LIMIT:
        broken["mixed_diff"] = f"in a mixed batch {parity.mixed_diff:.3g} from the answer alone, at most {MIXED_LIMIT}"
    return broken


def log_softmax(logits: Floats) -> Floats:
    """Compute the logarithm of the softmax over the last axis; exact for logits of any size.

    >>> np.exp(log_softmax(np.float32([1000, 1000]))).tolist()
    [0.5, 0.5]
    """
    shifted = logits - logits.max(axis=-1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def _mixed_diff(runner: OnnxRunner, inputs: Tensors, alone: Sequence[tuple[Sequence[int], Floats]]) -> float:
    result = 0.0
    half = MAX_ROWS // 2
    for at in range(0, min(len(alone), MIXED_TEXTS), half):
        texts, logits = zip(*alone[at : at + half], strict=True)
        try:
            mixed, expected = np.stack(runner.mixed(texts, inputs)), np.stack(logits)
        except Exception:  # ONNX Runtime's classes have no common base: the graph takes one adapter at a time
            return inf
        result = max(result, float(np.abs(np.exp(log_softmax(mixed)) - np.exp(log_softmax(expected))).max()))
    return result


def _compared(expected: Floats, found: Floats, following: Sequence[int] | None) -> Floats:
    """Compare log probabilities ``(answers, choices)``; a single answer may lack the first dimension. Returns for each
    answer: whether it is the same, the largest difference, and of both, ours first: a language model's losses, a
    classifier's answers. ``following``: the tokens that follow all but the last; None for a classifier."""
    p, q = (np.atleast_2d(x)[: None if following is None else -1] for x in (expected, found))
    answers = [q.argmax(axis=1), p.argmax(axis=1)]
    columns = [answers[0] == answers[1], np.abs(np.exp(p) - np.exp(q)).max(axis=1)]
    if following is None:
        return np.stack(columns + answers, axis=1)
    at = (np.arange(len(p)), np.array(following, dtype=np.int64))
    return np.stack([*columns, -q[at], -p[at]], axis=1)


@dataclass(frozen=True, slots=True)
class ExportedPair:
    """A bundle's base and one of its adapters, ready to run, and the trained model in torch."""

    base: BaseManifest
    adapter: VerifiedAdapter
    runner: OnnxRunner
    model: PeftModel

    def measured(
        self, texts: Sequence[str], step: Callable[[], object] = lambda: None
    ) -> tuple[Parity, Limits, dict[str, str]]:
        """Compare the two as ``compare``. Returns also the limits of the profile, and what is ``too_far``."""
        parity = compare(self.model, self.runner, self.adapter.inputs, texts, step)
        limits = limits_of(self.base.profile, self.base.task)
        return parity, limits, too_far(parity, limits)


def open_pair(bundle: Bundle, name: str, base_name: str, origin: Origin) -> ExportedPair:
    """Read back and verify the base and the adapter ``name`` of a bundle, which was exported from ``origin``. Raises
    ConfigError: ``base_name`` is another base than the bundle's. DataError: the adapter was exported from another file
    than ``origin``. TrustError: a file of the bundle is not what was signed."""
    verified = bundle.base()
    manifest, adapter = verified.manifest, bundle.adapter(name, verified.manifest)
    if (source := adapter.manifest.source) != origin.sha256:
        reason = f"{name!r} in {bundle.folder} was exported from another file ({source[:12]}); export it again"
        raise DataError(reason, about="source")
    base = find_base(base_name)
    if base.digest != manifest.base_digest:
        raise ConfigError(
            f"{base_name} is the base {base.digest[:12]}, {bundle.folder} holds {manifest.base_digest[:12]}: name "
            "the base that was exported",
            about="--base",
        )
    runner = OnnxRunner.open(verified.folder, manifest)
    verified.check()
    exported = fitted(as_slots(origin), manifest.base_digest, manifest.slots)
    inner = bare_model(base, manifest.task, exported.tensors, len(adapter.manifest.labels))
    return ExportedPair(manifest, adapter, runner, _trained(inner, origin))


def _trained(inner: Any, origin: Origin) -> PeftModel:
    """Attach the adapter with peft: the conversion of its method to LoRA is part of what is compared."""
    with tempfile.TemporaryDirectory(prefix="edgeadapt-") as folder:
        to_peft(origin.tensors, origin.peft_config, Path(folder) / "peft")
        with warnings.catch_warnings():  # peft uses a deprecated argument of transformers
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(inner, Path(folder) / "peft").eval()


FEWEST = 50  # phrases; fewer leave the calibration error itself uncertain


def read_examples(path: Path, labels: Sequence[str]) -> list[tuple[str, int]]:
    """Read the phrases in a file of ``edgeadapt.formats.phrases``, each with the number of its label among ``labels``.
    Raises ConfigError, DataError: as ``read_phrases``; or there are fewer than ``FEWEST`` phrases, or the head has no
    row for a label."""
    pairs, numbers = read_phrases(path), {label: number for number, label in enumerate(labels)}
    if unknown := sorted({label for label, _ in pairs} - set(numbers)):
        reason = f"the adapter has no label {unknown[0][:40]!r}, which {path} has; it has: {', '.join(labels)[:120]}"
        raise DataError(reason, about="label")
    if len(pairs) < FEWEST:
        reason = f"{path} has {len(pairs)} phrases, and a temperature needs {FEWEST} that were not trained on; add some"
        raise DataError(reason, about="--calibrate")
    return [(phrase, numbers[label]) for label, phrase in pairs]


def fit_temperature(
    runner: OnnxRunner, inputs: Tensors, examples: Sequence[tuple[str, int]], step: Callable[[], object] = lambda: None
) -> Calibration:
    """Fit a temperature on what devices run, and measure what it does to phrases that it was not fitted on.
    Quantization moves probabilities, so a temperature of the model in torch would be that of another classifier. Raises
    DataError: an answer is not finite, or a label has no row in the head."""
    logits = runner.classify([phrase for phrase, _ in examples], inputs, step)
    labels = np.array([label for _, label in examples], np.int64)
    if (rows := logits.shape[1]) <= labels.max():
        reason = f"the adapter's head has {rows} rows, too few for its labels; name each row, in order (--labels)"
        raise DataError(reason, about="labels")
    if not np.isfinite(logits).all():
        raise DataError("an answer is NaN or infinite; the adapter or the exported base is broken", about="logits")
    return calibrate(logits, labels)
