"""The command group `edgeadapt bench`."""

import json
from pathlib import Path
from typing import Any

import click


@click.group()
def bench() -> None:
    """Measure this implementation against a named peer, in one process and one run."""


@bench.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw the sweeps into this PNG.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, says nothing about speed.")
@click.option("--repeats", type=click.IntRange(1), help="Repeats of what is fast; the peer's server runs once.")
@click.option("--no-sweep", is_flag=True, help="Leave the sweeps of cohort and vector out.")
def secagg(as_json: bool, out: Path | None, quick: bool, repeats: int | None, no_sweep: bool) -> None:
    """Secure aggregation against the SecAgg+ functions of the installed Flower.

    100 devices, a million elements, 20 neighbours on either side; then sweeps of ours alone. Some minutes on two cores.

    \b
    Examples:
      edgeadapt bench secagg --out secagg.png
      edgeadapt bench secagg --json --no-sweep
    """
    # Here and not above: --help need not wait for Flower.
    import dataclasses

    from simulations.bench import report
    from simulations.bench import secagg as run

    size = run.QUICK if quick else run.Size()
    size = dataclasses.replace(size, repeats=repeats) if repeats else size
    found: dict[str, Any] = run.compare(size, _note)
    if out or not no_sweep:
        found["sweep"] = run.sweep(size, _note)
    if out:
        report.draw(found["sweep"], out)
    click.echo(json.dumps(found) if as_json else report.table(found))


def _note(what: str) -> None:
    click.echo(f"  {what}", err=True)
