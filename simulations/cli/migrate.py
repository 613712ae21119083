"""``edgeadapt simulate migrate`` moves the fleet of a run to the base of another scenario."""

from pathlib import Path
from typing import Any

import click

from coordinator.cli.migrate import judged, line_of, print_found, row_of
from edgeadapt.commandline import FOLDER, as_json
from simulations.scenario import read_scenario


@click.command()
@click.argument("run", type=FOLDER, metavar="RUN")
@click.argument("scenario", type=click.Path(path_type=Path), metavar="SCENARIO")
@judged
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a key of SCENARIO; repeatable.")
@as_json
def migrate(run: Path, scenario: Path, rounds: int, margin: float, overrides: tuple[str, ...], as_json: bool) -> None:
    """Let the federation in the folder RUN go on from the base of SCENARIO, as 'coordinator migrate' does.

    The clients stay; SCENARIO gives the base, the adapter and its training. After Ctrl-C repeat the command.

    \b
    Examples:
      edgeadapt simulate run households.toml --out runs/houses
      edgeadapt simulate migrate runs/houses multilingual.toml --rounds 6
    """
    to = read_scenario(scenario, overrides)
    from simulations.suite.run import (
        RunFolder,
        migrate_run,  # torch
    )

    done = list[dict[str, Any]]()

    def report(each: Any) -> None:
        done.append(row_of(each))
        click.echo(line_of(each), err=True)

    folder = RunFolder(run.resolve(), RunFolder.stored(run))
    print_found(migrate_run(folder, to, rounds, margin, report), done, as_json)
