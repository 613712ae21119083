"""What the command line and the commands of every package share."""

import importlib
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any

import click

PERIOD = 10.0  # seconds between two lines of progress
Row = tuple[str, str, str, str]  # module, attribute, one line for --help, extra that it needs


def program() -> str:
    """Name the program as it must be typed here: ``edgeadapt`` if the shell finds it, else Python with ``-m``."""
    if shutil.which("edgeadapt"):
        return "edgeadapt"
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{shlex.quote(str(shown))} -m edgeadapt"


class LazyGroup(click.Group):
    """Groups commands and imports one only when it is called or its help is requested.

    So a command starts without the libraries of the others, and a command whose extra is not installed names the
    extra: ``click.command(cls=LazyGroup, table={command: row})``.
    """

    def __init__(self, *args: Any, table: Mapping[str, Row], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self._table)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command; None if the table does not have it. Raises click.ClickException without its packages."""
        if cmd_name not in self._table:
            return None
        module, attribute, _, _ = self._table[cmd_name]
        try:
            command: click.Command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            self._explain(cmd_name, error)
            raise
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, which may import more packages. Raises as ``get_command``."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            self._explain(ctx.invoked_subcommand or "", error)
            raise

    def _explain(self, name: str, error: ModuleNotFoundError) -> None:
        module, _, _, extra = self._table.get(name, ("", "", "", ""))
        package = (error.name or "").partition(".")[0]
        if extra and package != module.partition(".")[0]:
            raise click.ClickException(
                f"'{name}' needs {package}, which is not installed: pip install 'edgeadapt[{extra}]'"
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the lines of the table, so that ``--help`` imports no command."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, row[2]) for name, row in self._table.items()])


class FiniteRange(click.FloatRange):
    """Accepts a number of a range. click's own accepts NaN, which is neither below a bound nor above it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


@contextmanager
def plain_progress(now: Callable[[], str], file: IO[str], *, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Yield what prints a line, where no terminal shows progress. After ``PERIOD`` silent seconds, another thread calls
    ``now``, which says what is being done in a few words, and prints that."""
    began, ended = time.monotonic(), Event()
    spoke = began

    def say(line: str) -> None:
        nonlocal spoke
        if shown:
            spoke = time.monotonic()
            print(line, file=file, flush=True)

    def speak() -> None:
        while not ended.wait(spoke + PERIOD - time.monotonic()):
            if time.monotonic() >= spoke + PERIOD:
                say(f"{now()} ({time.monotonic() - began:.0f} s)")

    speaker = Thread(target=speak, daemon=True)
    if shown:
        speaker.start()
    try:
        yield say
    finally:
        ended.set()
        if shown:
            speaker.join()


@contextmanager
def status(label: str) -> Iterator[Callable[[str], None]]:
    """Show on standard error what is being done: ``label``, until the yielded function is called with another text. A
    terminal has a spinner, anything else a line every ``PERIOD`` seconds."""
    from rich.console import Console  # which the bare install lacks

    # FORCE_COLOR makes rich take a pipe for a terminal. The file is fixed now: torch's is redirected while it traces.
    console, texts = Console(file=sys.stderr, force_terminal=sys.stderr.isatty()), [label]
    plain = plain_progress(lambda: texts[0], console.file, shown=not console.is_terminal)
    with console.status(label) as display, plain:

        def update(text: str) -> None:
            texts[0] = text
            display.update(text)

        yield update
