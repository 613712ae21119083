"""``edgeadapt device policy``: what a device demands of every offer."""

import json
from pathlib import Path

import click

from client.cli import options

WIDTH = 18


@click.command()
@options.state_dir
@options.as_json
def policy(state_dir: Path, as_json: bool) -> None:
    """Print the limits in force, from [policy] in device.toml; * marks what is not as by default.

    \b
    Example:
      edgeadapt device policy --state kitchen
    """
    from client.node.policy import PolicySettings
    from client.node.statedir import DeviceStateDir

    values, defaults = (
        each.model_dump(mode="json") for each in (DeviceStateDir.open(state_dir).settings.policy, PolicySettings())
    )
    if as_json:
        click.echo(json.dumps({"policy": values, "changed": [key for key in values if values[key] != defaults[key]]}))
        return
    for key, value in values.items():
        mark = " " if value == defaults[key] else "*"
        click.echo(f"{mark} {key:{WIDTH}} {json.dumps(value)}")
        click.echo(f"    {PolicySettings.model_fields[key].description}")
