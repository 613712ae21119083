"""Answers phrases with the frozen base and one adapter, or one for each. Needs neither torch nor flwr nor transformers.

Everything comes verified from ``library.py``. An adapter is feeds for the graph, held in memory in float32, so that
switching to one that was used before is exchanging a reference (docs/decisions/0003-int8-on-a-device.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from tokenizers import Tokenizer

from adapters.layout import Floats, Tensors
from adapters.ondevice import LORA_A
from aggregation.errors import ConfigError, DataError
from client.inference.cache import Cache
from client.inference.compose import Adapter, Choice
from client.inference.library import Library, chosen
from client.inference.rows import alike, padded, stacked
from client.inference.text import checked
from client.inference.trust import MODEL, TOKENIZER, VerifiedBase

MAX_LOADED = 32  # adapters held in memory
MAX_LOADED_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label, and its probability in the model's eyes."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class _Loaded:
    adapter: Adapter
    feeds: dict[str, Any] = field(repr=False)  # graph input → OrtValue


class ClassificationSession:
    """One ONNX Runtime session over the base of a bundle, and the adapter that is in use.

    ``rank`` and ``classify`` answer phrases one by one: an answer then depends neither on its neighbours nor on
    padding, whatever the base was quantized to, and nothing is spent on padding. ``rank_rows`` answers a batch at once.
    """

    def __init__(self, library: Library, threads: int, loaded: Cache[_Loaded]) -> None:
        """Use ``open``, which verifies."""
        self._library, self._loaded = library, loaded
        self._current: _Loaded | None = None
        self._tokenizer = Tokenizer.from_str(library.base.files[TOKENIZER].decode())
        self._run = _session(library.base, threads)
        self._dimensions = _declared(self._run)

    @classmethod
    def open(
        cls,
        bundle: Path,
        trust: Path | None = None,
        *,
        threads: int = 1,
        loaded: int = MAX_LOADED,
        loaded_bytes: int = MAX_LOADED_BYTES,
    ) -> Self:
        """Verify the base of ``bundle`` and load it. No adapter is in use yet.

        Args:
            bundle: The folder.
            trust: The pinned public keys; by default ``trust.pem`` in the folder that holds the bundle.
            threads: For the products of matrices; more than one pays only for long texts.
            loaded: How many adapters stay in memory.
            loaded_bytes: How many bytes these may take.

        Raises:
            TrustError: No pinned keys, or the base is not what one of them signed.
            DataError: A file is missing, or the verified base cannot be loaded.
            ConfigError: The base is for another task, or nothing may stay in memory.
        """
        return cls.of(Library.open(bundle, trust, "text-classification"), threads, loaded, loaded_bytes)

    @classmethod
    def of(
        cls, library: Library, threads: int = 1, loaded: int = MAX_LOADED, loaded_bytes: int = MAX_LOADED_BYTES
    ) -> Self:
        """Load a base that is verified already. Arguments and errors as ``open``."""
        cache: Cache[_Loaded] = Cache(loaded, loaded_bytes)
        try:
            session = cls(library, threads, cache)
        except Exception as error:  # tokenizers and onnxruntime raise classes with no common base
            raise DataError(f"the base in {library.bundle} cannot be loaded by this client: {error}") from error
        library.base.check()
        return session

    @property
    def library(self) -> Library:
        """The bundle: its card, the names of its adapters, the default one."""
        return self._library

    @property
    def adapter(self) -> Adapter | None:
        """The adapter in use."""
        return self._current.adapter if self._current else None

    def names(self) -> list[str]:
        """The adapters that the bundle seems to have; ``use`` verifies."""
        return self._library.names()

    def default(self) -> str:
        """The adapter for someone who names none. Raises as ``Library.default``."""
        return self._library.default()

    def use(self, names: str | Sequence[str], weights: Sequence[float] | None = None) -> Adapter:
        """Switch to an adapter, or to several as one; verified when first used. If that fails, the one in use stays.

        Args:
            names: A name, a composition in writing (``global:0.5+anna``), or several names.
            weights: The factor of each one's update; 1 each if there are none.

        Raises:
            TrustError, DataError, ConfigError: As ``Library.load`` and ``library.chosen``.
        """
        self._current = self._get(chosen(names, weights))
        return self._current.adapter

    def classify(self, texts: Sequence[str]) -> list[Prediction]:
        """The most likely label of each text. Raises as ``rank``."""
        return [ranking[0] for ranking in self.rank(texts, 1)]

    def rank(self, texts: Sequence[str], top: int) -> list[list[Prediction]]:
        """The ``top`` most likely labels of each text, best first.

        Raises:
            DataError: A text is empty, longer than ``text.MAX_TEXT`` or not Unicode, or an answer is not finite.
            ConfigError: No adapter is in use, or ``top`` is below 1.
        """
        if (current := self._current) is None:
            raise ConfigError("no adapter is in use; choose one first")
        rows = [self._tokens(text) for text in texts]
        return [_best(self._logits(*padded([ids]), current.feeds)[0], current.adapter, top) for ids in rows]

    def rank_rows(self, rows: Sequence[tuple[str, str]], top: int) -> list[list[Prediction]]:
        """Answer a batch whose rows use different adapters; the adapter in use stays what it is.

        Rows whose adapters have equal ranks share a run.

        Args:
            rows: Pairs of a text and of what ``use`` takes as a name.
            top: How many labels each row gets, best first.

        Returns:
            For each row what ``use`` and ``rank`` would give: to the bit where the products of matrices do not hang on
            the size of the batch and its longest text, else to 1e-6.

        Raises:
            TrustError, DataError, ConfigError: As ``use`` and ``rank``; or the base cannot mix the adapters in a batch.
        """
        if not rows:
            return []
        if self._dimensions == 2:
            raise ConfigError("this base takes one adapter for a whole batch; export it anew")
        tokens = [self._tokens(text) for text, _ in rows]
        choices = [chosen(names) for _, names in rows]
        held = {choice: self._get(choice).adapter for choice in dict.fromkeys(choices)}
        adapters = [held[choice] for choice in choices]
        answers: dict[int, list[Prediction]] = {}
        for run in alike(adapters, self._library.card.slots):
            found = self._together([tokens[row] for row in run], [adapters[row] for row in run], top)
            answers.update(zip(run, found, strict=True))
        return [answers[row] for row in range(len(rows))]

    def _together(self, tokens: Sequence[list[int]], adapters: Sequence[Adapter], top: int) -> list[list[Prediction]]:
        logits = self._logits(*padded(tokens), _values(stacked(adapters, self._library.card.slots)))
        return [_best(row, adapter, top) for row, adapter in zip(logits, adapters, strict=True)]

    def _get(self, choice: Choice) -> _Loaded:
        if (loaded := self._loaded.get(choice)) is None:
            adapter = self._library.load(choice)
            alone = adapter.inputs if self._dimensions == 2 else stacked([adapter], self._library.card.slots)
            loaded = _Loaded(adapter, _values(alone))
            self._loaded.put(choice, loaded, adapter.nbytes)
        return loaded

    def _tokens(self, text: str) -> list[int]:
        encoding = self._tokenizer.encode(checked(text))
        if all(encoding.special_tokens_mask):
            raise DataError(f"the text {text[:40]!r} has no sign that the model knows; give a phrase")
        return list(encoding.ids)

    def _logits(self, ids: np.ndarray, mask: np.ndarray, adapter: dict[str, Any]) -> Floats:
        feeds = _values({"input_ids": ids, "attention_mask": mask})
        logits: Floats = self._run.run_with_ort_values(["logits"], feeds | adapter)[0].numpy()
        return logits


def _session(base: VerifiedBase, threads: int) -> ort.InferenceSession:
    """The graph from the bytes that were verified, its weights mapped from the folder: processes share them."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(base.folder))
    return ort.InferenceSession(base.files[MODEL], options, providers=["CPUExecutionProvider"])


def _declared(session: ort.InferenceSession) -> int:
    """Of how many dimensions the graph declares A: 2, 3 (a batch's rows first), or 0 for either."""
    shapes = [value.shape for value in session.get_inputs() if value.name.endswith(LORA_A)]
    return len(shapes[0] or ()) if shapes else 0


def _values(tensors: Tensors | dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in tensors.items()}


def _best(logits: Floats, adapter: Adapter, top: int) -> list[Prediction]:
    if top < 1:
        raise ConfigError(f"the {top} most likely labels are none: ask for 1 or more")
    logits = logits[: len(adapter.labels)]  # in a batch, a head with fewer labels than another was filled up
    powers = np.exp(logits - logits.max())
    probabilities: Floats = powers / powers.sum()
    if not np.isfinite(probabilities).all():
        raise DataError(f"adapter {adapter.name!r} gave an answer that is not finite; use another")
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [Prediction(adapter.labels[i], float(probabilities[i])) for i in order]
