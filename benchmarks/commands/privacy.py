"""The command `python -m benchmarks privacy`."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from edgeadapt.commandline import FiniteRange, status


@click.command()
@click.argument("scenario", type=click.Path(path_type=Path), default="privacy.toml")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A key of the scenario; may be repeated.")
@click.option(
    "--epsilon", type=FiniteRange(0), multiple=True, help="A row; may be repeated; 0: none.  [default: 0 16 … 1]"
)
@click.option(
    "--canaries", type=click.IntRange(2), default=1000, show_default=True, help="Canaries of a row, at least."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def privacy(
    scenario: Path, overrides: tuple[str, ...], epsilon: tuple[float, ...], canaries: int, as_json: bool
) -> None:
    """Epsilon against the accuracy of an analytic head, and what canaries find.

    Every device of the scenario contributes to one sum by its real code, without the masks, which cancel. Each row
    calibrates the noise to another epsilon. Canaries, in the sum or not by coin, are guessed from it; the bounds on
    epsilon that follow must be below the account of the same sum, "all survive".

    \b
    Examples:
      python -m benchmarks privacy
      python -m benchmarks privacy --set seed=1 --epsilon 8 --epsilon 1
      python -m benchmarks privacy --set population.households=30 --epsilon 8 --canaries 50
    """
    # Imported here, so that --help does not wait for torch.
    from benchmarks import privacy as run
    from simulations.cli.simulate import read_scenario

    chosen = read_scenario(scenario, overrides)
    with TemporaryDirectory() as out, status("measuring") as show:
        found = run.curve(chosen, epsilon or run.FULL, Path(out), show, canaries=canaries)
    click.echo(json.dumps(found) if as_json else run.table(found))
