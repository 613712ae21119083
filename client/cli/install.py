"""``edgeadapt device install``: what the authority sends a device."""

from datetime import UTC, datetime
from pathlib import Path

import click

from aggregation.errors import ConfigError, of_file
from client.cli import options


@click.command()
@options.state_dir
@click.option("--certificate", type=options.FILE, metavar="FILE", help="From 'authority issue'; also a newer one.")
@click.option("--revoked", type=options.FILE, metavar="FILE", help="Revocation list; one comes with each offer too.")
def install(state_dir: Path, certificate: Path | None, revoked: Path | None) -> None:
    """Take the certificate of this device, or the authority's revocation list.

    \b
    Example:
      edgeadapt device install --state kitchen --certificate kitchen.pem
    """
    from client.node.enrolment import finish
    from client.node.statedir import DeviceStateDir

    if certificate is None and revoked is None:
        raise ConfigError("nothing to install: give --certificate or --revoked")
    opened = DeviceStateDir.open(state_dir)
    if revoked is not None:
        with of_file(revoked):
            opened.revoke(revoked.read_bytes())
        click.echo("goes by this revocation list from now on")
    if certificate is not None:
        with of_file(certificate):
            name, end = finish(opened, certificate.read_bytes(), datetime.now(UTC))
        click.echo(f"{name} is enrolled until {end:%Y-%m-%d}")
