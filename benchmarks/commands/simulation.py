"""The command `python -m benchmarks simulation`."""

import dataclasses
import json

import click

from edgeadapt.commandline import status


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@click.option("--repeats", type=click.IntRange(1), help="Runs of each engine.  [default: 3]")
def simulation(as_json: bool, quick: bool, repeats: int | None) -> None:
    """The in-process engine against Flower's simulation engine, with the same apps.

    Clients a second without training, with a tiny model, and with MiniLM; and memory. It takes about ten minutes on two
    cores. Flower's engine needs Ray: pip install 'edgeadapt[ray]'.

    \b
    Examples:
      python -m benchmarks simulation
      python -m benchmarks simulation --json --repeats 5
    """
    # Imported here, so that --help does not wait for Flower and torch.
    from benchmarks.simulation import compare as run
    from benchmarks.simulation import report

    work = run.QUICK if quick else run.FULL
    work = dataclasses.replace(work, repeats=repeats or work.repeats)
    with status("measuring") as show:
        found = run.compare(work, show)
    click.echo(json.dumps(found) if as_json else report.table(found))
