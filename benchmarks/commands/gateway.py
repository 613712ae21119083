"""The command `python -m benchmarks gateway`."""

import json

import click

from edgeadapt.commandline import FiniteRange, status


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
@click.option("--quick", is_flag=True, help="A tiny size: shows that it runs, measures nothing useful.")
@click.option(
    "--check-ins",
    "rate",
    type=FiniteRange(min=60, max=1e6),
    metavar="N",
    help="Only this: let devices check in N times a minute, each over a new connection, for a minute.",
)
def gateway(as_json: bool, quick: bool, rate: float | None) -> None:
    """What a round over the gateway costs beyond the devices' work, and how many devices one gateway serves.

    Devices are in a second process on this machine: 10 for the rounds, then 2000 at once. It takes a minute or two.

    With --check-ins, the times are those from when a check-in is due until the device is admitted, and the cores that
    gateway and devices used are printed.

    \b
    Examples:
      python -m benchmarks gateway
      python -m benchmarks gateway --check-ins 10000
      python -m benchmarks gateway --json
    """
    from benchmarks.gateway import measure as run

    with status("measuring") as show:
        if rate is None:
            found, table = run.measure(run.QUICK if quick else run.FULL, show), run.table
        else:
            arrivals = run.Arrivals(rate, 2.0 if quick else 60.0)
            found, table = run.measure_arrivals(arrivals, show), run.arrivals_table
    click.echo(json.dumps(found) if as_json else table(found))
