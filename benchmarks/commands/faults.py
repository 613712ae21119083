"""The command `python -m benchmarks faults`."""

import click

from aggregation.errors import EdgeAdaptError
from aggregation.steps import Step
from edgeadapt.commandline import status


@click.command()
@click.option("--fault", "names", multiple=True, metavar="NAME", help="Only this one; may be repeated. Default: all.")
@click.option(
    "--step",
    "steps",
    multiple=True,
    type=click.Choice([step.value for step in Step]),
    help="Only at this step of a round; may be repeated. Default: at each step that the fault has.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the table.")
def faults(names: tuple[str, ...], steps: tuple[str, ...], as_json: bool) -> None:
    """Kill, hang and disturb the processes of a fleet on this machine, and print what each fault has cost.

    'coordinator up' and four 'device agent' run on loopback, with a tiny base and noise; for takeovers there are two
    'coordinator up' with their registry in a PostgreSQL server that is started here, and for some faults Flower's
    SuperLinks and a SuperNode in place of an agent. After the faults of a kind, the coordinator is stopped, and
    records, versions, privacy ledgers and the audit are compared: what was lost or counted twice is in the table, and
    the command exits with 1. It takes many minutes; one with a SuperNode some.

    \b
    Examples:
      python -m benchmarks faults
      python -m benchmarks faults --fault kill-rounds --step plan --step unmask
      python -m benchmarks faults --json
    """
    from benchmarks.faults import measure as run
    from benchmarks.faults.faults import FAULTS

    known = [fault.name for fault in FAULTS]
    for name in names:
        if name not in known:
            raise click.BadParameter(
                f"there is no fault {name!r}: take one of {', '.join(known)}", param_hint="--fault"
            )
    with status("measuring") as show:
        rows = run.measure(names or known, show, [Step(step) for step in steps] or [*Step])
    click.echo(run.as_json(rows) if as_json else run.table(rows))
    if lost := sum(bool(row.lost) for row in rows):
        raise EdgeAdaptError(f"{lost} of {len(rows)} faults lost something", about="faults")
