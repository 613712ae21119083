"""``edgeadapt simulate run`` runs a scenario, ``demo`` the one that comes with the package; ``look`` shows texts."""

import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from aggregation.errors import ConfigError
from edgeadapt.commandline import as_json, is_quiet, program, quiet
from edgeadapt.formats.settings import toml_value
from simulations.scenario import Scenario, describe
from simulations.shipped import SCENARIOS, find

DEMO = "households.toml"
OWN_TEXTS = "households.toml"  # whose base is not pruned to some languages


def _shared_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable."),
        click.option(
            "--engine",
            type=click.Choice(["local", "ray"]),
            default="local",
            help="Where the rounds run: in this process, or on Flower's simulation engine.  [default: local]",
        ),
        click.option(
            "--workers",
            type=click.IntRange(1, 256),
            default=1,
            show_default=True,
            help="Processes that the devices of the rounds share, about one a core; 1 is this process.",
        ),
        as_json,
        quiet,
        click.option("-v", "--verbose", is_flag=True, help="Say all about the run before it starts."),
        click.option("--resume", is_flag=True, help="Continue the run in --out, or the newest run in runs/."),
        click.option(
            "--out", type=click.Path(path_type=Path), help="Folder of the run; by default a new one in runs/."
        ),
    ):
        command = option(command)
    return command


def _show_keys(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo("\n".join(describe()))
        context.exit()


@click.command()
@_shared_options
def demo(**options: Any) -> None:
    """Households personalize a frozen model together; no household shows its data.

    Runs the scenario simulations/scenarios/households.toml: a few minutes on two cores, without a network. `edgeadapt
    simulate run multilingual.toml` runs the same households on a base that reads about 100 languages.

    \b
    Examples:
      edgeadapt demo
      edgeadapt demo --out runs/mine --set seed=1
      edgeadapt demo --out runs/mine --resume      # after Ctrl-C
      edgeadapt demo --json > result.json
    """
    _run(SCENARIOS / DEMO, **options)


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path), metavar="SCENARIO|FILE|DIR")
@_shared_options
@click.option("--keys", is_flag=True, is_eager=True, expose_value=False, callback=_show_keys, help="List every key.")
def simulate(scenario: Path, **options: Any) -> None:
    """Run a SCENARIO (.toml), from the population to the report; or households.toml on a FILE or DIR of texts.

    \b
    Examples:
      edgeadapt simulate run households.toml                       # a file, or one that is shipped
      edgeadapt simulate run population.toml --workers 8           # 10,000 households in cohorts of 100
      edgeadapt simulate run texts.csv --set data.client=user      # columns text, label, user
      edgeadapt simulate run authors.toml --set 'data.files=["texts.jsonl"]' --set data.client=author
      edgeadapt simulate run my.toml --set federation.rounds=20 --set 'population.languages=["en","es"]'
      edgeadapt simulate run --keys
    """
    _run(scenario, **options)


def read_scenario(path: Path, overrides: Sequence[str]) -> Scenario:
    """Read the scenario in a file, or a shipped one; for own texts in a file or folder, ``OWN_TEXTS`` with these."""
    if path.suffix == ".toml":
        path = find(path, SCENARIOS)
        return Scenario.read(path, overrides).located(path.parent)
    if not path.exists():
        text = f"there is no file or folder {path}; 'edgeadapt simulate scenarios' lists what is shipped"
        raise ConfigError(text, about="SCENARIO", value=str(path))
    name = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:64] or "texts"
    texts = f"data.files={toml_value([str(path.absolute())])}"
    return Scenario.read(SCENARIOS / OWN_TEXTS, (f'name="{name}"', texts, *overrides)).located(Path())


def _run(
    path: Path,
    out: Path | None,
    resume: bool,
    as_json: bool,
    verbose: bool,
    engine: str,
    workers: int,
    overrides: tuple[str, ...],
) -> None:
    scenario = read_scenario(path, overrides)
    # Imported here, so that --help and a wrong key do not wait for torch.
    from simulations.data.summary import summarize
    from simulations.engine.progress import RunProgress
    from simulations.engine.provision import describe as describe_groups
    from simulations.report.terminal import print_result, print_scenario
    from simulations.suite.run import Engine, Plan

    plan = Plan.of(scenario, Engine(workers, ray=engine == "ray"))
    if plan.warning:
        click.echo(f"edgeadapt: {plan.warning}", err=True)
    folder = plan.folder(out, resume=resume)
    if not is_quiet():
        groups = describe_groups(plan.groups) if scenario.groups.by != "none" else ""
        data = summarize(plan.loaded, plan.base)
        console = Console(stderr=as_json)
        print_scenario(scenario, folder.log, console, data=data, devices=plan.devices, groups=groups, verbose=verbose)
    with resumable(folder.path), RunProgress(quiet=is_quiet()) as progress:
        result = plan.run(folder, progress)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        print_result(result, Console(), program())


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say after Ctrl-C how to continue what is in a folder."""
    try:
        yield
    except KeyboardInterrupt:
        again = f"add --out {shlex.quote(str(out))} --resume to the same command"
        click.echo(f"The finished parts are kept. To continue, {again}", err=True)
        raise


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path), metavar="SCENARIO|FILE|DIR")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable.")
@click.option("--clients", is_flag=True, help="Also a line for each client.")
@as_json
def look(scenario: Path, overrides: tuple[str, ...], clients: bool, as_json: bool) -> None:
    """Show clients, sizes, labels, languages and broken rows of a SCENARIO, or of a file of texts.

    Broken rows are counted and listed, and never end this command.

    \b
    Examples:
      edgeadapt simulate look texts.csv --set data.client=user
      edgeadapt simulate look my.toml --clients
      edgeadapt simulate look texts.jsonl --set data.partition=shard --set data.clients=8 --json
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
