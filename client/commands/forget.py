"""``edgeadapt device forget``: start a device's memory of the coordinator's log anew."""

from pathlib import Path

import click

from client.commands import options


@click.command()
@options.home
@click.confirmation_option(prompt="The coordinator may then show this device another past. Go on?")
def forget(home: Path) -> None:
    """Forget what this device saw of the coordinator's log.

    For a coordinator that lost its transcripts: until then this device refuses its offers, as it should.

    \b
    Example:
      edgeadapt device forget --home kitchen
    """
    from client.home import Home

    opened = Home.open(home)
    with opened.locked():
        opened.save_witness(None)
    click.echo("this device takes the coordinator's next offer as its first")
