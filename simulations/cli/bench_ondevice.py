"""The command `edgeadapt bench ondevice`."""

import json
from pathlib import Path

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Put a picture and the JSON here.")
@click.option("--profiles", help="Of the exported base, separated by commas.  [default: all]")
@click.option("--tokens", type=click.IntRange(1, 4096), help="To generate in a turn.  [default: 128]")
@click.option("--rounds", type=click.IntRange(1), help="Through all contenders.  [default: 7]")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, says nothing about speed.")
def ondevice(
    as_json: bool, out: Path | None, profiles: str | None, tokens: int | None, rounds: int | None, quick: bool
) -> None:
    """A frozen language model with and without an adapter, beside torch and llama.cpp.

    SmolLM2-135M in every profile: speed, perplexity, size, swap, cold start. About ten minutes on two cores, three more
    when the adapter is trained for the first time. llama.cpp takes part where `edgeadapt[bench]` is installed.

    \b
    Examples:
      edgeadapt bench ondevice --out bench
      edgeadapt bench ondevice --json --profiles native-int4 --rounds 15
    """
    # Here and not above: --help need not wait for torch.
    import dataclasses

    from simulations.benchmarks.ondevice import compare as run
    from simulations.benchmarks.ondevice import report
    from simulations.benchmarks.progress import progress

    wanted, size = run.profiles(profiles), run.QUICK if quick else run.Size()
    size = dataclasses.replace(size, tokens=tokens or size.tokens, rounds=rounds or size.rounds)
    if out:
        report.make_folder(out)
    if not run.has_peer():
        click.echo(f"  {run.INSTALL}", err=True)
    with progress(run.steps(len(wanted), size)) as note:
        found = run.compare(wanted, size, note)
    if out:
        report.keep(found, out)
    click.echo(json.dumps(found) if as_json else report.table(found))
