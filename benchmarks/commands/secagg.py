"""The command `python -m benchmarks secagg`."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from aggregation.errors import DataError
from edgeadapt.commandline import status


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw the sweeps into this PNG file.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@click.option("--repeats", type=click.IntRange(1), help="Repeats; the peer's slow server has 3.  [default: 7]")
@click.option("--no-sweep", is_flag=True, help="Leave out the sweeps, unless --out draws them.")
def secagg(as_json: bool, out: Path | None, quick: bool, repeats: int | None, no_sweep: bool) -> None:
    """Secure aggregation against the SecAgg+ functions of the installed Flower.

    Both sides have 100 devices, a million elements and 20 neighbors; sweeps of this project alone follow. It takes some
    minutes on two cores. What each row covers: docs/explanation/secagg-benchmark.md.

    \b
    Examples:
      python -m benchmarks secagg --out secagg.png
      python -m benchmarks secagg --json --no-sweep
    """
    if out and not out.parent.is_dir():  # before minutes of work
        raise DataError(
            f"cannot write {out}: {out.parent} is not a folder; choose another --out", about="--out", value=str(out)
        )
    # Imported here, so that --help does not wait for Flower.
    from benchmarks.secagg import compare as run
    from benchmarks.secagg import report

    work = run.QUICK if quick else run.SecAggWorkload()
    work = dataclasses.replace(work, repeats=repeats or work.repeats)
    with status("measuring") as show:
        found: dict[str, Any] = run.compare(work, show)
        if out or not no_sweep:
            for part in (run.large, run.memory, run.sweep):
                found[part.__name__] = part(work, show)
    if out:
        report.draw(found["sweep"], out)
    click.echo(json.dumps(found) if as_json else report.table(found))
