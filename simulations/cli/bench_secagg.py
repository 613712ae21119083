"""The command `edgeadapt bench secagg`."""

import json
from pathlib import Path
from typing import Any

import click

from aggregation.errors import DataError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw the sweeps into this PNG.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, says nothing about speed.")
@click.option("--repeats", type=click.IntRange(1), help="Repeats; the peer's slow server has 3.")
@click.option("--no-sweep", is_flag=True, help="Leave the sweeps of cohort and vector out.")
def secagg(as_json: bool, out: Path | None, quick: bool, repeats: int | None, no_sweep: bool) -> None:
    """Secure aggregation against the SecAgg+ functions of the installed Flower.

    100 devices, a million elements, 20 neighbours on either side; then sweeps of ours alone. Some minutes on two cores.
    What each row holds: docs/explanation/secagg-benchmark.md.

    \b
    Examples:
      edgeadapt bench secagg --out secagg.png
      edgeadapt bench secagg --json --no-sweep
    """
    # Here and not above: --help need not wait for Flower.
    import dataclasses

    from simulations.benchmarks.progress import progress
    from simulations.benchmarks.secagg import compare as run
    from simulations.benchmarks.secagg import report
    from simulations.benchmarks.secagg import sweep as alone

    _require_folder(out)
    size = run.QUICK if quick else run.Size()
    size = dataclasses.replace(size, repeats=repeats) if repeats else size
    more = bool(out) or not no_sweep
    with progress(run.STEPS + (alone.steps(size) if more else 0)) as note:
        found: dict[str, Any] = run.compare(size, note)
        if more:
            found["large"] = alone.large(size, note)
            found["memory"] = alone.memory(size, note)
            found["sweep"] = alone.sweep(size, note)
    if out:
        report.draw(found["sweep"], out)
    click.echo(json.dumps(found) if as_json else report.table(found))


def _require_folder(out: Path | None) -> None:
    """Refuse now what would fail after minutes."""
    if out and not out.parent.is_dir():
        raise DataError(f"cannot write {out}: {out.parent} is no folder; choose another --out")
