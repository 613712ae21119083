"""``make mutants``: how many of 300 random changes of the cores of trust the tests notice.

mutmut makes the changes and says which tests reach which function (``[tool.mutmut]`` in ``pyproject.toml``). Here the
tests that reach a change run, the quickest first, until one fails. Another draw: ``make mutants SEED=1``.
"""

import json
import os
import random
import subprocess
import sys
from bisect import bisect
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile

import click

MUTANTS = Path("mutants")  # mutmut's copy of the tree, in which a variable of the environment chooses a change
PYTEST = ("-m", "pytest", "-x", "-q", "--rootdir=.", "-p", "no:cacheprovider", "-p", "no:xdist")
LEAST = 0.9  # share of the mutants that must be killed
BUDGET = 60.0  # seconds of tests that a mutant gets, as they took without one
SLOWER = 5.0  # times as much of the processor, and half a minute more: a mutant that loops is noticed
IDLE = 10  # times as long by the clock: a mutant that waits for ever is noticed
PASSED = 0  # pytest's exit status


def mutmut(*arguments: str, check: bool = True) -> str:
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, check=check, stdout=subprocess.PIPE, text=True).stdout


class Reach:
    """Which tests reach a function, and how long each takes."""

    def __init__(self) -> None:
        stats = json.loads((MUTANTS / "mutmut-stats.json").read_text())
        self._tests, self._seconds = stats["tests_by_mangled_function_name"], stats["duration_by_test"]

    def tests_of(self, mutant: str) -> list[str]:
        """The quickest that together take ``BUDGET`` or less, the quickest first; at least one if there is one.

        Those of the module come too: what runs when it is imported, is noted of the first test that imports it.
        """
        function = mutant.rpartition("__mutmut_")[0]
        own = f"/test_{function.split('.x')[0].rpartition('.')[2]}.py::"
        names = {*self._tests.get(function, ()), *(name for name in self._seconds if own in name)}
        ordered = sorted(names, key=self.seconds)
        ends = list(accumulate(self.seconds(name) for name in ordered))
        return ordered[: max(1, bisect(ends, BUDGET))]

    def seconds(self, name: str) -> float:
        return float(self._seconds.get(name, 0.0))


def run(tests: list[str], mutant: str, *arguments: str, seconds: float = 600.0) -> int:
    """Run tests with a change, or with none, for so many seconds of the processor, and return pytest's exit status.

    A busy machine ends no run that a quiet one would finish. Raises subprocess.TimeoutExpired.
    """
    with NamedTemporaryFile("w", dir=MUTANTS, suffix=".tests") as listed:
        listed.write("\n".join(tests))
        listed.flush()
        command = [sys.executable, *PYTEST, *arguments, f"@{listed.name}"]
        environment = {**os.environ, "MUTANT_UNDER_TEST": mutant, "PYTHONPATH": str(MUTANTS.resolve())}
        limited = ["prlimit", f"--cpu={round(seconds)}", *command]
        return subprocess.run(
            limited, cwd=MUTANTS, env=environment, capture_output=True, timeout=IDLE * seconds, check=False
        ).returncode


def is_killed(mutant: str, reach: Reach) -> bool:
    """Check that a test fails, loops, or cannot even be imported, in which case pytest ends with 2 or 4."""
    if not (tests := reach.tests_of(mutant)):
        return False
    try:
        return run(tests, mutant, seconds=30 + SLOWER * sum(map(reach.seconds, tests))) != PASSED
    except subprocess.TimeoutExpired:
        return True


@click.command()
@click.option("--seed", default=0, show_default=True)
@click.option("--count", default=300, show_default=True)
def main(seed: int, count: int) -> None:
    """Change COUNT places of the cores of trust, one at a time, and count the changes that no test notices."""
    click.echo("making the mutants, and seeing which test reaches which function: some minutes")
    mutmut("run", "none", check=False)  # it does both, then says that no mutant has this name
    metas = (json.loads(path.read_text()) for path in sorted(MUTANTS.rglob("*.meta")))
    mutants = sorted(name for meta in metas for name in meta["exit_code_by_key"])
    chosen, reach = random.Random(seed).sample(mutants, count), Reach()  # noqa: S311
    click.echo(f"{count} of {len(mutants)} mutants")
    reached = sorted({name for mutant in chosen for name in reach.tests_of(mutant)})
    if (status := run(reached, "", "--collect-only")) != PASSED:  # pytest would end so with every change
        raise click.ClickException(f"pytest does not find the tests: it ends with {status}")
    killed = list[bool]()
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for mutant, noticed in zip(chosen, pool.map(partial(is_killed, reach=reach), chosen), strict=True):
            killed.append(noticed)
            click.echo(f"{len(killed)} of {count}  {'killed' if noticed else 'alive '}  {mutant}", err=True)
    for name in (name for name, noticed in zip(chosen, killed, strict=True) if not noticed):
        click.echo(f"\nalive, reached by {len(reach.tests_of(name))} tests:\n{mutmut('show', name)}")
    click.echo(f"{sum(killed)} of {count} killed")
    sys.exit(sum(killed) < LEAST * count)


if __name__ == "__main__":
    main()
