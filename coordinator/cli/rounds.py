"""``edgeadapt coordinator rounds``: each round, and with ``--follow`` those to come."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from coordinator.cli.options import as_json, directory

if TYPE_CHECKING:
    from coordinator.sessionprogress import SessionProgress

LOOK = 0.5  # seconds between two polls


@click.command(short_help="Show the rounds, and with --follow those to come.")
@directory
@click.option("--follow", is_flag=True, help="Wait for those to come, until all are done.")
@as_json
def rounds(state_dir: Path, follow: bool, as_json: bool) -> None:
    """Show each round of the coordinator in DIR. With --json each is an object on a line.

    --follow waits for those to come, and shows the step that is under way. It only reads: Ctrl-C ends nothing else.

    \b
    Examples:
      edgeadapt coordinator rounds fleet
      edgeadapt coordinator rounds fleet --follow
      edgeadapt coordinator rounds fleet --follow --json
    """
    from coordinator.sessionprogress import LogFollower
    from coordinator.statedir import CoordinatorStateDir
    from coordinator.status import heading, round_lines, round_row
    from edgeadapt.formats.registryfiles import TRANSCRIPT

    opened, shown = CoordinatorStateDir.open(state_dir), 0
    follower, live = LogFollower(state_dir / TRANSCRIPT), _LiveLine(follow and sys.stderr.isatty())
    if not as_json:
        click.echo(heading(_width(sys.stdout)))
    try:
        while True:
            for record in opened.registry.rounds(shown + 1):
                live.show("")
                row = round_row(record)
                lines = [json.dumps(row)] if as_json else round_lines(row, _width(sys.stdout))
                click.echo("\n".join(lines))
                shown += 1
            if not follow or shown >= opened.settings.rounds:
                return
            live.show(_under_way(shown + 1, follower.look()))
            time.sleep(LOOK)
    finally:
        live.show("")


@dataclass(slots=True)
class _LiveLine:
    """The last line of a terminal, which is replaced; nothing elsewhere."""

    on: bool
    _shown: str = ""

    def show(self, text: str) -> None:
        """Replace it. What does not fit is cut off: of a line that the terminal has wrapped, only the end is erased."""
        if not self.on:
            return
        text = text[: max(_width(sys.stderr) - 1, 0)]
        if text != self._shown:
            click.echo(f"\r\x1b[K{text}", nl=False, err=True)
            self._shown = text


def _width(file: TextIO) -> int:
    """Columns of the terminal that a stream writes to; 0 without one."""
    try:
        return os.get_terminal_size(file.fileno()).columns
    except (OSError, ValueError):
        return 0


def _under_way(number: int, progress: "SessionProgress | None") -> str:
    """Name the step of a round, shorter than 40 columns up to 999 devices."""
    if progress is None or progress.step is None:
        return f"round {number}: waiting"
    devices = f"{progress.answered} of {progress.devices or '?'} devices"
    return f"round {number}, {progress.step.value}: {devices}"
