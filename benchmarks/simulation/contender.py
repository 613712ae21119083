"""One engine on one fleet, in a process of its own: prints a JSON object with the time of each round.

Usage: python -m benchmarks.simulation.contender ENGINE FOLDER
"""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from client.node.statedir import DeviceStateDir
from coordinator.app import run
from coordinator.statedir import CoordinatorStateDir
from coordinator.transport import SERVER_NODE
from edgeadapt.bases.base import find_base
from edgeadapt.formats.cores import cores
from edgeadapt.formats.roundrecord import RoundRecord
from edgeadapt.formats.storage import kill_safe
from simulations.engine import provision
from simulations.engine.flowerengine import federate_on_ray
from simulations.engine.grid import FaultModel
from simulations.engine.workers import Fleet, WorkerGrid, Workers

NO_FAULTS = FaultModel(seed=0, message_loss=0.0, mean_delay=1.0)
ENGINES = ("ours", "flower")


def measure(engine: str, folder: Path) -> dict[str, Any]:
    """Run all rounds; seconds since the start at the end of each, and the survivors of each."""
    torch.set_num_threads(1)
    coordinator, state_dirs = folder / provision.COORDINATOR, sorted((folder / provision.DEVICES).iterdir())
    begin, ends, survivors = time.perf_counter(), list[float](), list[int]()

    def done(record: RoundRecord) -> None:
        ends.append(time.perf_counter() - begin)
        survivors.append(len(record.survivors))

    if engine == "flower":
        federate_on_ray(coordinator, state_dirs, done)
    else:
        base = find_base(DeviceStateDir.open(state_dirs[0]).settings.base)
        names = dict(enumerate((path.name for path in state_dirs), SERVER_NODE + 1))
        fleet = Fleet(folder / provision.DEVICES, base, names)
        with kill_safe(), Workers(cores(), fleet) as workers:
            for record in run(CoordinatorStateDir.open(coordinator), WorkerGrid(workers, names, NO_FAULTS)):
                done(record)
            workers.write()
    return {"ends": ends, "survivors": survivors, "seconds": time.perf_counter() - begin}


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):  # Flower and Ray print
        found = measure(sys.argv[1], Path(sys.argv[2]))
    print(json.dumps(found))
