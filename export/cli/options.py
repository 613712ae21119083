"""The options that commands of ``edgeadapt bundle`` share, and how their values are read."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
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

from aggregation.errors import ConfigError
from edgeadapt.commandline import FOLDER, is_quiet, plain_progress
from edgeadapt.formats.peftconfig import PeftConfig, require_gradients
from edgeadapt.formats.storage import read_lines
from export.bundle import sources
from export.onnx.exported import ExportedBase, Report

PROFILE = "native-int8"  # by default
WHOLE_STAGE = 1e9  # seconds; the estimate uses every part of a stage that is done, however long a part takes

profiled = click.option("--profile", metavar="NAME", help=f"How weights of the base are stored. Default: {PROFILE}.")
signed_by = click.option(
    "--key", "key_file", type=FOLDER, required=True, metavar="KEY.pem", help="Private key that signs; see 'key'."
)
from_registry = click.option(
    "--registry", type=FOLDER, metavar="DIR", help="A coordinator's state directory with a registry."
)
from_folder = click.option("--peft", "peft_folder", type=FOLDER, metavar="DIR", help="A folder that peft saved.")
which = click.option(
    "--version",
    type=click.IntRange(0, 2**63 - 1),
    metavar="N",
    help="Version. Default: the newest; of a PEFT folder the one after the bundle's.",
)
pinned = click.option(
    "--trust",
    type=FOLDER,
    metavar="FILE",
    help="Public keys. Default: the registry's own, or trust.pem in the folder that holds the bundle.",
)
the_labels = click.option(
    "--labels", type=FOLDER, metavar="FILE", help="Of a PEFT folder: the labels of its head, one a line, in order."
)


def origin_of(
    registry: Path | None, folder: Path | None, version: int | None, trust: Path | None, labels: Path | None
) -> sources.Origin:
    """Read the adapter that ``--registry`` or ``--peft`` names."""
    if folder is not None and registry is None:
        return sources.from_peft(
            folder, 1 if version is None else version, read_lines(labels, "label") if labels else ()
        )
    if registry is None or folder is not None:
        raise ConfigError("name one source of the adapter: --registry DIR or --peft DIR", about="--registry")
    if labels is not None:
        raise ConfigError("--labels is for a PEFT folder; a registry states its labels itself", about="--labels")
    return sources.from_registry(registry, version, trust)


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
            shown[stage] = display.add_task(f"{label}: {stage}", total=total or None)
        display.update(shown[stage], completed=done, total=total or None)

    def now() -> str:
        return " ".join(
            f"{task.description} {f'{task.completed:.0f} of {task.total:.0f}' if task.total else ''}".rstrip()
            for task in display.tasks
        )

    with display, plain_progress(now, console.file, shown=not console.is_terminal and not is_quiet()):
        report("reading", 0, 0)
        yield report


def learning(exported: ExportedBase, config: PeftConfig | None) -> str:
    """Complete a line about an exported base: whether devices can train it, or the adapter that it is for."""
    reason = exported.untrainable
    if config is not None and exported.gradients is not None:
        try:
            require_gradients(config)
        except ConfigError as error:
            reason = str(error)
    if reason:
        return f"\ndevices cannot train it without torch: {reason}"
    difference = exported.gradients
    return "" if difference is None else f", devices can train it (gradients {difference:.2g} from torch)"
