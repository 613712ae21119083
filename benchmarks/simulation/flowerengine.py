"""The rounds on Flower's own simulation engine, the peer: the same two apps, with the devices in Ray's processes.

Each message may be handled by another process, so a device's state is in its files.
"""

import logging
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from aggregation.errors import ConfigError
from aggregation.masks import KEY
from client.node.app import register
from client.node.statedir import DeviceStateDir
from coordinator.app import run
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats import storage
from edgeadapt.formats.cores import cores
from edgeadapt.formats.manifest import RoundRecord
from simulations.engine.devices import SEED, SeededEntropy

CLUSTER = "RAY_ADDRESS"  # environment variable of Ray: the cluster to use; without it one is started here
PARTITION = "partition-id"  # Flower's number of a simulated node, from 0


@dataclass(frozen=True, slots=True)
class StoredEntropy:
    path: Path

    def bytes(self, n: int) -> bytes:
        chain = SeededEntropy(storage.read(self.path, KEY))
        drawn = chain.bytes(n)
        storage.replace(self.path, chain.key)
        return drawn


def open_state_dir(folder: Path) -> DeviceStateDir:
    """Open the state directory of a simulated device. Raises as ``DeviceStateDir.open``."""
    return DeviceStateDir(folder, DeviceStateDir.open(folder).settings, StoredEntropy(folder / SEED))


def require_ray() -> None:
    if find_spec("ray") is None:
        raise ConfigError("Flower's engine needs Ray: pip install 'edgeadapt[ray]'", about="bench")


def federate_on_ray(
    coordinator: Path, state_dirs: Sequence[Path], done: Callable[[RoundRecord], None] = lambda record: None
) -> None:
    """Run the rounds that are left, and call ``done`` with the record of each. Raises as ``coordinator.app.run``."""
    require_ray()
    # Imported here: both take seconds.
    from flwr.simulation import run_simulation

    client_app, server_app, failed = ClientApp(), ServerApp(), list[BaseException]()
    register(client_app, partial(_open, [str(folder) for folder in state_dirs]))

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            for record in run(CoordinatorStateDir.open(coordinator), grid):
                done(record)
        except BaseException as error:  # Flower would log it and go on
            failed.append(error)

    started: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if CLUSTER not in os.environ:
        started |= {"address": "local", "num_cpus": cores()}  # and not one that somebody started on this machine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Ray's, about accelerators
        logging.getLogger("flwr").setLevel(logging.ERROR)  # it announces a successor that has no call from Python
        run_simulation(
            server_app,
            client_app,
            len(state_dirs),
            backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": started},
        )
    if failed:
        raise failed[0]


def _open(state_dirs: Sequence[str], context: Context) -> DeviceStateDir:
    return open_state_dir(Path(state_dirs[int(context.node_config[PARTITION])]))
