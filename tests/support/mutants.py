"""``make mutants``: how many of 300 random changes of the cores of trust the tests notice.

``[tool.mutmut]`` in ``pyproject.toml`` names the modules and the tests. Another draw: ``make mutants SEED=1``.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import click

MUTANTS = Path("mutants")
KILLED, TIMED_OUT = {1, 3}, {-24, 24, 36, 152, 255}
LEAST = 0.9  # share of the mutants that must be killed


def mutmut(*arguments: str, check: bool = True) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, check=check, stdout=subprocess.PIPE, text=True).stdout


def exit_codes() -> dict[str, int | None]:
    """What the tests of each mutant ended with; None for a mutant that did not run."""
    found = (json.loads(path.read_text())["exit_code_by_key"] for path in sorted(MUTANTS.rglob("*.meta")))
    return {name: code for codes in found for name, code in codes.items()}


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--count", default=300, show_default=True)
def main(seed: int, count: int) -> None:
    """Change COUNT places of the cores of trust, one at a time, and count the changes that no test notices."""
    click.echo("making the mutants, and seeing which test reaches which function: some minutes")
    mutmut("run", "none", check=False)  # it does both, then says that no mutant has this name
    chosen = random.Random(seed).sample(sorted(exit_codes()), count)  # noqa: S311
    click.echo(f"{count} of {len(exit_codes())} mutants")
    mutmut("run", "--max-children", str(len(os.sched_getaffinity(0))), *chosen)
    codes = exit_codes()
    alive = [name for name in chosen if codes[name] not in KILLED | TIMED_OUT]
    for name in alive:
        click.echo(f"\nalive (exit status {codes[name]}):\n{mutmut('show', name)}")
    click.echo(f"{count - len(alive)} of {count} killed")
    sys.exit(count - len(alive) < LEAST * count)


if __name__ == "__main__":
    main()
