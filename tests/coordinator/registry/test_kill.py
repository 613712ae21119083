"""A ``kill -9`` in a loop of commits: at any instant, a new process finds complete rounds and continues."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.registry import Registry

ROOT = Path(__file__).resolve().parents[3]
LOOP = """
import sys

from aggregation.pki.identity import IdentityKey
from coordinator.registry import Registry
from tests.support.registry import Rounds

folder, pem = sys.argv[1:]
rounds = Rounds(IdentityKey.from_pem(pem.encode()))
registry = Registry.open(f"sqlite:///{folder}/registry.db", f"{folder}/blobs", [rounds.key.public])
if registry.latest() is None:
    rounds.seed(registry)
number = len(registry.rounds())
while True:
    number += 1
    rounds.commit(registry, number)
    print(number, flush=True)
"""


def test_a_kill_in_a_loop_of_commits_loses_at_most_the_round_under_way(
    reopen: Callable[[], Registry], rounds: Any, tmp_path: Path
) -> None:
    confirmed = 0
    for _ in range(2):  # the second process goes on from what the killed one left
        confirmed = _run_and_kill(tmp_path, rounds, confirmed + 3)
        registry = reopen()
        done = len(registry.rounds())
        assert confirmed <= done <= confirmed + 1
        assert registry.rounds() == tuple(rounds.record(n) for n in range(1, done + 1))
        assert [version.manifest for version in registry.versions()] == [rounds.manifest(n) for n in range(done + 1)]
        for number in range(done + 1):
            assert registry.blob(number) == rounds.blob(number)
        assert (registry.optimizer_state()["first"] == done).all()
        registry.close()


def _run_and_kill(folder: Path, rounds: Any, until: int) -> int:
    """Kill the loop once it confirmed round ``until``; the last round that it confirmed."""
    command = [sys.executable, "-c", LOOP, str(folder), rounds.key.to_pem().decode()]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= until:
                break
        os.kill(process.pid, signal.SIGKILL)
        last = [int(line), *map(int, process.stdout.read().split())][-1]
    assert process.returncode == -signal.SIGKILL
    return last
