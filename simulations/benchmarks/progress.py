"""The bar that a benchmark shows while it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; elsewhere nothing. Yields what is to be called at the beginning of each step."""
    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # The file is asked as well: FORCE_COLOR makes rich take a pipe for a terminal.
    with Progress(*columns, console=console, transient=True, disable=not console.file.isatty()) as bar:
        task = bar.add_task("", total=steps, completed=-1)
        yield lambda what: bar.update(task, advance=1, description=what)
