"""``edgeadapt suite``: arms against each other on several seeds, and their differences with intervals."""

import json
from pathlib import Path

import click

from simulations.cli.simulate import RUNS, resumable

MOST_JOBS = 4  # by default; each holds a base in memory


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def suite() -> None:
    """Compare arms of a scenario on several seeds."""


@suite.command(short_help="Run the arms of a suite on its seeds.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--seeds", type=click.IntRange(1, 1000), help="So many seeds, from 0 on.  [default: the file's]")
@click.option(
    "--jobs", type=click.IntRange(1, 256), help="Processes at the same time.  [default: one a core, at most 4]"
)
@click.option("--arm", "arms", multiple=True, metavar="NAME", help="Only this arm; repeatable.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set a scenario key; repeatable.")
@click.option("--resume", is_flag=True, help="Continue the suite in --out; what is finished is kept.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the suite.  [default: runs/suite-NAME]")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress, only the tables.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def run(
    file: Path,
    seeds: int | None,
    jobs: int | None,
    arms: tuple[str, ...],
    overrides: tuple[str, ...],
    resume: bool,
    out: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run the arms of a suite FILE (.toml), or of one that is shipped, on its seeds.

    An arm with a search first chooses its constants on other seeds, by the validation texts of the clients. A process
    has one thread. After an interruption, the same command with --resume continues.

    \b
    Examples:
      edgeadapt suite run households.toml --out runs/households
      edgeadapt suite run newsgroups.toml --set data.concentration=0.1 --out runs/newsgroups
      edgeadapt suite run my.toml --seeds 5 --jobs 2
      edgeadapt suite run my.toml --seeds 5 --jobs 2 --resume
    """
    # Imported here, so that --help does not wait for the libraries.
    from edgeadapt.formats.cores import cores
    from simulations.engine.progress import SuiteProgress
    from simulations.suite.execute import execute
    from simulations.suite.store import read_suite, taken

    wanted = read_suite(file, seeds=seeds, changes=overrides, arms=arms)
    out = out or RUNS / f"suite-{wanted.settings.name}"
    with resumable(out), taken(out, wanted, resume=resume) as store, SuiteProgress(quiet=quiet) as progress:
        execute(wanted, store, jobs or min(cores(), MOST_JOBS), progress.show)
    _report(out, as_json)


@suite.command(short_help="Write and print the report of a suite.")
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--track", type=click.Choice(["mlflow", "tensorboard"]), help="Also send the runs to this tracker.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def report(folder: Path, track: str | None, as_json: bool) -> None:
    """Write the report of a finished suite into its folder DIR, and print it.

    \b
    Examples:
      edgeadapt suite report runs/households
      edgeadapt suite report runs/households --json > suite.json
      edgeadapt suite report runs/households --track tensorboard
    """
    _report(folder, as_json, track)


def _report(folder: Path, as_json: bool, track: str | None = None) -> None:
    from simulations.report.pages import markdown, write_suite_report
    from simulations.report.summary import summarize
    from simulations.report.track import TRACKERS, tracked_runs
    from simulations.suite.store import Store, open_suite, results

    opened = open_suite(folder)
    outcomes = results(opened, Store(folder))
    summary = summarize(opened.settings, outcomes)
    write_suite_report(summary, folder)
    if track:
        place = TRACKERS[track](opened.settings.name, tracked_runs(opened.settings, outcomes), folder)
        click.echo(f"the runs are in {place}", err=True)
    click.echo(json.dumps(summary.to_json()) if as_json else f"{markdown(summary)}\n{folder / 'report.html'}")
