"""What a device was taught: corrections, and the adapters before the last of them, encrypted next to the bundle.

A lesson is one run of learning. It keeps the adapter that was in use before, so that it can be undone. The file is
written before the bundle: after a kill between the two, the last lesson made no adapter, which
``LessonHistory.current`` finds."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, Self

from aggregation import sealed, wire
from aggregation.errors import ConfigError, DataError, TrustError
from client.inference.usage import LEARNED, sealing_key, utf8
from client.training.examples import MAX_TEXT
from edgeadapt.bases.media import MAX_MEDIUM
from edgeadapt.formats import storage

MAX_LESSONS = 8  # lessons that can be undone
MAX_CORRECTIONS = 512  # corrections that are kept; the oldest are dropped
MAX_AT_ONCE = 64
MAX_HISTORY = 2**30  # bytes
MAX_FILE = 2**26  # bytes of an adapter before a lesson
HISTORY = "history.sealed"


@dataclass(frozen=True, slots=True)
class Correction:
    """A phrase and its label, or a prompt and its answer, as a person stated it. ``repr`` shows neither."""

    text: Annotated[str, utf8(MAX_MEDIUM)] = field(repr=False)
    label: Annotated[str, utf8(4 * MAX_TEXT)] = field(repr=False)


_CORRECTIONS = wire.sequence(wire.record(Correction), MAX_CORRECTIONS + MAX_AT_ONCE)


@dataclass(frozen=True, slots=True)
class Before:
    manifest: Annotated[bytes, wire.blob(2**22)] = field(repr=False)
    blob: Annotated[bytes, wire.blob(MAX_FILE)] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Lesson:
    """One run of learning. ``before``: the adapter that was in use before; None if it was not private, so that undoing
    deletes the private one."""

    corrections: Annotated[tuple[Correction, ...], _CORRECTIONS]
    made: Annotated[str, wire.text("[0-9a-f]{64}")]  # SHA-256 of the file of the adapter that it made
    used: Annotated[str, wire.text("[0-9a-f]{64}")]  # SHA-256 of the file of the adapter that was in use before
    before: Annotated[Before | None, wire.optional(wire.record(Before))]


@dataclass(frozen=True, slots=True)
class LessonHistory(sealed.SealedRecord):
    """What a device was taught. Law: ``open(seal(h, k), k) == h``. ``kept``: corrections of lessons that cannot be
    undone any more, oldest first. ``lessons``: those that can be, oldest first."""

    MAGIC: ClassVar[bytes] = b"edgeadapt/learned/1\x00"

    kept: Annotated[tuple[Correction, ...], _CORRECTIONS] = ()
    lessons: Annotated[tuple[Lesson, ...], wire.sequence(wire.record(Lesson), MAX_LESSONS)] = ()

    @property
    def corrections(self) -> tuple[Correction, ...]:
        """List all corrections, oldest first; of a text that was corrected twice, the newest."""
        every = [*self.kept, *(one for lesson in self.lessons for one in lesson.corrections)]
        return tuple({one.text: one for one in every}.values())

    def current(self, used: str) -> Self:
        """Restrict the history to the adapter in use: a last lesson that made none is left out. If none of the lessons
        made the adapter, as after another one was installed, none can be undone. ``used``: SHA-256 of its file."""
        if not self.lessons or self.lessons[-1].made == used:
            return self
        if self.lessons[-1].used == used:
            return replace(self, lessons=self.lessons[:-1])
        return replace(self, kept=self.corrections[-MAX_CORRECTIONS:], lessons=())

    def then(self, lesson: Lesson) -> Self:
        """Add a lesson; of the oldest one, if it is one too many, only the corrections are kept."""
        lessons = (*self.lessons, lesson)
        dropped, lessons = lessons[:-MAX_LESSONS], lessons[-MAX_LESSONS:]
        kept = (*self.kept, *(one for old in dropped for one in old.corrections))
        return replace(self, kept=kept[-MAX_CORRECTIONS:], lessons=lessons)

    def without(self, erased: Callable[[Correction], bool]) -> list[tuple[Correction, ...]]:
        """List the lessons without the corrections that ``erased`` is true of; an empty one is a personal step."""
        every = [self.kept[i : i + MAX_AT_ONCE] for i in range(0, len(self.kept), MAX_AT_ONCE)]
        every += [lesson.corrections for lesson in self.lessons]
        after = [tuple(one for one in old if not erased(one)) for old in every]
        return [new for new, old in zip(after, every, strict=True) if new or not old]

    def keeping(self, lessons: Iterable[Sequence[Correction]]) -> Self:
        return replace(self, kept=(*self.kept, *chain.from_iterable(lessons))[-MAX_CORRECTIONS:])

    def undone(self) -> tuple[Lesson, Self]:
        """Split off the last lesson. Raises DataError if none is left."""
        if not self.lessons:
            raise DataError("there is nothing to undo: the adapter in use was not learned here", about="--undo")
        return self.lessons[-1], replace(self, lessons=self.lessons[:-1])

    @classmethod
    def of(cls, bundle: Path) -> "LessonHistory":
        """Read what was taught next to a bundle. Raises TrustError as ``read``."""
        folder = storage.real(bundle).parent / LEARNED
        return cls.read(folder / HISTORY, sealing_key(folder)) if (folder / HISTORY).exists() else cls()

    @classmethod
    def read(cls, path: Path, key: bytes) -> "LessonHistory":
        """Read the history in a file, or an empty one without it. Raises TrustError as ``open``."""
        if not path.exists():
            return cls()
        try:
            return cls.open(storage.read(path, MAX_HISTORY), key)
        except (TrustError, ConfigError, DataError) as error:
            reason = f"{path} is damaged or was sealed with another key ({error}): delete {path.parent} to start again"
            raise TrustError(reason, about=HISTORY) from error


def check_count(corrections: Sequence[Correction]) -> None:
    """Check that there are corrections, not too many, and no two of one phrase. Raises DataError."""
    if not 0 < len(corrections) <= MAX_AT_ONCE:
        reason = f"{len(corrections)} corrections are given: teach 1 to {MAX_AT_ONCE} at once"
        raise DataError(reason, about="corrections")
    if len({one.text for one in corrections}) < len(corrections):
        raise DataError("a phrase is given twice: teach it with one label or answer", about="corrections")
