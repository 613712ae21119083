"""``edgeadapt data``: what a simulation would learn from, before anything runs."""

import json
from pathlib import Path

import click
from rich.console import Console

from simulations.cli.simulate import read_scenario


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def data() -> None:
    """Look at the texts that a scenario names."""


@data.command(short_help="Show clients, sizes, labels, broken rows.")
@click.argument("scenario", type=click.Path(path_type=Path), metavar="SCENARIO|FILE|DIR")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable.")
@click.option("--clients", is_flag=True, help="Also a line for each client.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def show(scenario: Path, overrides: tuple[str, ...], clients: bool, as_json: bool) -> None:
    """Show clients, sizes, labels, languages and broken rows of a SCENARIO, or of a file of texts.

    Broken rows are counted and listed, and never end this command.

    \b
    Examples:
      edgeadapt data show texts.csv --set data.client=user
      edgeadapt data show my.toml --clients
      edgeadapt data show texts.jsonl --set data.partition=shard --set data.clients=8 --json
    """
    settings = read_scenario(scenario, (*overrides, "data.broken=skip"))
    from edgeadapt.bases.base import find_base
    from simulations.data import populate
    from simulations.data.summary import summarize
    from simulations.report.terminal import print_clients, print_data

    loaded = populate(settings.data, settings.population, settings.seed)
    summary = summarize(loaded, find_base(settings.base.model))
    if as_json:
        click.echo(json.dumps(summary.to_json()))
        return
    print_data(summary, Console())
    if clients:
        print_clients(summary, Console())
