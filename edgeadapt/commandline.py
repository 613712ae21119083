"""What the command line and the commands of every package share."""

import importlib
import json
import logging
import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from pathlib import Path
from threading import Event, Thread
from typing import IO, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

PERIOD = 10.0  # seconds between two lines of progress
WHOLE_STAGE = 1e9  # seconds; an estimate uses every part of a stage that is done, however long a part takes
QUIET = "edgeadapt.quiet"
TERMINATED = 143  # the exit code that a shell reports for a command that SIGTERM ended
HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
FOLDER = click.Path(path_type=Path)
FILE = click.Path(path_type=Path, dir_okay=False)
Decorator = Callable[[Any], Any]
Row = tuple[str, str, str, str]  # module, attribute, one line for --help, extra that it needs

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
as_lines = click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line.")


def _keep_quiet(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    context.meta[QUIET] = wanted


quiet = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_keep_quiet, help="Show no progress, only the result."
)


def is_quiet() -> bool:
    context = click.get_current_context(silent=True)
    return context is not None and bool(context.meta.get(QUIET))


def print_result(row: Mapping[str, Any], line: str, as_json: bool) -> None:
    click.echo(json.dumps(row, ensure_ascii=False) if as_json else line)


class JsonLines(logging.Formatter):
    """Formats each record of a log as an object: ``time``, ``level``, ``event``, and the texts and numbers that it has
    besides; not what other libraries attach for themselves, under names that begin with an underscore."""

    HEAD = ("time", "level", "event")
    USUAL = vars(logging.makeLogRecord({})).keys() | {"message", "asctime"}

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self._always = {"device": device} if device else {}

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        row: dict[str, Any] = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        row |= self._always
        known = {key: value for key, value in vars(record).items() if key not in self.USUAL and key[0] != "_"}
        row |= {key: value for key, value in known.items() if isinstance(value, str | int | float)}
        if record.exc_info and record.exc_info[1]:
            row["error"] = repr(record.exc_info[1])
        return json.dumps(row, ensure_ascii=False)


def relayed(line: str, **fields: Any) -> logging.LogRecord:
    """Make a record of a line that another process wrote: what it was, if ``JsonLines`` formatted it; else the event
    ``output`` with the line as its ``text``. ``fields``: what else is known."""
    try:
        row = json.loads(line)
        time, level, event = (row.pop(key) for key in JsonLines.HEAD)
        head = datetime.fromisoformat(time).timestamp(), logging.getLevelNamesMapping()[level.upper()], str(event)
        fields |= {key: value for key, value in row.items() if key not in JsonLines.USUAL}
    except (ValueError, TypeError, AttributeError, KeyError):
        head, fields = (datetime.now(UTC).timestamp(), logging.INFO, "output"), fields | {"text": line}
    return log_record(*head, **fields)


def log_record(created: float, level: int, event: str, **fields: Any) -> logging.LogRecord:
    """Make a record for ``Logger.handle``. ``created``: seconds since the epoch."""
    named = {"created": created, "levelno": level, "levelname": logging.getLevelName(level)}
    return logging.makeLogRecord({**fields, **named, "msg": event})


class LogHandler(logging.StreamHandler[IO[str]]):
    """Writes lines of a log. Where that fails, as for want of a reader, it says so once, and the program goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        with Path(os.devnull).open("w") as nowhere:  # also what is still in the buffer
            os.dup2(nowhere.fileno(), self.stream.fileno())
        with suppress(OSError):
            print(f"edgeadapt: the log cannot be written ({error.strerror}): this goes on without", file=sys.stderr)


def show_log(as_json: bool, device: str = "") -> logging.Logger:
    """Show what the parts of the program log: lines on standard error, or objects on standard output; if the command
    is to be quiet, warnings only. Returns the log for what the command itself has to say."""
    handler = LogHandler(sys.stdout if as_json else sys.stderr)
    handler.setFormatter(JsonLines(device) if as_json else logging.Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler])
    log = logging.getLogger("edgeadapt")
    log.setLevel(logging.WARNING if is_quiet() else logging.INFO)
    return log


def program() -> str:
    """Name the program as it must be typed here: ``edgeadapt`` if the shell finds it, else Python with ``-m``."""
    if shutil.which("edgeadapt"):
        return "edgeadapt"
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    return f"{shlex.quote(str(shown))} -m edgeadapt"


class HelpfulGroup(click.Group):
    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, args or ["--help"])


class LazyGroup(HelpfulGroup):
    """Imports a command only when it is called or its help is requested, so that it starts without the libraries of the
    others, and names the extra that it lacks. ``table``: the commands, in the order of ``--help``; ``sections``: its
    headings."""

    def __init__(
        self, *args: Any, table: Mapping[str, Row], sections: Mapping[str, Sequence[str]] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **{"context_settings": HELP_OPTIONS, **kwargs})
        self._table = table
        self._sections = {"Commands": tuple(table)} if sections is None else sections

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
            self._explain(ctx, cmd_name, error)
            raise
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self._table and not ctx.resilient_parsing:
            close = " or ".join(map(repr, get_close_matches(args[0], self._table)))
            if "run" in self._table and (Path(args[0]).suffix or os.access(args[0], os.F_OK)):
                close = repr(f"run {args[0]}")
            ctx.fail(f"No such command {args[0]!r}{close and f'; did you mean {close}?'}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # click would print an empty line, also between objects
            raise click.Abort from None
        except ModuleNotFoundError as error:
            self._explain(ctx, ctx.invoked_subcommand or "", error)
            raise

    def _explain(self, ctx: click.Context, name: str, error: ModuleNotFoundError) -> None:
        module, _, _, extra = self._table.get(name, ("", "", "", ""))
        package = (error.name or "").partition(".")[0]
        if extra and package != module.partition(".")[0]:
            called = " ".join([*ctx.command_path.split()[1:], name])
            reason = f"{called!r} needs {package}, which is not installed: pip install 'edgeadapt[{extra}]'"
            raise click.ClickException(reason) from error

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete from the table, and options as every command does: no command is imported."""
        names = [name for name in self._table if name.startswith(incomplete)]
        return [
            *(CompletionItem(name, help=self._table[name][2]) for name in names),
            *click.Command.shell_complete(self, ctx, incomplete),
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self._table))
        for heading, names in self._sections.items():
            with formatter.section(heading):
                formatter.write_dl([(name.ljust(width), self._table[name][2]) for name in names])


