"""``edgeadapt simulate look``: what a scenario has, before it is run; or the scenarios and suites of the package."""

import json
from pathlib import Path

import click

from edgeadapt.commandline import as_json, print_result
from simulations.shipped import SCENARIOS, SUITES, described


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path), metavar="[SCENARIO|FILE|DIR]", required=False)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable.")
@as_json
def look(scenario: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show clients, sizes, labels, languages and broken rows of a SCENARIO, or of a file of texts.

    Broken rows are counted and listed, and never end this command; --json has each client. Without SCENARIO, list the
    scenarios for 'simulate run' and the suites for 'simulate suite' that are shipped.

    \b
    Examples:
      edgeadapt simulate look
      edgeadapt simulate look texts.csv --set data.client=user
      edgeadapt simulate look texts.jsonl --set data.partition=shard --set data.clients=8 --json
    """
    if scenario is None:
        _show_shipped(as_json)
        return
    # Imported here, so that the list needs the bare install only.
    from rich.console import Console

    from edgeadapt.bases.base import find_base
    from simulations.data import populate
    from simulations.data.summary import summarize
    from simulations.report.terminal import print_data
    from simulations.scenario import read_scenario

    settings = read_scenario(scenario, (*overrides, "data.broken=skip"))
    loaded = populate(settings.data, settings.population, settings.seed)
    summary = summarize(loaded, find_base(settings.base.model))
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    else:
        print_data(summary, Console())


def _show_shipped(as_json: bool) -> None:
    shipped = {"scenarios": described(SCENARIOS), "suites": described(SUITES)}
    width = max(len(name) for files in shipped.values() for name in files)
    lines = []
    for (kind, files), command in zip(shipped.items(), ("run", "suite"), strict=True):
        lines.append(f"{kind}, for 'simulate {command}':")
        lines += [f"  {name:{width}}  {text}" for name, text in files.items()]
    print_result(shipped, "\n".join(lines), as_json)
