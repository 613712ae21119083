"""What a person asked, if its owner wants it kept, and which of it is worth asking about: encrypted next to the bundle.

::

    learned/asked.sealed     the last ``MOST`` texts; without it none is kept

A text with personal data or a secret is never kept (``client.training.hygiene``), and none leaves the device."""

import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar, Self

import numpy as np

from aggregation import wire
from aggregation.errors import EdgeAdaptError, TrustError
from client.inference.session import ClassificationSession, Prediction, Ranking
from client.inference.usage import ASKED, OptIn, utf8
from client.training.corrections import LessonHistory
from client.training.examples import MAX_TEXT
from client.training.hygiene import HygieneSettings, reasons, words
from edgeadapt.formats.layout import Floats
from edgeadapt.formats.policy import Outcome

MOST = 2000  # texts that are still to be asked about, and as many that are settled
GUESSES = 3  # shown with a text
SHARPNESS = 3  # power of the cosine by which a label says something about another text, chosen on seeds 1000 to 1003
_TEXTS = wire.sequence(utf8(4 * MAX_TEXT), MOST)
log = logging.getLogger("edgeadapt.device")


@dataclass(frozen=True, slots=True)
class AskedTexts(OptIn):
    """Texts, oldest first, no two of the same words. Law: ``open(seal(a, k), k) == a``. ``settled``: those of which a
    person gave the label, or would not."""

    FILE: ClassVar[str] = ASKED
    MAGIC: ClassVar[bytes] = b"edgeadapt/asked/1\x00"

    texts: Annotated[tuple[str, ...], _TEXTS] = field(default=(), repr=False)
    settled: Annotated[tuple[str, ...], _TEXTS] = field(default=(), repr=False)

    def plus(self, new: Iterable[str]) -> Self:
        known = set(map(words, (*self.texts, *self.settled)))
        unlike = {words(text): text for text in new}
        added = [text for key, text in unlike.items() if key not in known]
        return replace(self, texts=(*self.texts, *added)[-MOST:])

    def settling(self, done: Sequence[str]) -> Self:
        gone = set(map(words, done))
        left = tuple(text for text in self.texts if words(text) not in gone)
        return replace(self, texts=left, settled=(*self.settled, *done)[-MOST:])

    def without(self, erased: Callable[[str], bool]) -> Self:
        kept = (tuple(text for text in texts if not erased(text)) for texts in (self.texts, self.settled))
        return type(self)(*kept)


@dataclass(frozen=True, slots=True)
class Question:
    """A text to ask a person about. ``guesses``: most likely first, whatever a policy's thresholds withhold."""

    text: str = field(repr=False)
    guesses: tuple[Prediction, ...]


def begin(bundle: Path) -> None:
    """Keep texts from now on. Raises ConfigError: what finds personal data is not installed."""
    HygieneSettings.parse({}, "device usage --texts")
    AskedTexts.begin(bundle)


def remember(bundle: Path, asked: Iterable[tuple[str, Ranking]]) -> None:
    """Keep texts that were answered, if the owner wants it. Why they cannot be kept is logged: the answers are good all
    the same."""
    try:
        if AskedTexts.is_on(bundle):
            settings = HygieneSettings.parse({}, "device usage --texts")
            read = [text for text, found in asked if found.unknown < 1 and found.outcome is not Outcome.BLOCKED]
            clean = [text for text in read if not any(reasons(text, "", settings))]
            AskedTexts.change(bundle, lambda before: before.plus(clean))
    except Exception as error:  # that of a library may quote the text
        log.warning("not kept: %s", error if isinstance(error, EdgeAdaptError | OSError) else type(error).__name__)


def forget(bundle: Path, erased: Callable[[str], bool]) -> int:
    """Delete the texts of which ``erased`` is true, or all of a damaged record, and count them."""
    with suppress(TrustError):
        before = AskedTexts.read(bundle) or AskedTexts()
        AskedTexts.change(bundle, lambda found: found.without(erased))
        return sum(map(erased, (*before.texts, *before.settled)))
    AskedTexts.erase(bundle)
    AskedTexts.begin(bundle)
    return 0


def questions(
    session: ClassificationSession, adapter: str, texts: Sequence[str], count: int, report: Callable[[str], object]
) -> list[Question]:
    """Choose the texts to ask about, the most useful first, with what the adapter answers now. Raises ConfigError as
    ``ClassificationSession.embed``; TrustError: what was taught cannot be read."""
    session.policy = session.policy.model_copy(update={"least": 0.0, "thresholds": {}})
    taught = {words(one.text): one.text for one in LessonHistory.of(session.library.bundle).corrections}
    asked = []
    for number, text in enumerate(texts, 1):
        report(f"{number} of {len(texts)}")
        if words(text) not in taught and (guesses := session.rank([text], adapter, GUESSES)[0]):
            asked.append(Question(text, tuple(guesses)))
    if not asked:
        return []
    doubts = [1 - one.guesses[0].probability + sum(two.probability for two in one.guesses[1:2]) for one in asked]
    meaning = session.embed([one.text for one in asked])
    known = session.embed(list(taught.values()))
    return [asked[place] for place in worth_asking(np.array(doubts), meaning, known, count)]


def worth_asking(doubts: Floats, meaning: Floats, known: Floats, count: int) -> list[int]:
    """Choose the texts whose labels say most about those that are in doubt, one after the other.

    Each text counts by its doubt and by how much more like it the nearest labelled text is, by embeddings less their
    mean: a facility location (Wei, Iyer and Bilmes 2015, "Submodularity in data subset selection and active learning").

    >>> east, north = np.eye(2, dtype=np.float32)
    >>> worth_asking(np.array([0.5, 0.5, 0.9]), np.stack([east, east, north]), north[None], 1)
    [0]

    ``doubts``: shape ``(texts,)``: 1 minus the difference of the two largest probabilities. ``meaning``: embeddings,
    shape ``(texts, hidden)``, each of L2 norm 1 or 0. ``known``: those of texts whose labels are known, shape ``(any,
    hidden)``."""
    centered = np.concatenate([meaning, known]) - meaning.mean(axis=0, keepdims=True) if len(meaning) else meaning
    centered /= np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)
    likeness = np.clip(centered[: len(meaning)] @ centered.T, 0, 1) ** SHARPNESS
    alike, near = likeness[:, : len(meaning)], likeness[:, len(meaning) :].max(axis=1, initial=0)
    chosen = list[int]()
    for _ in range(min(count, len(meaning))):
        gain = np.array([doubts @ np.maximum(row - near, 0) for row in alike])
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
        near = np.maximum(near, alike[chosen[-1]])
    return chosen
