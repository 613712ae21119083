"""The command `edgeadapt bench gateway`."""

import json
import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
def gateway(as_json: bool, quick: bool) -> None:
    """What a round over the gateway costs beyond the devices' work, and how many devices one gateway serves.

    Devices are in a second process on this machine: 10 for the rounds, then 2000 at once. It takes a minute or two.

    \b
    Examples:
      edgeadapt bench gateway
      edgeadapt bench gateway --json
    """
    from rich.console import Console

    from simulations.benchmarks.gateway import measure as run

    with Console(stderr=True, force_terminal=sys.stderr.isatty()).status("") as status:
        found = run.measure(run.QUICK if quick else run.FULL, status.update)
    click.echo(json.dumps(found) if as_json else run.table(found))
