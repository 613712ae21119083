"""The command `edgeadapt`. It mounts the commands of each part, and imports a part only when one of them is called. So
`edgeadapt device …` starts in a second on a machine that has neither torch nor flwr. A command whose extra is not
installed names the extra; the other commands work."""

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from tempfile import gettempdir
from types import FrameType
from typing import Any

import click

from aggregation.errors import EdgeAdaptError
from edgeadapt.commandline import TERMINATED, JsonLines, LazyGroup, log_record

# command → (module, attribute, one line for --help, extra that it needs); the groups have no extra, their commands do
COMMANDS = {
    "demo": (
        "simulations.cli.simulate",
        "demo",
        "Households personalize a frozen model together; start here.",
        "simulations",
    ),
    "new": ("edgeadapt.cli.new", "new", "Make a scenario with texts, or a trial fleet.", ""),
    "doctor": ("edgeadapt.cli.doctor", "doctor", "Check what is installed, and this machine.", ""),
    "simulate": ("simulations.cli", "simulate_group", "Run and compare federations on this machine.", ""),
    "base": ("export.cli", "base_group", "Find, change and start from a frozen model.", ""),
    "bundle": ("export.cli", "bundle_group", "Make bundles for devices: a base and its adapters.", ""),
    "device": ("client.cli", "device", "Answer, learn and take part, on a device.", ""),
    "authority": ("coordinator.cli", "authority_group", "Enrol devices: certify their keys, revoke them.", ""),
    "coordinator": ("coordinator.cli", "coordinator_group", "Make a coordinator, run its rounds.", ""),
    "release": ("edgeadapt.cli", "release_group", "Release bundles by channel, gated, in stages, and back.", ""),
    "audit": ("edgeadapt.cli", "audit_group", "Check from its transcripts what a coordinator did.", ""),
}
SECTIONS = {
    "Start": ("demo", "new", "doctor"),
    "Research": ("simulate",),
    "Apps": ("base", "bundle", "device"),
    "Operate": ("authority", "coordinator", "release"),
    "Trust": ("audit",),
}
PROGRAM = "edgeadapt"
OWN = ("client", "coordinator", "export", "simulations")  # packages with names that others use too
INTERRUPTED = 130  # the exit code that a shell reports for a command that Ctrl-C ended
IMPORT = "<frozen importlib._bootstrap>"  # the file that Python names for the frames of an import

# At run time nothing is downloaded and nothing is reported, whatever the defaults of a library are.
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@click.command(cls=LazyGroup, table=COMMANDS, sections=SECTIONS)
@click.version_option(package_name=PROGRAM)
def cli() -> None:
    """Federated on-device personalization: adapters over a frozen model, secure aggregation, signed ONNX.

    \b
    Examples:
      edgeadapt demo --out runs/demo
      edgeadapt device infer --bundle runs/demo/bundle "turn on the kitchen lights"
      edgeadapt audit verify runs/demo
    """


def main(command: click.Command | None = None, program: str = PROGRAM) -> None:
    """Run a command line. An error is one line on standard error and the exit code of its class."""
    report = sys.unraisablehook
    sys.unraisablehook = partial(_unraisable, report)
    try:
        _prepare()
        sys.exit((command or cli)(prog_name=program, standalone_mode=False))
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except SystemExit as error:
        if error.code != TERMINATED:
            raise
        _fail("terminated", TERMINATED)
    except (EdgeAdaptError, click.ClickException, click.Abort, KeyboardInterrupt, MemoryError, OSError) as error:
        _fail(*_explained(error, program))
    finally:
        sys.unraisablehook = report


def _explained(error: BaseException, program: str) -> tuple[str, int]:
    if isinstance(error, EdgeAdaptError):
        return str(error), error.exit_code
    if isinstance(error, click.UsageError):
        called = error.ctx.command_path if error.ctx else program
        message = error.format_message().rstrip(".")
        return f"{message}{'' if message.endswith('?') else ';'} see '{called} --help'", error.exit_code
    if isinstance(error, click.ClickException):
        return error.format_message(), error.exit_code
    if isinstance(error, MemoryError):
        return "this machine does not have enough memory", 1
    if isinstance(error, OSError):
        return _of_system(error), 1
    return "interrupted", INTERRUPTED


