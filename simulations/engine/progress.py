"""What a run shows while it works: one live line on a terminal, a plain one for each stage and round elsewhere. The
display listens to the log records of the coordinator and the devices; neither of them knows about it. It logs the
stages of the run itself, so that the run's log goes on before and after the rounds."""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import count as count_from
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from edgeadapt.commandline import plain_progress
from edgeadapt.formats.manifest import RoundRecord
from simulations.report.formatting import count, duration, printable, share, size
from simulations.result import ACCURACY

LEVELS = {"edgeadapt.coordinator": logging.DEBUG, "edgeadapt.device": logging.INFO, "edgeadapt.run": logging.INFO}
BAR = 12  # columns
NAMED = 3  # devices that dropped out of a round; more are counted
Clock = Callable[[], float]  # seconds, monotonic
log = logging.getLogger("edgeadapt.run")
WHOLE_RUN = 1e9  # seconds; the estimate uses every part that is done, however long a part takes


class _Shown:
    """Shows a live line on a terminal, or plain lines elsewhere, as a context manager."""

    def __init__(self, columns: Sequence[ProgressColumn], quiet: bool, console: Console | None, clock: Clock) -> None:
        console = console or Console(stderr=True)
        # The file is asked as well: FORCE_COLOR makes rich take a pipe for a terminal.
        shown = not quiet and console.file.isatty() and not console.is_dumb_terminal
        self._display = Progress(
            *columns,
            console=console,
            get_time=clock,
            disable=not shown,
            speed_estimate_period=WHOLE_RUN,
            transient=True,
            redirect_stdout=False,  # it may be a pipe that waits for JSON
        )
        self._plain = plain_progress(self._now, console.file, shown=not quiet and not shown)
        self._say: Callable[[str], None] = lambda line: None

    def __enter__(self) -> Self:
        self._display.start()
        self._say = self._plain.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._plain.__exit__(None, None, None)
        self._display.stop()  # shows the cursor again

    def _now(self) -> str:
        raise NotImplementedError

    def _print(self, line: Text) -> None:
        if not self._display.disable:
            self._display.console.print(line, highlight=False)
            return
        self._say("  ".join(word for word in (str(line), *map(_left, self._display.tasks)) if word))


class SuiteProgress(_Shown):
    def __init__(self, *, quiet: bool = False, console: Console | None = None, clock: Clock = time.monotonic) -> None:
        percentage = TextColumn("{task.percentage:>3.0f} %")
        note = TextColumn("left  {task.fields[note]}", markup=False)
        columns = (BarColumn(BAR), percentage, TimeElapsedColumn(), TimeRemainingColumn(), note)
        super().__init__(columns, quiet, console, clock)
        self._task = self._display.add_task("suite", total=None, note="")

    def _now(self) -> str:
        (task,) = self._display.tasks
        return "  ".join(word for word in (f"{task.percentage:.0f} %", task.fields["note"], _left(task)) if word)

    def show(self, done: float, left: float, lines: Sequence[str], ended: str = "") -> None:
        """Show the work that is done and left, in any unit, what each process does, and a line of what has ended."""
        note = "; ".join(printable(line) for line in lines)
        self._display.update(self._task, completed=done, total=done + left, note=note)
        if not done:
            self._display.advance(self._task, 0)  # the estimate counts from here
        if ended:
            (task,) = self._display.tasks
            self._print(Text(f"{printable(ended)}  {task.percentage:.0f} %"))


