"""``edgeadapt simulate suite``: arms against each other on several seeds, and their differences with intervals."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aggregation.errors import ConfigError
from edgeadapt import commandline
from simulations.cli.simulate import resumable

if TYPE_CHECKING:  # imports torch
    from simulations.suite.execute import SuiteReport


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="FILE|DIR")
@click.option("--seeds", type=click.IntRange(1, 1000), help="So many seeds, from 0 on.  [default: the file's]")
@click.option(
    "--jobs", type=click.IntRange(1, 256), help="Processes at the same time.  [default: one a core, at most 4]"
)
@click.option("--arm", "arms", multiple=True, metavar="NAME", help="Only this arm; repeatable.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable.")
@click.option("--resume", is_flag=True, help="Continue the suite in --out; what is finished is kept.")
@click.option("--retry", is_flag=True, help="Continue it, and run again the rounds of arms of which some aborted.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the suite.  [default: runs/suite-NAME]")
@commandline.quiet
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
        outcome = run_suite(wanted, out, jobs=jobs, resume=resume, retry=retry, quiet=commandline.is_quiet())
    _print(outcome, as_json)


def _print(outcome: "SuiteReport", as_json: bool) -> None:
    click.echo(json.dumps(outcome.summary.to_json()) if as_json else f"{outcome}\n{outcome.report}")
    if outcome.failures:
        from simulations.suite.store import failure

        raise failure(outcome.failures)
