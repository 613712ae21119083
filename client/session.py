"""Answers phrases with the frozen base and one adapter at a time. Needs neither torch nor flwr nor transformers.

Everything comes verified from ``trust.py``. An adapter is feeds for the graph, held in memory in float32, so that
switching to one that was used before is exchanging a reference (docs/decisions/0003-int8-on-a-device.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from adapters.layout import Floats
from adapters.manifest import Sidecar
from aggregation.errors import ConfigError, DataError
from client.trust import MODEL, TOKENIZER, Trust, VerifiedBase, adapter_names

MAX_TEXT = 2**16  # characters; what fits the model's limit of tokens is far below
MAX_LOADED = 32  # adapters held in memory
SHARED = "global"


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label, and its probability in the model's eyes."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class _Loaded:
    sidecar: Sidecar
    feeds: dict[str, Any]  # graph input → OrtValue


class Session:
    """One ONNX Runtime session over the base of a bundle, and the adapter that is in use.

    Phrases are answered one by one: an answer then depends neither on its neighbours nor on padding, whatever the
    base was quantized to, and nothing is spent on padding.
    """

    def __init__(self, bundle: Path, trust: Trust, base: VerifiedBase, threads: int) -> None:
        """Use ``open``, which verifies."""
        self._bundle, self._trust, self._base = bundle, trust, base
        self._loaded: dict[str, _Loaded] = {}
        self._current: _Loaded | None = None
        self._tokenizer = Tokenizer.from_str(base.files[TOKENIZER].decode())
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._run = ort.InferenceSession(base.files[MODEL], options, providers=["CPUExecutionProvider"])

    @classmethod
    def open(cls, bundle: Path, trust: Path | None = None, *, threads: int = 1) -> Self:
        """Verify the base of ``bundle`` and load it. No adapter is in use yet.

        Args:
            bundle: The folder.
            trust: The pinned public keys; by default ``trust.pem`` in the folder that holds the bundle.
            threads: For the products of matrices; more than one pays only for long texts.

        Raises:
            TrustError: No pinned keys, or the base is not what one of them signed.
            DataError: A file is missing, or the verified base cannot be loaded.
        """
        if not bundle.is_dir():
            raise DataError(f"there is no bundle at {bundle}")
        pinned = Trust.open(bundle, trust)
        base = pinned.base(bundle)
        try:
            return cls(bundle, pinned, base, threads)
        except Exception as error:  # tokenizers and onnxruntime raise classes with no common base
            raise DataError(f"the base in {bundle} cannot be loaded by this version of the client: {error}") from error

    @property
    def adapter(self) -> Sidecar | None:
        """What is said of the adapter in use."""
        return self._current.sidecar if self._current else None

    def names(self) -> list[str]:
        """The adapters that the bundle seems to have; ``check`` and ``use`` verify."""
        return adapter_names(self._bundle)

    def default(self) -> str:
        """The adapter for someone who names none: the private one, else the shared one, else the only one.

        Raises:
            ConfigError: There is no such one; the message lists what there is.
            TrustError: A sidecar is not what a pinned key signed.
        """
        names = self.names()
        private = [name for name in names if self._trust.sidecar(self._bundle, name).parent is not None]
        for choice in (private, [name for name in names if name == SHARED], names):
            if len(choice) == 1:
                return choice[0]
            if choice:
                raise ConfigError(f"several adapters could be meant; choose with --adapter: {', '.join(choice)}")
        raise DataError(f"the bundle {self._bundle} has no adapter")

    def use(self, name: str) -> Sidecar:
        """Switch to an adapter, verifying it when it is first used. If that fails, the one in use stays.

        Raises:
            TrustError, DataError, ConfigError: As ``Trust.adapter``.
        """
        loaded = self._loaded.get(name) or self._load(name)
        # Most recently used last; the first is given up when there are too many.
        self._loaded.pop(name, None)
        self._loaded[name] = loaded
        if len(self._loaded) > MAX_LOADED:
            del self._loaded[next(iter(self._loaded))]
        self._current = loaded
        return loaded.sidecar

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """The most likely label of each text. Raises as ``rank``."""
        return [ranking[0] for ranking in self.rank(texts, 1)]

    def rank(self, texts: Sequence[str], top: int) -> list[list[Prediction]]:
        """The ``top`` most likely labels of each text, best first.

        Raises:
            DataError: A text is empty, longer than ``MAX_TEXT`` or not Unicode, or an answer is not finite.
            ConfigError: No adapter is in use.
        """
        if (current := self._current) is None:
            raise ConfigError("no adapter is in use; choose one first")
        rows = [self._tokens(text) for text in texts]
        return [_best(self._probabilities(ids, current), current.sidecar.labels, top) for ids in rows]

    def _load(self, name: str) -> _Loaded:
        verified = self._trust.adapter(self._bundle, self._base, name)
        feeds = {key: ort.OrtValue.ortvalue_from_numpy(value) for key, value in verified.inputs.items()}
        return _Loaded(verified.sidecar, feeds)

    def _tokens(self, text: str) -> list[int]:
        if not text.strip():
            raise DataError("an empty text has no intent; give a phrase")
        if len(text) > MAX_TEXT:
            raise DataError(f"a text of {len(text)} characters is above the limit of {MAX_TEXT}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError("a text is not valid Unicode; give it in UTF-8") from error
        encoding = self._tokenizer.encode(text)
        if all(encoding.special_tokens_mask):
            raise DataError(f"the text {text[:40]!r} has no sign that the model knows; give a phrase")
        return list(encoding.ids)

    def _probabilities(self, ids: list[int], adapter: _Loaded) -> Floats:
        tokens = np.array([ids], dtype=np.int64)
        feeds = {
            "input_ids": ort.OrtValue.ortvalue_from_numpy(tokens),
            "attention_mask": ort.OrtValue.ortvalue_from_numpy(np.ones_like(tokens)),
        }
        logits: Floats = self._run.run_with_ort_values(["logits"], feeds | adapter.feeds)[0].numpy()[0]
        powers = np.exp(logits - logits.max())
        probabilities: Floats = powers / powers.sum()
        if not np.isfinite(probabilities).all():
            raise DataError(f"adapter {adapter.sidecar.name!r} gave an answer that is not finite; use another")
        return probabilities


def _best(probabilities: Floats, labels: Sequence[str], top: int) -> list[Prediction]:
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [Prediction(labels[i], float(probabilities[i])) for i in order]