class RunProgress(_Shown):
    """Shows a run and sums the seconds that its devices spend on training in this process. ``quiet`` shows nothing and
    only listens; ``notify`` is called with what is done at the moment, in a few words."""

    def __init__(
        self,
        *,
        quiet: bool = False,
        console: Console | None = None,
        clock: Clock = time.monotonic,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        columns = (
            TextColumn("{task.fields[where]}", style="bold", markup=False),
            BarColumn(BAR),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        super().__init__(columns, quiet, console, clock)
        self._clock, self._notify = clock, notify
        self._listener = _Listener(self._take)
        self._levels: dict[str, int] = {}
        self._step, self._answered, self._asked = "", 0, 0
        self.training_seconds = 0.0
        self.metric = ACCURACY.name  # name of what rounds score

    def __enter__(self) -> Self:
        for name, level in LEVELS.items():
            logger = logging.getLogger(name)
            self._levels[name] = logger.level
            logger.setLevel(min(level, logger.getEffectiveLevel()))
            logger.addHandler(self._listener)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)
        finally:
            for name, level in self._levels.items():
                logging.getLogger(name).removeHandler(self._listener)
                logging.getLogger(name).setLevel(level)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """Show a stage while the block runs, and a line of it afterwards. ``total``: the number of its parts, if it has
        any; call the yielded function after each."""
        began, done = self._clock(), count_from(1)

        def advance() -> None:
            log.info("%s: %d of %s done", name, next(done), total)
            self._advance()

        with self._shown(name, 0, total):
            yield advance
        parts = f"{total} in " if total else ""
        line = f"{name}  {parts}{duration(self._clock() - began)}"
        log.info("%s", line)
        self._print(Text(line))

    def rounds(self, done: int, total: int) -> AbstractContextManager[None]:
        """Show the rounds while the block runs, of which ``done`` are in the registry already."""
        return self._shown("round", done, total)

    @contextmanager
    def _shown(self, name: str, done: int, total: int | None) -> Iterator[None]:
        where = _where(name, done, total)
        self._notify(where)
        if total is None or done < total:
            log.info("%s begins", where)
        task = self._display.add_task(name, total=total, completed=done, where=where, note="")
        self._display.advance(task, 0)  # the estimate counts from here
        try:
            yield
        finally:
            self._display.remove_task(task)

    def _advance(self) -> None:
        for task in self._display.tasks:  # one at most
            where = _where(task.description, int(task.completed) + 1, task.total)
            self._notify(where)
            self._display.update(task.id, advance=1, where=where, note="")

    def _now(self) -> str:
        words = [word for task in self._display.tasks for word in (*task.fields.values(), _left(task)) if word]
        return ", ".join(words) or "running"

    def _take(self, extra: Mapping[str, Any]) -> None:
        self.training_seconds += extra.get("training_seconds", 0.0)
        if "answered" in extra:
            self._answer(extra["answered"])
        if "record" in extra:
            self._advance()
            self._print(_round_line(extra["record"], self.metric))

    def _answer(self, step: str) -> None:
        if step != self._step:  # no more devices are asked than answered the step before
            self._asked, self._step, self._answered = self._answered, step, 0
        self._answered += 1
        of = f" of {self._asked}" if self._asked >= self._answered else ""
        for task in self._display.tasks:
            self._display.update(task.id, note=f"{step}: {self._answered}{of} answered")


class _Listener(logging.Handler):
    """Passes the fields of a log record on. An error in showing them never reaches the run; Ctrl-C does."""

    def __init__(self, take: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._take = take

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._take(record.__dict__)
        except Exception:
            self.handleError(record)


def _where(name: str, done: int, total: float | None) -> str:
    return f"{name} {min(done + 1, int(total))} of {int(total)}" if total else name


def _left(task: Task) -> str:
    """Say how long a task will take, at the pace of its parts that are done; empty before the first one."""
    return f"about {duration(task.time_remaining)} left" if task.time_remaining else ""


def _round_line(record: RoundRecord, metric: str) -> Text:
    gone, steps = record.dropped, Counter(record.dropped.values()).items()
    few = (f"{printable(device)} at {step}" for device, step in gone.items())
    dropped = ", ".join(few if len(gone) <= NAMED else (f"{devices} at {step}" for step, devices in steps))
    parts = [f"round {record.round:>2}"]
    if record.aborted:
        parts += [f"aborted: {printable(record.aborted)}"]
    else:
        metrics = record.metrics
        parts += [f"{metric} {share(metrics[ACCURACY.key])}"] if ACCURACY.key in metrics else []
        parts += [f"loss {metrics['loss']:.3f}"] if "loss" in metrics else []
        parts += [count(len(record.survivors), "device"), size(record.bytes_up + record.bytes_down)]
    parts += [f"dropped: {dropped}"] if dropped else []
    return Text("  ".join(parts), style="yellow" if record.aborted else "")
