"""How far the newest session is, read from its log while the coordinator writes it: the step, and how many answered.

Nothing is verified here; ``edgeadapt audit`` does that.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregation import envelope, transcript
from aggregation.errors import ProtocolError
from aggregation.messages import Shares
from aggregation.steps import Step
from aggregation.transcript import ANSWERS, MAGIC, REQUESTS, Abort, Checkpoint, Entry, Result, Stage
from edgeadapt.audit.transcripts import logs
from edgeadapt.formats import storage

_REQUESTS = {kind.TAG: step for step, kind in REQUESTS.items()}
_ANSWERS = {kind.TAG: step for step, kind in ANSWERS.items()}
_ENDINGS = (Result.TAG, Abort.TAG)


@dataclass(slots=True)
class SessionProgress:
    """What the log of a session says so far."""

    log: str  # file name
    devices: int = 0  # how many established the session
    round: int = 0  # counted in the session from 1; 0 before the first
    step: Step | None = None  # under way; None between rounds
    answered: int = 0  # devices that answered the step
    closed: bool = False

    def as_json(self) -> dict[str, Any]:
        step = None if self.step is None else {"name": self.step.value, "answered": self.answered}
        return {
            "log": self.log,
            "devices": self.devices,
            "rounds": self.round,
            "step": step,
            "closed": self.closed,
        }

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.round = max(self.round, entry.round)
            self.devices += entry.kind == Shares.TAG
            if entry.kind in _ENDINGS:
                self.step, self.answered = None, 0
            elif entry.kind == Checkpoint.TAG:
                self.closed = _closes(entry)
                self.step = None if self.closed else self.step
            elif (step := _REQUESTS.get(entry.kind)) is not None and step is not self.step:
                self.step, self.answered = step, 0
            elif entry.kind in _ANSWERS and _ANSWERS[entry.kind] is self.step:
                self.answered += 1


@dataclass(slots=True)
class LogFollower:
    """Reads what was added to the newest log since the last call."""

    folder: Path  # holds the transcripts
    _progress: SessionProgress | None = None
    _end: int = 0  # bytes read

    def look(self) -> SessionProgress | None:
        """Read the progress of the newest session, if any. Raises DataError: the log is too large, or not a file."""
        if not (paths := logs(self.folder)):
            return None
        newest = paths[-1]
        if self._progress is None or self._progress.log != newest.name or newest.stat().st_size < self._end:
            self._progress, self._end = SessionProgress(newest.name), 0
        with storage.opened(newest) as (file, size):
            file.seek(self._end)
            added = file.read(size - self._end)
        reading = transcript.read(added if self._end == 0 else MAGIC + added)
        self._progress.add(reading.entries)
        self._end += reading.end - (len(MAGIC) if self._end else 0)
        return self._progress


def _closes(entry: Entry) -> bool:
    try:
        return Checkpoint.decode(envelope.unverified_body(entry.message)).stage is Stage.CLOSED
    except ProtocolError:
        return False
