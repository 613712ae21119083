"""What a device counts of its own answers, if its owner wants it: numbers by day, encrypted next to the bundle.

::

    learned/usage.sealed     the counts of the last ``KEPT`` days; without it nothing is counted
    learned/sealing.key      encrypts it

No text is counted (``client.learning.questions`` keeps texts). A round of observation may ask for sums of the counts
(``edgeadapt.rounds.observation``)."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from aggregation import sealed, wire
from aggregation.entropy import Entropy, SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, ProtocolError, TrustError
from aggregation.wire import Codec
from edgeadapt.formats import storage

if TYPE_CHECKING:  # imports ONNX Runtime
    from client.inference.library import Adapter
    from client.inference.session import Ranking

log = logging.getLogger("edgeadapt.device")
LEARNED, SEALING_KEY, USAGE, LOCK = "learned", "sealing.key", "usage.sealed", "usage.lock"
ASKED = "asked.sealed"  # of ``client.learning.questions``
KEPT = 62  # days
MOST_KEYS = 4096  # of a day; an answer with a new one is not counted beyond it
LARGEST = 2**26  # bytes
EPOCH = date(1970, 1, 1)


def utf8(limit: int) -> Codec[str]:
    """Encode texts of at most ``limit`` bytes."""
    raw = wire.blob(limit)
    return Codec(lambda out, value: raw.write(out, value.encode()), lambda source: raw.read(source).decode())


class OptIn(sealed.SealedRecord):
    """A record of a device's answers, encrypted next to a bundle; its owner wants it if its file is there."""

    __slots__ = ()
    FILE: ClassVar[str]

    @classmethod
    def is_on(cls, bundle: storage.File) -> bool:
        """Check, at the cost of a look at the disk, whether the record is kept."""
        return is_kept(bundle, cls.FILE)

    @classmethod
    def begin(cls, bundle: Path) -> None:
        """Keep the record from now on; what it has stays."""
        folder = _folder(bundle)
        folder.mkdir(mode=storage.PRIVATE_FOLDER, exist_ok=True)
        with storage.locked(folder / LOCK):
            if not cls.is_on(bundle):
                cls().write(bundle)

    @classmethod
    def erase(cls, bundle: Path) -> None:
        """Delete the record, and keep none from now on."""
        if cls.is_on(bundle):
            with storage.locked(_folder(bundle) / LOCK):  # or an answer under way would write it again
                (_folder(bundle) / cls.FILE).unlink(missing_ok=True)

    @classmethod
    def read(cls, bundle: Path) -> Self | None:
        """Read what is kept next to a bundle; None: nothing. Raises TrustError: it is damaged."""
        folder = _folder(bundle)
        if not cls.is_on(bundle):
            return None
        try:
            return cls.open(storage.read(folder / cls.FILE, LARGEST), sealing_key(folder))
        except (TrustError, ConfigError, DataError, ProtocolError, ValueError) as error:
            reason = f"{folder / cls.FILE} is damaged: begin again with 'edgeadapt device usage --erase' and --on"
            raise TrustError(reason, about=cls.FILE) from error

    @classmethod
    def change(cls, bundle: Path, how: Callable[[Self], Self]) -> None:
        """Replace the record, if it is kept. Raises as ``read``."""
        if cls.is_on(bundle):
            with storage.locked(_folder(bundle) / LOCK):
                if found := cls.read(bundle):
                    how(found).write(bundle)

    def write(self, bundle: Path) -> None:
        storage.replace(_folder(bundle) / self.FILE, self.seal(sealing_key(_folder(bundle))))


@dataclass(frozen=True, slots=True)
class UsageDay:
    """``day``: since 1970, in UTC. ``counts``: by ``observation.keys``."""

    day: Annotated[int, wire.uint(32)]
    counts: Annotated[Mapping[str, int], wire.mapping(utf8(2**14), wire.uint(32), MOST_KEYS)]


USAGE_DAYS = wire.sequence(wire.record(UsageDay), KEPT)


@dataclass(frozen=True, slots=True)
class Usage(OptIn):
    """Counts of the last days, oldest first. Law: ``open(seal(u, k), k) == u``."""

    FILE: ClassVar[str] = USAGE
    MAGIC: ClassVar[bytes] = b"edgeadapt/usage/1\x00"

    days: Annotated[tuple[UsageDay, ...], USAGE_DAYS] = ()

    def counts(self, since: int, days: int) -> Counter[str]:
        total = Counter[str]()
        for one in self.days:
            if since <= one.day < since + days:
                total.update(one.counts)
        return total

    def before(self, day: int) -> Self:
        """Keep what will not change any more on that day: a difference of two sums then shows no single answer."""
        return replace(self, days=tuple(one for one in self.days if one.day < day))

    def plus(self, day: int, found: Iterable[str]) -> Self:
        """Add one to each key's count on a day."""
        counts = Counter(next((one.counts for one in self.days if one.day == day), {}))
        counts.update(found)
        counts = Counter(dict(list(counts.items())[:MOST_KEYS]))
        others = [one for one in self.days if one.day != day and one.day > day - KEPT]
        return replace(self, days=tuple(sorted([*others, UsageDay(day, counts)], key=lambda one: one.day)[-KEPT:]))


def today() -> int:
    return (datetime.now(UTC).date() - EPOCH).days


def day_of(number: int) -> date:
    return EPOCH + timedelta(days=number)


def is_kept(bundle: storage.File, name: str) -> bool:
    return (_folder(Path(bundle)) / name).exists()


def count(bundle: Path, found: Iterable[str]) -> None:
    """Add keys to the counts of today, if answers are counted. Why they cannot be is logged: an answer or a lesson is
    good all the same."""
    try:
        Usage.change(bundle, lambda usage: usage.plus(today(), found))
    except (EdgeAdaptError, OSError) as error:
        log.warning("not counted: %s", error)


def count_answers(bundle: Path, answers: Iterable[tuple["Adapter", "Ranking | None", float]]) -> None:
    """Count answers, each with its adapter and the seconds that it took; None: a language model wrote it."""
    if not Usage.is_on(bundle):
        return
    from edgeadapt.rounds.observation import keys  # a third of the start of an answer

    found = list[str]()
    for used, ranking, seconds in answers:
        content = used.manifests[0].content if len(used.manifests) == 1 else ""
        best = ranking.predictions[0] if ranking and ranking.predictions else None
        label, probability = (best.label, best.probability) if best else (None, 0.0)
        own = keys(label, probability, ranking.unknown if ranking else 0.0, seconds, content)
        found += (
            [*own, f"outcome/{ranking.outcome}"]
            if ranking
            else [key for key in own if not key.startswith(("labels/", "unknown/"))]
        )
    count(bundle, found)


def lesson_key(*, undone: bool) -> str:
    from edgeadapt.rounds.observation import LESSONS

    return f"lessons/{LESSONS[2 if undone else 1]}"


def sealing_key(folder: Path, entropy: Entropy | None = None) -> bytes:
    """Read the key that encrypts what is in the folder ``LEARNED``, which the first call draws."""
    if not (folder / SEALING_KEY).exists():
        storage.replace(folder / SEALING_KEY, (entropy or SystemEntropy()).bytes(32))
    return storage.read(folder / SEALING_KEY, 2**10)


def _folder(bundle: Path) -> Path:
    return storage.real(bundle).parent / LEARNED
