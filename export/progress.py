"""How far an export is, on standard error."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from edgeadapt.commandline import is_quiet, plain_progress
from export.onnx.exported import Report

WHOLE_STAGE = 1e9  # seconds; the estimate uses every part of a stage that is done, however long a part takes


@contextmanager
def progress(label: str) -> Iterator[Report]:
    """Show how far an export is on standard error: what it does, and on a terminal when that will be done."""
    # ``edgeadapt.commandline.status`` does the same.
    console = Console(file=sys.stderr, force_terminal=sys.stderr.isatty())
    display = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=WHOLE_STAGE,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal or is_quiet(),
    )
    shown: dict[str, TaskID] = {}

    def report(stage: str, done: int, total: int) -> None:
        if stage not in shown:
            for task in shown.values():
                display.remove_task(task)
            shown.clear()
            shown[stage] = display.add_task(f"{label}: {stage}" if stage else label, total=total or None)
        display.update(shown[stage], completed=done, total=total or None)

    def now() -> str:
        return " ".join(
            f"{task.description} {f'{task.completed:.0f} of {task.total:.0f}' if task.total else ''}".rstrip()
            for task in display.tasks
        )

    with display, plain_progress(now, console.file, shown=not console.is_terminal and not is_quiet()):
        report("", 0, 0)
        yield report
