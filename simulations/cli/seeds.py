"""``edgeadapt seeds``: several runs of one scenario in one table."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from simulations.report.seeds import markdown, read_results, spreads


@click.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def seeds(runs: tuple[Path, ...], as_json: bool) -> None:
    """Compare runs of one scenario: mean and range of each accuracy.

    \b
    Example:
      for s in 0 1 2; do edgeadapt demo --set seed=$s --out runs/seed-$s; done
      edgeadapt seeds runs/seed-0 runs/seed-1 runs/seed-2
    """
    results = read_results(runs)
    table = {arm: {name: asdict(s) for name, s in row.items()} for arm, row in spreads(results).items()}
    click.echo(json.dumps(table) if as_json else markdown(results))
