"""The command `python -m benchmarks ondevice`."""

import dataclasses
import json
from pathlib import Path

import click

from edgeadapt.commandline import status


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Write a picture and the JSON here.")
@click.option("--profiles", help="Profiles of the exported base, separated by commas.  [default: all]")
@click.option("--tokens", type=click.IntRange(1, 4096), help="Tokens to generate after a prompt.  [default: 128]")
@click.option("--rounds", type=click.IntRange(1), help="Rounds through all contenders.  [default: 7]")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
def ondevice(
    as_json: bool, out: Path | None, profiles: str | None, tokens: int | None, rounds: int | None, quick: bool
) -> None:
    """A frozen language model with and without an adapter, against torch and llama.cpp.

    SmolLM2-135M in every profile: speed, perplexity, size, swap, cold start. It takes about ten minutes on two cores,
    and three more to train the adapter for the first time. llama.cpp takes part if `edgeadapt[bench]` is installed.

    \b
    Examples:
      python -m benchmarks ondevice --out bench
      python -m benchmarks ondevice --json --profiles native-int4 --rounds 15
    """
    # Imported here, so that --help does not wait for torch.
    from benchmarks.ondevice import compare as run
    from benchmarks.ondevice import report

    wanted, work = run.profiles(profiles), run.QUICK if quick else run.OnDeviceWorkload()
    work = dataclasses.replace(work, tokens=tokens or work.tokens, rounds=rounds or work.rounds)
    if out:
        report.make_folder(out)
    if not run.has_peer():
        click.echo(f"  {run.INSTALL}", err=True)
    with status("measuring") as show:
        found = run.compare(wanted, work, show)
    if out:
        report.keep(found, out)
    click.echo(json.dumps(found) if as_json else report.table(found))
