"""``edgeadapt coordinator up`` and ``stop``: run what a fleet needs on the coordinator's machine."""

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import click

from coordinator.cli.options import directory

if TYPE_CHECKING:
    from coordinator.services.supervisor import ServiceEvent


@click.command(short_help="Run SuperLink, gateway and rounds.")
@directory
@click.option("--json", "as_json", is_flag=True, help="Write each line as a JSON object.")
def up(state_dir: Path, as_json: bool) -> None:
    """Run what DIR/services.toml names, until all rounds are done: Flower's SuperLink, the gateway, the rounds.

    Each is started when the one before is ready, and again, after a pause that doubles, when it ends too soon. Ctrl-C,
    SIGTERM or 'edgeadapt coordinator stop' stops them in reverse order; a round that is under way is lost. If this
    process is killed, they end as well. Lines on standard error say what happens and what the services write.

    While another coordinator leads the same registry in PostgreSQL, they wait, and take over when that one is gone.

    Both listen with DIR/tls.key and DIR/tls.pem, which must be for the hosts at which devices reach them.

    \b
    Examples:
      edgeadapt coordinator up fleet
      edgeadapt coordinator up fleet --json 2> fleet.log
    """
    from coordinator.services.deployment import up

    lock = threading.Lock()

    def report(event: "ServiceEvent") -> None:
        line = json.dumps(_row(event)) if as_json else _line(event)
        with lock:
            click.echo(line, err=True)

    up(state_dir, report)


@click.command(short_help="Stop what 'up' runs.")
@directory
def stop(state_dir: Path) -> None:
    """Stop what 'edgeadapt coordinator up DIR' runs, and wait until it has ended.

    \b
    Example:
      edgeadapt coordinator stop fleet
    """
    from coordinator.services.deployment import stop

    click.echo("stopped" if stop(state_dir) else f"no services of {state_dir} run")


def _row(event: "ServiceEvent") -> dict[str, str | int | float]:
    head = {"time": _time(event), "service": event.service, "event": event.happening.value}
    return {**head, **{name: _plain(value) for name, value in event.details.items()}}


def _line(event: "ServiceEvent") -> str:
    details = (f"{name}={_plain(value)}" for name, value in event.details.items() if name != "text")
    text = [_plain(value) for name, value in event.details.items() if name == "text"]
    return " ".join(map(str, [_time(event), event.service, event.happening.value, *details, *text]))


def _time(event: "ServiceEvent") -> str:
    return event.at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: str | int | float) -> str | int | float:
    """Remove colors and other control characters, which could imitate a line or move the cursor."""
    if not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() else " " for c in click.unstyle(value))
