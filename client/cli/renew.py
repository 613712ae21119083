"""``edgeadapt device renew``: have a device's certificate renewed where no agent does it."""

import json
import re
from pathlib import Path

import click

from aggregation.errors import ConfigError
from client.cli import options
from edgeadapt import commandline
from edgeadapt.formats import storage


@click.command()
@options.state_dir
@click.option("--renewal", metavar="HOST:PORT", help="Of the authority's service. Default: 'renewal' in device.toml.")
@commandline.as_json
def renew(state_dir: Path, renewal: str | None, as_json: bool) -> None:
    """Have the certificate of this device renewed, if it is in the last third of its validity.

    An agent does so by itself: this is for a device whose agent does not run for weeks. The key stays. If the authority
    refuses or cannot be reached, the certificate stays in use.

    \b
    Examples:
      edgeadapt device renew --state kitchen
      edgeadapt device renew --state kitchen --renewal authority.example:9444 --json
    """
    from datetime import UTC, datetime

    from aggregation.pki.certificates import load, subject
    from client.gateway import enrolment as service
    from client.node.statedir import AGENT_LOCK, DeviceStateDir
    from edgeadapt.formats.gateway.invitation import ADDRESS

    opened = DeviceStateDir.open(state_dir)
    address = renewal or opened.settings.renewal
    if not address:
        text = f"{state_dir} names no service that renews certificates: give --renewal HOST:PORT"
        raise ConfigError(text, about="--renewal")
    if not re.fullmatch(ADDRESS, address):
        raise ConfigError(f"--renewal is {address!r}, and not HOST:PORT", about="--renewal")
    text = f"an agent, or another 'device renew', uses {state_dir} and renews the certificate: nothing was changed"
    with storage.locked_or(ConfigError(text, about=AGENT_LOCK), state_dir / AGENT_LOCK):
        due, end = service.validity(opened, datetime.now(UTC))
        if due:
            end = service.renew(opened, address)
    device = subject(load(opened.certificate))
    if as_json:
        click.echo(json.dumps({"device": device, "renewed": due, "until": end.isoformat()}))
        return
    changed = "renewed" if due else "not renewed before the last third of its validity"
    click.echo(f"{device}: certificate valid until {end:%Y-%m-%d}, {changed}")
