"""What a run shows while it works: a live line on a terminal, and nothing at all elsewhere.

It only listens to the log records of the coordinator and the devices; the run neither knows of it nor waits for it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from simulations.engine.status import Rounds, Stage
from simulations.report.formatting import duration

LEVELS = {"edgeadapt.coordinator": logging.DEBUG, "edgeadapt.device": logging.INFO}
REFRESH = 5  # times a second


class Progress:
    """A context manager that shows a run and sums what its devices spent on training.

    Args:
        quiet: Show nothing; only listen.
        console: Where to; standard error unless told. What is no terminal is shown nothing.
        clock: Seconds, monotonic.

    Attributes:
        training_seconds: Sum over the devices that trained in this process.
    """

    def __init__(
        self, *, quiet: bool = False, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        console = console or Console(stderr=True)
        self._clock = clock
        self._listener = _Listener(self._take)
        self._levels: dict[str, int] = {}
        self._rounds: Rounds | None = None
        self._stage: Stage | None = None
        self.training_seconds = 0.0
        # The file is asked as well: FORCE_COLOR makes rich take a pipe for a terminal.
        shown = not quiet and console.file.isatty() and not console.is_dumb_terminal
        self._live = _live(console, self._draw) if shown else None

    def __enter__(self) -> Self:
        for name, level in LEVELS.items():
            logger = logging.getLogger(name)
            self._levels[name] = logger.level
            logger.setLevel(min(level, logger.getEffectiveLevel()))
            logger.addHandler(self._listener)
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._live:
                self._live.stop()  # gives the cursor back
        finally:
            for name, level in self._levels.items():
                logging.getLogger(name).removeHandler(self._listener)
                logging.getLogger(name).setLevel(level)

    @contextmanager
    def stage(self, name: str, total: int = 0) -> Iterator[Callable[[], None]]:
        """Show a stage while the block runs; call what it yields after each of its ``total`` parts (0: unknown)."""
        stage = self._stage = Stage(name, total, self._clock())
        try:
            yield stage.advance
        finally:
            self._stage = None
        parts = f"{stage.done} in " if stage.done else ""
        self._say(Text(f"{name}  {parts}{duration(self._clock() - stage.began)}"))

    def _take(self, extra: dict[str, Any]) -> None:
        self.training_seconds += extra.get("training_seconds", 0.0)
        if "answered" in extra or "record" in extra:
            self._rounds = self._rounds or Rounds(self._clock())
        if self._rounds and "answered" in extra:
            self._rounds.answer(extra["answered"])
        if self._rounds and "record" in extra:
            self._say(self._rounds.finish(extra["record"], extra["rounds"], self._clock()))

    def _say(self, line: Text) -> None:
        if self._live:
            self._live.console.print(line, no_wrap=True, overflow="ellipsis", highlight=False)

    def _draw(self) -> Group:
        shown = [part for part in (self._rounds, self._stage) if part and not part.over]
        return Group(*(line for part in shown for line in part.draw(self._clock())))


class _Listener(logging.Handler):
    """Hands the fields of a record on. An error in showing it never reaches the run; Ctrl-C does."""

    def __init__(self, take: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        """Take what the record carries."""
        try:
            self._take(record.__dict__)
        except Exception:
            self.handleError(record)


def _live(console: Console, draw: Callable[[], Group]) -> Live:
    return Live(
        console=console,
        get_renderable=draw,
        refresh_per_second=REFRESH,
        transient=True,
        redirect_stdout=False,  # it may be a pipe that waits for JSON
    )
