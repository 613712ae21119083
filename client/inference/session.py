"""Classifies texts with a verified base and verified adapters. It needs neither torch nor flwr nor transformers. An
adapter is a set of inputs of the graph, held in memory in float32: switching to one that was used before exchanges a
reference (docs/decisions/0010-profiles-of-a-base.md)."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from aggregation.errors import ConfigError, DataError, EdgeAdaptError, one_line
from client.inference.library import Adapter, AdapterCache, Composition, Library, Named
from client.inference.phrases import PhraseReader
from edgeadapt.bases.classifiergraph import ENCODER, MEAN_HEAD, ClassifierGraph, Feeds
from edgeadapt.bases.markedwords import END, OUTSIDE, marked, marked_word, require_marks, with_labels
from edgeadapt.formats.bundle import MODEL, TOKENIZER, VerifiedBase
from edgeadapt.formats.graphinputs import empty_inputs
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.policy import Outcome
from edgeadapt.formats.storage import File
from edgeadapt.methods.peft.inputs import is_saved

MAX_LOADED = 32  # adapters held in memory
MAX_LOADED_BYTES = 2**28
AUTO, ROUTER = "auto", "router"  # chooses for each text, by the adapter whose labels are names of adapters
SURE = 0.5  # least probability of such a choice


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label and its probability, calibrated if a temperature was fitted (``edgeadapt.formats.calibration``)."""

    label: str
    probability: float


@dataclass(frozen=True, slots=True)
class Ranking:
    predictions: tuple[Prediction, ...]  # most likely first; none if ``outcome`` is unsure or blocked
    unknown: float  # share of the text's tokens that the model does not know
    unread: int  # tokens at the end that are beyond the model's limit
    outcome: Outcome
    says: str  # what the policy says instead of an answer

    def to_json(self) -> dict[str, Any]:
        intents = [{"intent": one.label, "probability": round(one.probability, 6)} for one in self.predictions]
        stated = {"unknown": round(self.unknown, 3), "unread": self.unread, "outcome": self.outcome.value}
        return {**stated, "says": self.says, "intents": intents}

    def label_of_word(self) -> Prediction:
        return self.predictions[0] if self.predictions else Prediction(OUTSIDE, 0.0)


def words_to_json(text: str, found: Sequence[tuple[str, Prediction]]) -> dict[str, Any]:
    """State a text, the text with labels, and the label of each word."""
    labelled = with_labels(text, [best.label for _, best in found])
    rows = [{"word": word, "label": best.label, "probability": round(best.probability, 6)} for word, best in found]
    return {"text": text, "labelled": labelled, "words": rows}


@dataclass(frozen=True, slots=True)
class _Loaded:
    adapter: Adapter
    feeds: Feeds = field(repr=False)


