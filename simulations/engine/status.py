"""What is known of a run under way, and the lines that say it. No terminal, no thread, no clock: time is told."""

from collections import Counter
from collections.abc import Mapping
from typing import Protocol

from rich.console import RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from simulations.report.formatting import count, duration, printable, share, size

BAR = 24  # columns


class Record(Protocol):
    """What is read of ``coordinator.registry.versions.RoundRecord``."""

    @property
    def round(self) -> int: ...
    @property
    def survivors(self) -> tuple[str, ...]: ...
    @property
    def dropped(self) -> Mapping[str, str]: ...
    @property
    def aborted(self) -> str | None: ...
    @property
    def bytes_up(self) -> int: ...
    @property
    def bytes_down(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


class Stage:
    """Something done in ``total`` parts; 0 means that nobody knows how many."""

    over = False

    def __init__(self, name: str, total: int, began: float) -> None:
        self.name, self.total, self.began, self.done = name, total, began, 0

    def advance(self) -> None:
        """One more part is done."""
        self.done += 1

    def draw(self, now: float) -> list[RenderableType]:
        """The live line."""
        at = f"{min(self.done + 1, self.total)} of {self.total}" if self.total else ""
        return [_bar(f"{self.name} {at}", self.done, self.total, now, _times(self, now))]


class Rounds:
    """The rounds of the federation, as far as this process saw them."""

    def __init__(self, began: float) -> None:
        self.began, self.ended = began, began  # seconds; ended: the last round
        self.done, self.total, self.number = 0, 0, 1
        self._answered: Counter[str] = Counter()
        self._step, self._cohort = "", 0
        self._dropouts, self._bytes = 0, 0
        self._metrics: Mapping[str, float] = {}

    @property
    def over(self) -> bool:
        """Whether the last round has been recorded."""
        return bool(self.total) and self.number > self.total

    def answer(self, step: str) -> None:
        """A device answered at ``step`` of the round under way."""
        if step != self._step:  # how many there are is known from the step before
            self._cohort = max(self._cohort, self._answered[self._step])
            self._step = step
        self._answered[step] += 1

    def finish(self, record: Record, total: int, now: float) -> Text:
        """A round is over; the line that stays of it."""
        self.done, self.total, self.number, self.ended = self.done + 1, total, record.round + 1, now
        self._dropouts += len(record.dropped)
        self._bytes += record.bytes_up + record.bytes_down
        self._metrics = record.metrics or self._metrics
        self._cohort = max(self._cohort, len(record.survivors) + len(record.dropped))
        self._answered.clear()
        self._step = ""
        return _round_line(record)

    def draw(self, now: float) -> list[RenderableType]:
        """The live lines: where the round stands, and how the run goes."""
        name = f"round {self.number} of {self.total}" if self.total else f"round {self.number}"
        answered = self._answered[self._step]
        of = f" of {self._cohort}" if self._cohort >= answered else ""
        at = f"{self._step}: {answered}{of} answered" if self._step else ""
        so_far = [
            *_held_out(self._metrics),
            f"{size(self._bytes)} in all",
            count(self._dropouts, "dropout"),
            _times(self, now),
        ]
        return [_bar(name, self.number - 1, self.total, now, at), Text("  ".join(so_far), no_wrap=True)]


def _bar(name: str, done: int, total: int, now: float, note: str) -> Table:
    line = Table.grid(padding=(0, 2))
    bar = ProgressBar(total or None, done, width=BAR, pulse=not total, animation_time=now)
    line.add_row(Text(name, style="bold"), bar, Text(note, no_wrap=True))
    return line


def _times(work: Stage | Rounds, now: float) -> str:
    """Elapsed, and what remains at the pace so far."""
    said = duration(now - work.began)
    missing = work.total - (work.number - 1 if isinstance(work, Rounds) else work.done)
    if not work.done or missing <= 0:
        return said
    # Between two ends of a round the estimate counts down instead of growing.
    since = work.ended if isinstance(work, Rounds) else now
    left = (since - work.began) / work.done * missing - (now - since)
    return f"{said}, about {duration(max(left, 0.0))} left"


def _held_out(metrics: Mapping[str, float]) -> list[str]:
    said = [f"accuracy {share(metrics['accuracy'])}"] if "accuracy" in metrics else []
    return said + ([f"loss {metrics['loss']:.3f}"] if "loss" in metrics else [])


def _round_line(record: Record) -> Text:
    dropped = ", ".join(f"{printable(device)} at {step}" for device, step in record.dropped.items())
    parts = [f"round {record.round:>2}"]
    parts += [f"aborted: {printable(record.aborted)}"] if record.aborted else _held_out(record.metrics)
    if not record.aborted:
        parts += [f"{count(len(record.survivors), 'device')}", size(record.bytes_up + record.bytes_down)]
    parts += [f"dropped out: {dropped}"] if dropped else []
    return Text("  ".join(parts), style="yellow" if record.aborted else "")
