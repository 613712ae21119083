"""``edgeadapt.load``: a verified bundle as an object that answers, learns and follows its channel."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError
from client.inference import usage
from client.inference.generate import Conversation, Generator
from client.inference.library import Adapter, Composition, Library
from client.inference.session import AUTO, ROUTER, ClassificationSession, Ranking
from client.inference.text import SamplingParams, checked
from client.learning import Correction, Learned, Learner, Personalized, Undone
from client.learning.questions import remember
from client.training.personal import FINE_TUNE, PersonalStep
from client.updates import ChannelSource, Updated, follow, update
from edgeadapt.bases.media import is_medium
from edgeadapt.bases.readers import as_texts
from edgeadapt.formats.bundle import TOKENIZER
from edgeadapt.formats.storage import File
from edgeadapt.interface.names import in_python


class Answer(NamedTuple):
    """A classifier's answer to a text.

    >>> print(Answer("HassTurnOn", 0.9432, "global", 0.0))
    HassTurnOn 94 %
    """

    label: str | None  # None: the model knows no part of the text, or the policy withholds the answer
    probability: float
    adapter: str
    unknown: float  # share of the text's tokens that the model does not know
    outcome: str = "answered"  # or "confirm", "unsure", "blocked"
    says: str = ""  # what the policy of the bundle says instead of an answer

    def __str__(self) -> str:
        answer = f"{self.label} {self.probability:.0%}".replace("%", " %")
        return self.says or "unknown text" if self.label is None else answer


class _Model:
    """A bundle, and the adapter that answers."""

    def __init__(self, library: Library, adapter: str | None, threads: int) -> None:
        self._library, self._named, self._threads = library, adapter, threads

    @property
    def adapter(self) -> str:
        """The adapter that answers: the one that was named, else the bundle's personal one, else its global one. Raises
        ConfigError, DataError, TrustError: as ``Library.default``."""
        return self._named or self._library.default()

    @property
    def adapters(self) -> list[str]:
        return self._library.names()

    @property
    def bundle(self) -> Path:
        return self._library.bundle

    @in_python()
    def undo(self) -> Undone:
        """Take the last lesson or personal step back. Raises as ``Learner.open`` and ``Learner.undo``."""
        with self._learner() as learner:
            undone = learner.undo()
        self._answer_with(undone.adapter)
        return undone

    @in_python()
    def personalize(
        self,
        examples: File,
        *,
        method: str = FINE_TUNE,
        epochs: int = 3,
        learning_rate: float | None = None,
        patience: int = 0,
        variants: int = 0,
    ) -> Personalized:
        """Make a private adapter from the global one and a device's examples file, and use it if it is not worse.

        Args:
            method: "fine-tune", or of a classifier "ridge", "logistic", "ensemble", "interpolate" or an installed one.
            epochs: Passes over the examples.
            learning_rate: Of AdamW; by default that of ``edgeadapt device personalize``.
            patience: Epochs without a lower loss on held-out examples after which training ends; 0: never.
            variants: Of each picture or sound, at most 16, that are learned as well.

        Raises:
            TrustError, DataError, ConfigError, OSError: As ``Learner.open`` and ``Learner.personalize``.
        """
        step = PersonalStep(epochs, 16.0, method, patience=patience)
        with self._learner() as learner:
            personalized = learner.personalize(examples, step, learning_rate, variants=variants)
        self._answer_with(personalized.adapter)
        return personalized

    @in_python()
    def update(
        self, repository: str | None = None, channel: str | None = None, root: File | None = None, *, language: str = ""
    ) -> Updated:
        """Bring the bundle to the release that its channel has for this device; private adapters stay.

        This model answers with the new release at once; one that ``using`` made keeps the base that it has. Name the
        repository, the channel and the pinned ``root.json`` together, and only the first time. Raises TrustError,
        DataError, ConfigError, OSError: as ``client.updates.follow`` and ``update``, and ``edgeadapt.load``."""
        if repository is not None and channel is not None and root is not None:
            follow(self.bundle, ChannelSource(repository, channel), Path(root))
        elif repository or channel or root:
            raise ConfigError("name repository, channel and root together", about="repository")
        pinned = self._library.trust.pinned
        updated = update(self.bundle, pinned, language=language or None, entropy=SystemEntropy())
        if updated.changed:  # perhaps another base
            self._open(Library.open(self.bundle, pinned, self._library.manifest.task, update=update))
        return updated

    def _open(self, library: Library) -> None:
        """Load the base of a verified bundle."""
        self._library = library

    @in_python()
    def _taught(self, corrections: Sequence[Correction]) -> Learned:
        with self._learner() as learner:
            learned = learner.teach(corrections)
        self._answer_with(learned.adapter)
        return learned

    def _learner(self) -> AbstractContextManager[Learner]:
        return Learner.open(self.bundle, self._library.trust.pinned, self._named)

    def _answer_with(self, adapter: str) -> None:
        if self._named is not None:  # a model that was made for one adapter answers with what it learned
            self._named = adapter

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {str(self.bundle)!r}, adapter {self.adapter}>"


class Classifier(_Model):
    """A bundle that classifies texts. Threads may share it; one at a time may teach it."""

    def __init__(self, session: ClassificationSession, adapter: str | None, threads: int) -> None:
        super().__init__(session.library, adapter, threads)
        self._session = session

    def _open(self, library: Library) -> None:
        super()._open(library)
        self._session = ClassificationSession.of(library, self._threads)

    @property
    def labels(self) -> tuple[str, ...]:
        return self._session.load(self.adapter).labels

    @property
    def version(self) -> int:
        return self._session.load(self.adapter).version

    @property
    def privacy(self) -> str | None:
        """What bounds what the adapter says about one device; None if nothing does."""
        privacies = [manifest.privacy for manifest in self._session.load(self.adapter).manifests]
        return None if None in privacies else "; ".join(map(str, privacies))

    @overload
    def __call__(self, text: str, *, adapter: str | None = None) -> Answer: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, text: Iterable[str], *, adapter: str | None = None) -> list[Answer]: ...
    def __call__(self, text: str | Iterable[str], *, adapter: str | None = None) -> Answer | list[Answer]:
        """Classify a text, of pictures or sounds the path of a file, or each of several. Raises as ``top``."""
        if isinstance(text, str):
            return self.top(text, 1, adapter=adapter)[0]
        return [answers[0] for answers in self._answers(text, 1, adapter)]

    def top(self, text: str, count: int, *, adapter: str | None = None) -> list[Answer]:
        """Find the ``count`` most likely labels of a text, most likely first; one without a label if it is unknown.

        Raises:
            DataError: The text is empty, too long or not Unicode, or ``adapter`` is broken.
            ConfigError: ``count`` is below 1, or the bundle does not have ``adapter``.
            TrustError: No pinned key signed the adapter, or it is older than one that was seen.
        """
        return self._answers([text], count, adapter)[0]

    def words(self, text: str, *, adapter: str | None = None) -> list[tuple[str, str, float]]:
        """Find the label of each word of a text, ``OUTSIDE`` for none, and its probability. Raises as ``top``;
        ConfigError: the base reads no single words."""
        found = self._session.words(text, adapter or self.adapter)
        return [(word, best.label, best.probability) for word, best in found]

    def _answers(self, texts: Iterable[str], count: int, adapter: str | None) -> list[list[Answer]]:
        named, found, asked = adapter or self.adapter, list[tuple[Adapter, Ranking, float]](), self._read(texts)
        for text in asked:
            if not is_medium(text):
                checked(text)
            found.append(self._session.answer(text, named, count))
        usage.count_answers(self.bundle, found)  # once: it writes a file
        remember(self.bundle, [(text, ranking) for text, (_, ranking, _) in zip(asked, found, strict=True)])
        return [self._ranked(used.name, ranking) for used, ranking, _ in found]

    def _read(self, texts: Iterable[str]) -> list[str]:
        """Return the texts, or what is in the files that they name. Raises DataError: one is not a string, or as
        ``as_texts``."""
        given = list(texts)
        if odd := [text for text in given if not isinstance(text, str)]:
            raise DataError(f"a {type(odd[0]).__name__} is not a text: give a string", about="text")
        return as_texts(self._library.base.files[TOKENIZER], given)

    @staticmethod
    def _ranked(used: str, found: Ranking) -> list[Answer]:
        stated = (used, found.unknown, found.outcome.value, found.says)
        ranked = [Answer(one.label, one.probability, *stated) for one in found.predictions]
        return ranked or [Answer(None, 0.0, *stated)]

    def using(self, adapter: str) -> Self:
        """Share the loaded base with a classifier that answers with another adapter, or several: "global:0.5+anna".
        Raises as ``ClassificationSession.load``."""
        self._session.load(ROUTER if adapter == AUTO else adapter)
        return type(self)(self._session, adapter, self._threads)

    def teach(self, text: str, label: str) -> Learned:
        """Learn the right label of a text, at once. Raises as ``teach_all``."""
        return self.teach_all([(text, label)])

    def teach_all(self, corrections: Iterable[tuple[str, str]]) -> Learned:
        """Learn pairs of a text and its label. Raises as ``Learner.open`` and ``Learner.teach``."""
        pairs = list(corrections)
        if wrong := [pair for pair in pairs if isinstance(pair, str) or len(pair) != 2]:
            raise DataError(f"{wrong[0]!r} is not a text and its label: give pairs", about="corrections")
        texts = self._read(text for text, _ in pairs)
        return self._taught([Correction(text, label) for text, (_, label) in zip(texts, pairs, strict=True)])


class LanguageModel(_Model):
    """A bundle that writes text. One answer at a time is written."""

    def __init__(self, generator: Generator, adapter: str | None, threads: int) -> None:
        super().__init__(generator.library, adapter, threads)
        self._generator = generator

    def _open(self, library: Library) -> None:
        super()._open(library)
        self._generator = Generator.of(library, self._threads)

    def __call__(self, prompt: str, **sampling: Any) -> str:
        """Continue a prompt. Keywords are those of ``SamplingParams``. Raises as ``Generator.complete``."""
        return "".join(self.stream(prompt, **sampling))

    def stream(self, prompt: str, **sampling: Any) -> Iterator[str]:
        """Continue a prompt piece by piece. Raises as ``Generator.complete``."""
        return self._generator.complete(prompt, SamplingParams(**sampling), self._adapter_or_base())

    def chat(self, system: str | None = None, **sampling: Any) -> Conversation:
        """Start a chat, whose ``ask`` writes an answer piece by piece. Raises as ``Conversation``."""
        return Conversation(self._generator, SamplingParams(**sampling), system, self._adapter_or_base())

    def using(self, adapter: str) -> Self:
        """Share the loaded base with a model that answers with another adapter. Raises as ``Generator.load``."""
        self._generator.load(adapter)
        return type(self)(self._generator, adapter, self._threads)

    def teach(self, prompt: str, answer: str) -> Learned:
        """Learn the right answer to a prompt, at once. Raises as ``Learner.open`` and ``Learner.teach``."""
        return self._taught([Correction(prompt, answer)])

    def _adapter_or_base(self) -> str | None:
        return self._named or (self._library.default() if self._library.names() else None)


@in_python()
def load(
    bundle: File, *, adapter: str | None = None, trust: File | None = None, threads: int = 1
) -> Classifier | LanguageModel:
    """Verify a bundle and load its model.

    Args:
        adapter: The adapter that answers, or several as one, "global:0.5+anna"; by default the bundle's own choice,
            which a lesson or an update may change. "auto": of a classifier, the one that its adapter "router" names for
            each text.
        trust: The file of pinned keys; by default ``trust.pem`` in the folder that contains the bundle.
        threads: For matrix products.

    Raises:
        TrustError: There are no pinned keys, or none of them signed the base or the adapter.
        DataError: There is no bundle, or a file of it is missing.
        ConfigError: The bundle does not have the adapter, or it needs a newer ONNX Runtime or, for a language model,
            ``onnxruntime-genai``.
    """
    library = Library.open(bundle, trust, update=update)
    if adapter is not None:
        Composition.of(adapter)
    if library.manifest.task == "text-generation":
        model: Classifier | LanguageModel = LanguageModel(Generator.of(library, threads), adapter, threads)
    else:
        model = Classifier(ClassificationSession.of(library, threads), adapter, threads)
    return model.using(adapter) if adapter is not None else model
