"""What a suite shows while it runs: one bar over all jobs, a line for each process, and plain lines elsewhere."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from commandline import plain_progress
from simulations.engine.progress import BAR, WHOLE_RUN
from simulations.report.formatting import printable


class SuiteProgress:
    """A context manager that shows how much of a suite is done.

    Args:
        quiet: Show nothing.
        console: Where to show it, by default standard error.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        shown = not quiet and console.file.isatty() and not console.is_dumb_terminal
        self._display = Progress(
            BarColumn(BAR),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[note]}", markup=False),
            console=console,
            disable=not shown,
            speed_estimate_period=WHOLE_RUN,
            transient=True,
            redirect_stdout=False,
        )
        self._plain = plain_progress(self._now, console.file, shown=not quiet and not shown)
        self._task = self._display.add_task("suite", total=None, note="")

    def __enter__(self) -> Self:
        self._display.start()
        self._plain.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._plain.__exit__(None, None, None)
        self._display.stop()  # shows the cursor again

    def _now(self) -> str:
        (task,) = self._display.tasks
        return f"{task.percentage:.0f} %  {task.fields['note']}".rstrip()

    def show(self, done: float, left: float, lines: Sequence[str]) -> None:
        """Show the work that is done and left, in any unit, and what each process does."""
        note = "; ".join(printable(line) for line in lines)
        self._display.update(self._task, completed=done, total=done + left, note=note)
