"""``edgeadapt coordinator rounds``: each round, and with ``--follow`` those to come."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli.options import as_json, directory

if TYPE_CHECKING:
    from coordinator.sessionprogress import SessionProgress

LOOK = 0.5  # seconds between two looks


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
    from coordinator.statedir import TRANSCRIPT, CoordinatorStateDir
    from coordinator.status import HEADING, round_line, round_row

    opened, shown = CoordinatorStateDir.open(state_dir), 0
    follower, live = LogFollower(state_dir / TRANSCRIPT), follow and sys.stderr.isatty()
    if not as_json:
        click.echo(HEADING)
    while True:
        new = opened.registry.rounds(shown + 1)
        if live and new:
            click.echo("\r\x1b[K", nl=False, err=True)
        for record in new:
            row = round_row(record)
            click.echo(json.dumps(row) if as_json else round_line(row))
        shown += len(new)
        if not follow or shown >= opened.settings.rounds:
            return
        if live and (progress := follower.look()) is not None:
            _show(shown + 1, progress)
        time.sleep(LOOK)


def _show(number: int, progress: "SessionProgress") -> None:
    """Replace the last line of the terminal by what is under way."""
    step = progress.step
    devices = f"{progress.answered} of {progress.devices or '?'} devices"
    text = "" if step is None else f"round {number}, {step.value}: {devices}"
    click.echo(f"\r\x1b[K{text}", nl=False, err=True)
