"""``edgeadapt simulate scenarios``: the scenarios and suites that come with the package."""

import click

from edgeadapt.commandline import as_json, print_result
from simulations.shipped import SCENARIOS, SUITES, described


@click.command()
@as_json
def scenarios(as_json: bool) -> None:
    """List the scenarios for 'simulate run' and the suites for 'simulate suite' that are shipped.

    \b
    Example:
      edgeadapt simulate scenarios
    """
    shipped = {"scenarios": described(SCENARIOS), "suites": described(SUITES)}
    width = max(len(name) for files in shipped.values() for name in files)
    lines = []
    for (kind, files), command in zip(shipped.items(), ("run", "suite"), strict=True):
        lines.append(f"{kind}, for 'simulate {command}':")
        lines += [f"  {name:{width}}  {text}" for name, text in files.items()]
    print_result(shipped, "\n".join(lines), as_json)
