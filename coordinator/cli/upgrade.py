"""``edgeadapt coordinator upgrade``: bring a coordinator's registry to the tables of this edgeadapt."""

import json
from pathlib import Path

import click

from coordinator.cli.options import as_json, directory


@click.command(short_help="Bring an older registry to this version's tables.")
@directory
@as_json
def upgrade(state_dir: Path, as_json: bool) -> None:
    """Bring the registry of the coordinator in DIR, in SQLite or PostgreSQL, to the tables of this edgeadapt.

    One transaction does all of it or nothing. In PostgreSQL the transcript is kept as well: call it on the machine that
    has that. Stop the coordinator and back it up first: an older edgeadapt cannot
    read the registry any more.

    \b
    Example:
      edgeadapt coordinator stop fleet
      edgeadapt coordinator upgrade fleet
    """
    from coordinator.registry import migrations
    from coordinator.statedir import TRANSCRIPT, registry_url, run_lock
    from edgeadapt.formats.registryfiles import SCHEMA, require

    require(state_dir)
    with run_lock(state_dir):
        found = migrations.upgrade(registry_url(state_dir), state_dir / TRANSCRIPT)
    if as_json:
        click.echo(json.dumps({"state": str(state_dir), "from": found, "to": SCHEMA}))
        return
    click.echo(f"revision {found} → {SCHEMA}" if found != SCHEMA else f"revision {SCHEMA}: nothing to do")
