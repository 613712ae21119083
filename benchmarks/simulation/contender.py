"""One engine on one fleet, in a process of its own: prints a JSON object with wall and CPU time of each round.

Usage: python -m benchmarks.simulation.contender ENGINE FOLDER
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.simulation.flowerengine import federate_on_ray
from client.node.statedir import DeviceStateDir
from coordinator.app import run
from coordinator.transport import SERVER_NODE
from edgeadapt.bases.base import find_base
from edgeadapt.formats.cores import cores
from edgeadapt.formats.manifest import RoundRecord
from edgeadapt.formats.registryfiles import SUMS
from edgeadapt.formats.storage import kill_safe
from simulations.engine import provision
from simulations.engine.grid import FaultModel
from simulations.engine.plain import open_coordinator
from simulations.engine.workers import Fleet, WorkerGrid, Workers

NO_FAULTS = FaultModel(seed=0, message_loss=0.0, mean_delay=1.0)
ENGINES = ("ours", "masked", "flower")  # the first one without masks


def measure(engine: str, folder: Path) -> dict[str, Any]:
    """Run all rounds; wall and CPU seconds since the start at the end of each, and the survivors of each."""
    torch.set_num_threads(1)
    coordinator, state_dirs = folder / provision.COORDINATOR, sorted((folder / provision.DEVICES).iterdir())
    begin, ends, cpu, survivors = time.perf_counter(), list[float](), list[float](), list[int]()

    def done(record: RoundRecord) -> None:
        ends.append(time.perf_counter() - begin)
        cpu.append(sum(map(_spent, tree(os.getpid()))))
        survivors.append(len(record.survivors))

    if engine == "flower":
        federate_on_ray(coordinator, state_dirs, done)
    else:
        base = find_base(DeviceStateDir.open(state_dirs[0]).settings.base)
        names = dict(enumerate((path.name for path in state_dirs), SERVER_NODE + 1))
        plain = engine == "ours"
        if plain:
            (coordinator / SUMS).mkdir()
        fleet = Fleet(folder / provision.DEVICES, base, names, plain=plain)
        with kill_safe(), Workers(cores(), fleet) as workers:
            for record in run(open_coordinator(coordinator), WorkerGrid(workers, names, NO_FAULTS)):
                done(record)
            workers.write()
    return {"ends": ends, "cpu": cpu, "survivors": survivors}


def tree(root: int) -> Iterator[int]:
    """A process, and all that it started, directly or not."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    waiting = [root]
    while waiting:
        process = waiting.pop()
        yield process
        waiting += [child for child, parent in parents.items() if parent == process]


def _spent(process: int) -> float:
    """CPU seconds of a process; 0 if it has ended meanwhile."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # Flower and Ray print
        found = measure(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps(found))