class ClassificationSession:
    """An ONNX Runtime session with the base of a bundle. Threads may share it, because each call names its adapter.

    It answers with what the bundle has under that name now, as after a lesson. ``rank`` and ``classify`` run one text
    at a time: an answer depends neither on the other texts nor on padding, whatever the quantization of the base.
    ``rank_mixed`` runs a batch."""

    def __init__(self, library: Library, threads: int, loaded: AdapterCache[_Loaded]) -> None:
        self.library, self._loaded = library, loaded
        self.policy = library.base.policy  # who measures a model, and not what it may answer, may replace it
        self._reader = PhraseReader.of(library.base.files[TOKENIZER])
        base, manifest = library.base, library.manifest
        self._graph = ClassifierGraph.open(base.files, base.folder, manifest.slots, manifest.independent_rows, threads)

    @classmethod
    def open(cls, bundle: File, trust: File | None = None, **limits: int) -> Self:
        """Verify and load the base of ``bundle``. It holds no adapter yet.

        ``trust``: the pinned public keys; by default ``trust.pem`` in the folder that contains the bundle. ``limits``:
        as of ``of``. Raises TrustError: there are no pinned keys, or none signed this base; DataError: a file is
        missing, or the base cannot be loaded; ConfigError: the base is for another task, or a limit is below 1."""
        return cls.of(Library.open(bundle, trust, "text-classification"), **limits)

    @classmethod
    def of(
        cls, library: Library, threads: int = 1, loaded: int = MAX_LOADED, loaded_bytes: int = MAX_LOADED_BYTES
    ) -> Self:
        """Load a verified base. ``threads``: more than one is faster only for long texts. ``loaded``, ``loaded_bytes``:
        the most adapters to hold in memory, and bytes of them. Raises as ``open``."""
        cache = AdapterCache[_Loaded](
            loaded, loaded_bytes, lambda held: held.adapter.nbytes, lambda held: library.is_current(held.adapter)
        )
        try:
            session = cls(library, threads, cache)
        except Exception as error:  # tokenizers and onnxruntime raise classes without a common base
            reason = f"this version cannot load the base in {library.bundle}: {one_line(error)}"
            raise DataError(reason, about=MODEL) from error
        library.base.check()
        return session

    def load(self, adapter: Named) -> Adapter:
        """Verify an adapter or a composition, and keep it in memory. ``adapter``: a name, a composition in writing
        (``global:0.5+anna``), several names, or a ``Composition``. Raises TrustError, DataError, ConfigError: as
        ``Composition.of`` and ``Library.load``."""
        return self._get(Composition.of(adapter)).adapter

    def answer(self, text: str, adapter: Named, top: int) -> tuple[Adapter, Ranking, float]:
        """Return the adapter that answers a text, what it answers, and the seconds that this took.

        For ``AUTO`` the bundle's ``ROUTER`` names the adapter; the default one answers where the router is unsure, the
        policy withholds its answer, or the bundle does not have what it names; if the channel does, that is fetched in
        the background. Raises as ``rank``."""
        begun = time.perf_counter()
        if adapter == AUTO:
            adapter = self.route(self.ranking(text, ROUTER, 1))
        return self.load(adapter), self.ranking(text, adapter, top), time.perf_counter() - begun

    def route(self, found: Ranking, may: Callable[[str], bool] = lambda _: True) -> str:
        """Name the adapter for a text of which the router said ``found``: one that the bundle has and that ``may`` be
        used, or the default. Raises as ``Library.default``."""
        best = found.predictions
        if best and best[0].probability >= SURE and may(name := best[0].label):
            if name in self.library.names():
                return name
            self.library.bank.bring_later(name)
        return self.library.default(without=ROUTER)

    def classify(self, texts: Sequence[str], adapter: Named) -> list[Prediction]:
        """Find the most likely label of each text. Raises as ``rank``; DataError: the bundle's policy withholds one."""
        ranked = self.rank(texts, adapter, 1)
        if [] in ranked:
            raise DataError("the policy withholds an answer; `ranking` says why", about="policy")
        return [one[0] for one in ranked]

    def rank(self, texts: Sequence[str], adapter: Named, top: int) -> list[list[Prediction]]:
        """Find the ``top`` most likely labels of each text with an adapter, most likely first; none if the bundle's
        policy withholds the answer.

        Raises DataError: ``texts`` is a string, a text is not valid (``text.checked``) or has no known token
        (``unknown_share``), the graph does not run, or an answer is not finite; ConfigError: ``top`` is below 1; or as
        ``load``."""
        return [predictions for predictions, _ in self._ranked(texts, adapter, top)]

    def words(self, text: str, adapter: Named) -> list[tuple[str, Prediction]]:
        """Find the label of each word of a text: ``OUTSIDE`` where the model knows no part of the text or does not read
        as far, or the policy withholds it. Raises as ``rank`` and ``marked``; ConfigError: the base knows no marks."""
        asked = self.marked(text, adapter)
        return [(word, self.ranking(one, adapter, 1).label_of_word()) for word, one in asked]

    def marked(self, text: str, adapter: Named) -> list[tuple[str, str]]:
        """Return each word of a text, and what asks for its label: the text with the word marked, or nothing where the
        model does not read as far. Raises as ``words``."""
        require_marks(self.library.base.files[TOKENIZER], "--words")
        unread = {one: self.unread(one.partition(END)[0] + END, adapter) for one in marked(text)}
        return [(marked_word(one), "" if count else one) for one, count in unread.items()]

    def _ranked(self, texts: Sequence[str], adapter: Named, top: int) -> list[tuple[list[Prediction], Outcome]]:
        if isinstance(texts, str):  # whose letters would be texts
            raise DataError("texts are one string: give a list of strings", about="texts")
        loaded = self._get(Composition.of(adapter))
        rows = [self._reader.tokens(text, loaded.adapter.virtual_tokens) for text in texts]
        with self._running():
            logits = [self._graph.logits(ids, loaded.feeds) for ids in rows]
        return [self._judged(text, row, loaded.adapter, top) for text, row in zip(texts, logits, strict=True)]

    def _judged(self, text: str, logits: Floats, adapter: Adapter, top: int) -> tuple[list[Prediction], Outcome]:
        ranked = _best(logits, adapter, top, self.policy.deny)
        outcome = self.policy.outcome(self._reader.readings(text), ranked[0].label, ranked[0].probability)
        answered = outcome in (Outcome.ANSWERED, Outcome.CONFIRM)
        return [one for one in ranked if answered and one.label not in self.policy.deny][:top], outcome

    def ranking(self, text: str, adapter: Named, top: int) -> Ranking:
        """Find the ``top`` most likely labels of a text as ``rank``, or that it is unknown. Raises as ``rank``."""
        share = self.unknown_share(text) if text.strip() else 1.0
        best, outcome = ([], Outcome.UNSURE) if share == 1 else self._ranked([text], adapter, top)[0]
        return self._stated(text, adapter, share, best, outcome)

    def _stated(self, text: str, adapter: Named, share: float, best: Sequence[Prediction], outcome: Outcome) -> Ranking:
        unread = 0 if share == 1 else self.unread(text, adapter)
        return Ranking(tuple(best), share, unread, outcome, self.policy.says(outcome))

    def rankings(self, rows: Sequence[tuple[str, Named]], top: int) -> list[Ranking | EdgeAdaptError]:
        """Answer a batch as ``rank_mixed`` runs it, each row as ``ranking`` does, or with the error that it raises."""
        try:
            shares = [self.unknown_share(text) if text.strip() else 1.0 for text, _ in rows]
            judged = iter(self._mixed([row for row, share in zip(rows, shares, strict=True) if share < 1], top))
            nothing: tuple[list[Prediction], Outcome] = [], Outcome.UNSURE
            found = [next(judged) if share < 1 else nothing for share in shares]
            return [self._stated(*row, share, *one) for row, share, one in zip(rows, shares, found, strict=True)]
        except EdgeAdaptError as error:
            half = len(rows) // 2
            return [error] if not half else self.rankings(rows[:half], top) + self.rankings(rows[half:], top)

    def rank_mixed(self, rows: Sequence[tuple[str, Named]], top: int) -> list[list[Prediction]]:
        """Classify a batch of pairs of a text and an adapter. Errors are those of ``rank``.

        Returns what ``rank`` returns for each row: the same bits if the base's matrix products do not depend on the
        number of rows and the longest text, else the same up to 1e-6. A base whose manifest does not state
        ``independent_rows`` runs each row alone, which is slower."""
        return [predictions for predictions, _ in self._mixed(rows, top)]

    def _mixed(self, rows: Sequence[tuple[str, Named]], top: int) -> list[tuple[list[Prediction], Outcome]]:
        if not rows:
            return []
        compositions = [Composition.of(names) for _, names in rows]
        held = {composition: self._get(composition).adapter for composition in dict.fromkeys(compositions)}
        adapters = [held[composition] for composition in compositions]
        read = zip(rows, adapters, strict=True)
        tokens = [self._reader.tokens(text, adapter.virtual_tokens) for (text, _), adapter in read]
        with self._running():
            logits = self._graph.mixed(tokens, [adapter.inputs for adapter in adapters])
        judged = zip(rows, logits, adapters, strict=True)
        return [self._judged(text, row, adapter, top) for (text, _), row, adapter in judged]

    def embed(self, texts: Sequence[str], adapter: Named | None = None) -> Floats:
        """Embed texts, by the frozen base alone or with an adapter: shape ``(len(texts), hidden)``, each of L2 norm 1.
        A text without a known token is zeros. Raises ConfigError as ``require_mean_head``, and as ``load``."""
        require_mean_head(self.library.base)
        inputs = empty_inputs(self.library.manifest.slots) if adapter is None else self.load(adapter).inputs
        read = [row for row, text in enumerate(texts) if text.strip() and self._reader.unknown_share(text) < 1]
        with self._running():
            rows = self._graph.embed([self._reader.tokens(texts[row]) for row in read], inputs)
        vectors = np.zeros((len(texts), rows.shape[1]), np.float32)
        vectors[read] = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        return vectors

    def _get(self, composition: Composition) -> _Loaded:
        if (loaded := self._loaded.get(composition)) is None:
            adapter = self.library.load(composition)
            loaded = _Loaded(adapter, self._graph.feeds(adapter.inputs))
            self._loaded[composition] = loaded
        return loaded

    def unknown_share(self, text: str) -> float:
        """Measure ``PhraseReader.unknown_share``. The other methods refuse a text of share 1."""
        return self._reader.unknown_share(text)

    def size(self, text: str) -> int:
        """Count the tokens of a text, without special ones. Raises as ``PhraseReader.known``."""
        return self._reader.known(text)[1]

    def unread(self, text: str, adapter: Named) -> int:
        """Count ``PhraseReader.unread`` with an adapter's virtual tokens. Raises as that and ``load``."""
        return self._reader.unread(text, self.load(adapter).virtual_tokens)

    @contextmanager
    def _running(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # onnxruntime raises classes without a common base
            reason = f"the base in {self.library.bundle} does not run: {one_line(error)}; export it again"
            raise DataError(reason, about=MODEL) from error


def require_mean_head(base: VerifiedBase) -> None:
    """Check that a base has a head over the mean of its tokens, and no virtual tokens. Raises ConfigError. Federations
    train such a head, and it alone has embeddings."""
    saved = {name for name in base.manifest.slots if is_saved(name)}
    odd = sorted(saved ^ set(MEAN_HEAD)) + sorted(
        name for name in base.manifest.slots if name not in saved and not name.startswith(ENCODER)
    )
    if odd:
        raise ConfigError(
            f"the base in {base.folder} has a slot {odd[0]!r}, which is not of a head over the mean of the tokens: "
            "export it with --head mean, without virtual tokens",
            about=odd[0],
        )


def _best(logits: Floats, adapter: Adapter, top: int, denied: Sequence[str]) -> list[Prediction]:
    if top < 1:
        raise ConfigError(f"top {top} is below 1: ask for at least one label", about="top")
    logits = logits[: len(adapter.labels)]  # in a mixed batch, the head may be padded
    exponentials = np.exp((logits - logits.max()) / adapter.temperature)
    probabilities: Floats = exponentials / exponentials.sum()
    if not np.isfinite(probabilities).all():
        reason = f"adapter {adapter.name!r} gives an answer that is not finite; use another adapter"
        raise DataError(reason, about="logits")
    order = np.argsort(-probabilities, kind="stable")[: top + len(denied)]
    return [Prediction(adapter.labels[i], float(probabilities[i])) for i in order]
