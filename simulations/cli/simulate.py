"""``edgeadapt simulate run`` runs a scenario, ``demo`` the one that comes with the package; ``suite`` compares arms on
several seeds, and ``migrate`` moves the fleet of a run to the base of another scenario."""

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from aggregation.errors import ConfigError
from coordinator.cli.migrate import judged, line_of, print_found, row_of
from edgeadapt.commandline import FOLDER, as_json, is_quiet, option, program, quiet
from edgeadapt.formats.cores import cores
from simulations.scenario import describe, read_scenario
from simulations.shipped import SCENARIOS

if TYPE_CHECKING:  # they import torch
    from simulations.suite.execute import SuiteReport
    from simulations.suite.run import EngineName

DEMO = "multilingual.toml"
MOST_WORKERS = 4  # of the demo; each has the base in memory


def _shared_options(command: Callable[..., None]) -> Callable[..., None]:
    for add in (
        click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable."),
        option(
            "--engine",
            "How the rounds run: with sums without masks, which make the same adapters and leave no transcript; "
            "or with the protocol.  [default: plain; of demo: protocol]",
            type=click.Choice(["plain", "protocol"]),
        ),
        option(
            "--workers",
            "Processes that the devices of the rounds share; 1 is this process.  "
            f"[default: 1; of demo: one a core, at most {MOST_WORKERS}]",
            type=click.IntRange(1, 256),
        ),
        as_json,
        quiet,
        click.option("--resume", is_flag=True, help="Continue the run in --out, or the newest run in runs/."),
        option("--out", "Folder of the run; by default a new one in runs/.", type=click.Path(path_type=Path)),
    ):
        command = add(command)
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
    engine: "EngineName | None",
    workers: int | None,
    overrides: tuple[str, ...],
) -> None:
    scenario = read_scenario(path, overrides)
    # Imported here, so that --help and a wrong key do not wait for torch.
    from simulations.data.summary import summarize
    from simulations.engine.progress import RunProgress
    from simulations.engine.provision import COORDINATOR
    from simulations.report.formatting import UNMASKED
    from simulations.report.terminal import print_result, print_scenario
    from simulations.suite.run import Engine, Plan

    plan = Plan.of(scenario, Engine(workers or 1, engine))
    if plan.warning:
        click.echo(f"edgeadapt: {plan.warning}", err=True)
    folder = plan.folder(out, resume=resume)
    if not is_quiet():
        note = "" if plan.engine.masks(scenario, folder.of(plan.groups[0]).path / COORDINATOR) else UNMASKED
        data, console = summarize(plan.loaded, plan.base), Console(stderr=as_json)
        print_scenario(scenario, folder.log, console, data=data, devices=plan.devices, note=note)
    with resumable(folder.path), RunProgress(quiet=is_quiet()) as progress:
        result = plan.run(folder, progress)
    if as_json:
        click.echo(json.dumps(result.to_json()))
    else:
        print_result(result, Console(), program())


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        again = f"add --out {shlex.quote(str(out))} --resume to the same command"
        click.echo(f"The finished parts are kept. To continue, {again}", err=True)
        raise


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE|DIR")
@click.option("--seeds", type=click.IntRange(1, 1000), help="So many seeds, from 0 on.  [default: the file's]")
@option("--jobs", "Processes at the same time.  [default: one a core, at most 4]", type=click.IntRange(1, 256))
@click.option("--arm", "arms", multiple=True, metavar="NAME", help="Only this arm; repeatable.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable.")
@click.option("--resume", is_flag=True, help="Continue the suite in --out; what is finished is kept.")
@click.option("--retry", is_flag=True, help="Continue it, and run again the rounds of arms of which some aborted.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the suite.  [default: runs/suite-NAME]")
@quiet
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def suite(
    file: Path,
    seeds: int | None,
    jobs: int | None,
    arms: tuple[str, ...],
    overrides: tuple[str, ...],
    resume: bool,
    retry: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Run the arms of a suite FILE (.toml), or of one that is shipped, on its seeds; or report on the finished DIR.

    An arm with a search first chooses its constants on other seeds, by the validation texts of the clients. A process
    has one thread. After an interruption, the same command with --resume continues. Arms that failed, or of which
    rounds aborted, are marked with (!) in the report; --retry runs these rounds again, with other faults.

    \b
    Examples:
      edgeadapt simulate suite households.toml --out runs/households
      edgeadapt simulate suite newsgroups.toml --set data.concentration=0.1 --out runs/newsgroups
      edgeadapt simulate suite my.toml --seeds 5 --jobs 2
      edgeadapt simulate suite my.toml --seeds 5 --jobs 2 --resume
      edgeadapt simulate suite my.toml --seeds 5 --jobs 2 --retry
      edgeadapt simulate suite runs/households --json > suite.json
    """
    if file.is_dir():
        if seeds or jobs or arms or overrides or resume or retry or out:
            text = f"{file} is a finished suite, to be reported on: name a suite file, or leave the rest out"
            raise ConfigError(text, about="FILE|DIR")
        from simulations.suite.execute import SuiteReport

        _print(SuiteReport.of(file), as_json)
        return
    # Imported here, so that --help does not wait for the libraries.
    from simulations.suite.execute import run_suite
    from simulations.suite.store import read_suite, suite_folder

    wanted = read_suite(file, seeds=seeds, changes=overrides, arms=arms)
    out = suite_folder(wanted, out)
    with resumable(out):
        outcome = run_suite(wanted, out, jobs=jobs, resume=resume, retry=retry, quiet=is_quiet())
    _print(outcome, as_json)


def _print(outcome: "SuiteReport", as_json: bool) -> None:
    click.echo(json.dumps(outcome.summary.to_json()) if as_json else f"{outcome}\n{outcome.report}")
    if outcome.failures:
        from simulations.suite.store import failure

        raise failure(outcome.failures)


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
    from simulations.suite.run import RunFolder, migrate_run  # torch

    done = list[dict[str, Any]]()

    def report(each: Any) -> None:
        done.append(row_of(each))
        click.echo(line_of(each), err=True)

    folder = RunFolder(run.resolve(), RunFolder.stored(run))
    print_found(migrate_run(folder, to, rounds, margin, report), done, as_json)
