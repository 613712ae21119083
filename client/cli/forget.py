"""``edgeadapt device forget``: start a device's memory of the coordinator's log anew."""

from pathlib import Path

import click

from aggregation.errors import ConfigError
from client.cli import options


@click.command()
@options.state_dir
@click.option("--yes", is_flag=True, help="Do not ask.")
def forget(state_dir: Path, yes: bool) -> None:
    """Forget what this device saw of the coordinator's log.

    For a coordinator that lost its transcripts: until then this device refuses its offers, as it should.

    \b
    Example:
      edgeadapt device forget --state kitchen
    """
    from client.node.statedir import DeviceStateDir

    opened = DeviceStateDir.open(state_dir)
    if not yes and not _wanted():
        raise ConfigError("the answer was no: this device remembers what it saw")
    with opened.locked():
        opened.save_log_state(None)
    click.echo("this device takes the coordinator's next offer as its first")


def _wanted() -> bool:
    try:
        return click.confirm("The coordinator may then show this device another past. Go on?", err=True)
    except click.Abort as error:
        if isinstance(error.__context__, EOFError):
            raise ConfigError("nobody is there to answer: give --yes") from None
        raise
