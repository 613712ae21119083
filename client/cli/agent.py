"""``edgeadapt device run``: take part in a federation through the coordinator's gateway."""

import signal
from pathlib import Path
from types import FrameType

import click

from client.cli import options
from edgeadapt import commandline


@click.command()
@options.state_dir
@click.option("--gateway", metavar="HOST:PORT", help="Or several, with commas. Default: 'gateway' in device.toml.")
@commandline.quiet
@commandline.as_lines
def agent(state_dir: Path, gateway: str | None, as_json: bool) -> None:
    """Wait for the coordinator's requests, train when one asks for it and the policy permits it, and answer.

    The device connects to the gateway; nothing connects to the device. It reconnects by itself, and ends when the
    gateway refuses it, or on SIGINT or SIGTERM, after a step that is under way. One agent at a time uses DIR.

    Of several addresses it uses the next one when one cannot be reached, as after a takeover by a second coordinator.

    \b
    Examples:
      edgeadapt device run --state kitchen --gateway fleet.example:9443
      edgeadapt device run --state kitchen --gateway a.fleet.example:9443,b.fleet.example:9443
      edgeadapt device run --state kitchen --json >> kitchen.jsonl
    """
    from client.gateway.agent import Agent

    running = Agent.of(state_dir, gateway)
    commandline.show_log(as_json, running.device)

    def stop(number: int, frame: FrameType | None) -> None:
        running.stop()

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, stop)
    running.run()