def option(declared: str, meaning: str, *, name: str | None = None, **settings: Any) -> Decorator:
    """Add an option as ``--help`` shows it, such as ``--out FILE``. ``name``: of its argument, if not as the flag's."""
    flag, _, metavar = declared.partition(" ")
    return click.option(*filter(None, (flag, name)), metavar=metavar or None, help=meaning, **settings)


def adapter(name: str, meaning: str, **settings: Any) -> Decorator:
    return option("--adapter NAME", meaning, name=name, **settings)


def path_option(flag: str, meaning: str, *, metavar: str = "FILE", **settings: Any) -> Decorator:
    """Add an option that takes a path, shown as that of a file unless ``metavar`` says otherwise."""
    return option(f"{flag} {metavar}", meaning, **{"type": FOLDER, **settings})


def number_option(flag: str, meaning: str, least: int, most: int | None = None, **settings: Any) -> Decorator:
    """Add an option that takes a whole number from ``least`` to ``most``. Its default is shown, if it has one."""
    usual: dict[str, Any] = {"type": click.IntRange(least, most), "show_default": "default" in settings}
    return option(f"{flag} {settings.pop('metavar', '')}".rstrip(), meaning, **usual | settings)


def bundle(meaning: str = "The bundle's folder.", *, new: bool = False, **settings: Any) -> Decorator:
    """Add ``--bundle DIR``, by default ``$EDGEADAPT_BUNDLE`` or else ``./bundle``, which must exist unless ``new``."""

    def check(context: click.Context, _: click.Parameter, folder: Path) -> Path:
        defaulted = context.get_parameter_source("bundle") is ParameterSource.DEFAULT
        if defaulted and not new and not folder.exists():
            text = f"there is no ./{folder}: name the bundle's folder with --bundle DIR or EDGEADAPT_BUNDLE, or make it"
            context.fail(f"{text} ('edgeadapt bundle make')")
        return folder

    default = "  [default: $EDGEADAPT_BUNDLE, else ./bundle]"
    settings |= {"envvar": "EDGEADAPT_BUNDLE", "default": "bundle", "help": meaning + default, "callback": check}
    return click.option("--bundle", type=FOLDER, metavar="DIR", **settings)


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
def status(label: str) -> Iterator[Callable[..., None]]:
    """Show on standard error what is being done: ``label``, and after it the stage with which the yielded function was
    called last, and how many of its parts are done if their number is given. A terminal has a line that changes,
    anything else a line every ``PERIOD`` seconds."""
    # The bare install lacks rich.
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    # FORCE_COLOR makes rich take a pipe for a terminal. The file is fixed now: torch's is redirected while it traces.
    console = Console(file=sys.stderr, force_terminal=sys.stderr.isatty())
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(20), TaskProgressColumn()
    display = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=WHOLE_STAGE,
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
        disable=not console.is_terminal or is_quiet(),
    )

    def report(stage: str, done: int = 0, total: int = 0) -> None:
        named = f"{label}: {stage}" if stage else label
        for task in display.tasks:
            if task.description != named:
                display.remove_task(task.id)
        shown = display.task_ids[0] if display.tasks else display.add_task(named, total=total or None)
        display.update(shown, completed=done, total=total or None)

    def now() -> str:
        (task,) = display.tasks or (None,)
        of = f"{task.completed:.0f} of {task.total:.0f}" if task and task.total else ""
        return f"{task.description if task else label} {of}".rstrip()

    with display, plain_progress(now, console.file, shown=not console.is_terminal and not is_quiet()):
        report("")
        yield report
