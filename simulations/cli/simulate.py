"""``edgeadapt simulate run`` runs a scenario, ``demo`` the one that comes with the package."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from edgeadapt.commandline import as_json, is_quiet, program, quiet
from edgeadapt.formats.cores import cores
from simulations.scenario import describe, read_scenario
from simulations.shipped import SCENARIOS

if TYPE_CHECKING:
    from simulations.suite.run import EngineName

DEMO = "multilingual.toml"
MOST_WORKERS = 4  # of the demo; each has the base in memory


def _shared_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable."),
        click.option(
            "--engine",
            type=click.Choice(["plain", "protocol"]),
            help="How the rounds run: with sums without masks, which make the same adapters and leave no transcript; "
            "or with the protocol.  [default: plain; of demo: protocol]",
        ),
        click.option(
            "--workers",
            type=click.IntRange(1, 256),
            help="Processes that the devices of the rounds share; 1 is this process.  "
            f"[default: 1; of demo: one a core, at most {MOST_WORKERS}]",
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

    Runs the scenario simulations/scenarios/multilingual.toml: a few minutes on two cores, without a network. `edgeadapt
    simulate run households.toml` runs the same households on a small base that was made for English.

    \b
    Examples:
      edgeadapt demo
      edgeadapt demo --out runs/mine --set seed=1
      edgeadapt demo --out runs/mine --resume      # after Ctrl-C
      edgeadapt demo --json > result.json
    """
    workers = options["workers"] or min(cores(), MOST_WORKERS)
    _run(SCENARIOS / DEMO, **options | {"engine": options["engine"] or "protocol", "workers": workers})


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path), metavar="SCENARIO|FILE|DIR")
@_shared_options
@click.option("--keys", is_flag=True, is_eager=True, expose_value=False, callback=_show_keys, help="List every key.")
def simulate(scenario: Path, **options: Any) -> None:
    """Run a SCENARIO (.toml), from the population to the report; or households.toml on a FILE or DIR of texts.

    \b
    Examples:
      edgeadapt simulate run households.toml                       # a file, or one that is shipped
      edgeadapt simulate run households.toml --engine protocol     # with a transcript, to audit
      edgeadapt simulate run population.toml --workers 8           # 10,000 households in cohorts of 100
      edgeadapt simulate run texts.csv --set data.client=user      # columns text, label, user
      edgeadapt simulate run authors.toml --set 'data.files=["texts.jsonl"]' --set data.client=author
      edgeadapt simulate run multilingual.toml --set 'population.languages=["all"]'
      edgeadapt simulate run --keys
    """
    _run(scenario, **options)


def _run(
    path: Path,
    out: Path | None,
    resume: bool,
    as_json: bool,
    verbose: bool,
    engine: "EngineName | None",
    workers: int | None,
    overrides: tuple[str, ...],
) -> None:
    scenario = read_scenario(path, overrides)
    # Imported here, so that --help and a wrong key do not wait for torch.
    from simulations.data.summary import summarize
    from simulations.engine.progress import RunProgress
    from simulations.engine.provision import COORDINATOR
    from simulations.engine.provision import describe as describe_groups
    from simulations.report.formatting import UNMASKED
    from simulations.report.terminal import print_result, print_scenario
    from simulations.suite.run import Engine, Plan

    plan = Plan.of(scenario, Engine(workers or 1, engine))
    if plan.warning:
        click.echo(f"edgeadapt: {plan.warning}", err=True)
    folder = plan.folder(out, resume=resume)
    if not is_quiet():
        notes = {"groups": describe_groups(plan.groups) if scenario.groups.by != "none" else ""}
        first = folder.of(plan.groups[0]).path / COORDINATOR
        notes["engine"] = "" if plan.engine.masks(scenario, first) else UNMASKED
        data = summarize(plan.loaded, plan.base)
        console = Console(stderr=as_json)
        print_scenario(scenario, folder.log, console, data=data, devices=plan.devices, notes=notes, verbose=verbose)
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