def _of_system(error: OSError) -> str:
    """Say what a system call could not do, to which file, and what to do where that is known."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    # Of two files, as of a copy, a full disk is that of the second.
    files = [error.filename2] if full and error.filename2 else [error.filename, error.filename2]
    named = " -> ".join(str(os.fsdecode(file)) for file in files if isinstance(file, str | bytes | os.PathLike))
    place = "there" if named else f"where the command writes, and in {gettempdir()}"
    remedies = {
        errno.ENOSPC: f"free some space {place}, and repeat the command",
        errno.EDQUOT: f"free some of your quota {place}, and repeat the command",
        errno.EROFS: "name a place that can be written",
        errno.EACCES: "let this user use it, or name another one" if named else "",
    }
    return ": ".join(filter(None, [error.strerror or str(error), named, remedies.get(error.errno or 0, "")]))


def _prepare() -> None:
    """Set up the process. Raises click.ClickException if a folder or another distribution shadows a package of ours."""
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may contain bytes that cannot be printed
    if not sys.warnoptions:  # warnings of libraries are for developers
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, _interrupt)
    if sys.argv[1:2] != ["doctor"] and (reason := shadowed()):
        raise click.ClickException(reason)


def shadowed() -> str:
    """Say which folder or other distribution stands in front of a package of ours; empty if none does."""
    here = Path(__file__).parents[1]
    for name in OWN:
        spec = find_spec(name)
        places = list(spec.submodule_search_locations or ()) if spec else []
        if places and not any(Path(place).resolve() == (here / name).resolve() for place in places):
            reason = f"{places[0]} stands in front of edgeadapt's own {name!r}"
            return f"{reason}: run the command in another folder or environment, or rename it"
    return ""


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End by an exception, so that no temporary file is left. SIGTERM not as Ctrl-C, after which a chat goes on. A
    signal during an import takes effect after it: libraries crash, or report another error, when one of their modules
    in C meets an exception as it begins. So does one in ``_unraisable``, whose exceptions Python drops too."""
    while frame is not None:
        if frame.f_code.co_filename == IMPORT or frame.f_code is _unraisable.__code__:
            _send_again(number)
            return
        frame = frame.f_back
    if number == signal.SIGTERM:
        sys.exit(TERMINATED)
    raise KeyboardInterrupt


def _send_again(number: int) -> None:
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()


def _unraisable(report: Callable[[Any], object], dropped: Any) -> None:
    """Send a signal again that came during a callback or finalizer, whose exceptions Python reports and drops."""
    error = dropped.exc_value
    if isinstance(error, KeyboardInterrupt):
        number = signal.SIGINT
    elif isinstance(error, SystemExit) and error.code == TERMINATED:
        number = signal.SIGTERM
    else:
        report(dropped)
        return
    _send_again(number)  # after the callback, whose exceptions are dropped


def _fail(message: str, code: int) -> None:
    """Print what ended a command, as one line. One that prints its log as JSON has nothing else in its output."""
    line, handlers = " ".join(message.split()), logging.getLogger().handlers
    log = next((each.formatter for each in handlers if isinstance(each.formatter, JsonLines)), None)
    row = {"error": line}
    if log is not None:
        row = {**json.loads(log.format(log_record(time.time(), logging.ERROR, line))), **row}
    try:
        if "--json" in sys.argv:
            print(json.dumps(row), flush=True)
            if log is not None:
                sys.exit(code)
    except OSError:  # it may be the output that failed: a full disk, a pipe that was closed
        pass
    begin = "\n" if code == INTERRUPTED and sys.stderr.isatty() else ""  # the terminal's line has ^C
    print(f"{begin}{PROGRAM}: {line}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
