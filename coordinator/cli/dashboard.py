"""``edgeadapt coordinator dashboard``: what goes on in a fleet, as a live page and as metrics."""

from pathlib import Path

import click

from aggregation.errors import ConfigError
from coordinator.cli.options import directory


@click.command(short_help="Serve a live page, and metrics for Prometheus.")
@directory
@click.option("--listen", default="127.0.0.1:9500", show_default=True, metavar="HOST:PORT", help="Serve here.")
@click.option(
    "--channels", type=click.Path(path_type=Path), metavar="DIR", help="Show a repository of channels as well."
)
def dashboard(state_dir: Path, listen: str, channels: Path | None) -> None:
    """Serve a page with rounds, dropouts, accuracy, privacy, services and channels, and /metrics for Prometheus.

    Log in with the token in DIR/dashboard.token, which the first start makes; Prometheus sends it as a bearer token. On
    127.0.0.1 there is no TLS: reach it from elsewhere through a tunnel, such as 'ssh -L 9500:127.0.0.1:9500 HOST'. On
    other addresses it has DIR/tls.key and DIR/tls.pem. It shows no device's name, and nothing can be changed there.

    \b
    Examples:
      edgeadapt coordinator dashboard fleet
      edgeadapt coordinator dashboard fleet --listen fleet.example:9500 --channels releases
    """
    from aggregation.entropy import SystemEntropy
    from coordinator.dashboard.channels import ChannelsView
    from coordinator.dashboard.server import TOKEN, read_token, serve
    from coordinator.dashboard.view import Viewer
    from coordinator.servertls import TlsFiles
    from coordinator.servicesettings import is_address, is_loopback
    from coordinator.statedir import CoordinatorStateDir

    if not is_address(listen):
        raise ConfigError(f"{listen!r} is not HOST:PORT with a port from 1 to 65535", about="--listen", value=listen)
    opened, tls = CoordinatorStateDir.open(state_dir), None
    releases = None if channels is None else ChannelsView(channels)
    if releases is not None:
        releases.look()
    if not is_loopback(listen):
        tls = TlsFiles(opened)
    token = read_token(state_dir, SystemEntropy())
    click.echo(f"http{'s' if tls else ''}://{listen}/: log in with the token in {state_dir / TOKEN}", err=True)
    serve(Viewer(opened, releases).look, token, listen, tls)
