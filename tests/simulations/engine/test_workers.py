"""Devices in worker processes do as those in the process of the run."""

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from aggregation.errors import EdgeAdaptError
from aggregation.steps import Step
from client.node.privateparts import PrivateParts
from coordinator.transport import SERVER_NODE
from edgeadapt.formats.storage import kill_safe
from simulations.engine.devices import LyingApp, MemoryDevices
from simulations.engine.grid import FaultModel, InProcessGrid
from simulations.engine.provision import DEVICES, Enrolment, device_folder
from simulations.engine.workers import Fleet, WorkerGrid, Workers
from tests.support import FleetOf

pytestmark = pytest.mark.slow
# Some answer after the deadline of 300 s.
FAULTS = FaultModel(seed=3, message_loss=0.02, mean_delay=60.0, forced_dropouts=1)
LIARS = frozenset({"device-01", "device-04"})


def nodes_of(fleet: Any) -> dict[int, str]:
    return dict(enumerate((c.name for c in fleet.population.clients if not c.unseen), SERVER_NODE + 1))


def in_this_process(fleet: Any) -> None:
    enrolment = Enrolment.of(fleet.out, fleet.scenario, fleet.population, fleet.base)
    devices = MemoryDevices(enrolment.state_dir, fleet.base)
    grid = InProcessGrid(LyingApp("boost", LIARS, devices.open), nodes_of(fleet), FAULTS, devices.before)
    with kill_safe():
        fleet.federate(grid)
        grid.work()
        devices.write()


def in_workers(fleet: Any, number: int, prepare: Callable[[Sequence[str]], object]) -> None:
    nodes = nodes_of(fleet)
    with (
        kill_safe(),
        Workers(number, Fleet(fleet.out / DEVICES, fleet.base, nodes, "boost", LIARS), prepare) as workers,
    ):
        grid = WorkerGrid(workers, nodes, FAULTS)
        fleet.federate(grid)
        grid.work()
        workers.write()


def outcome(fleet: Any) -> list[Any]:
    """The adapters, who dropped out of the rounds, and what each device keeps for its next training."""
    devices = [fleet.state_dir(name) for name in nodes_of(fleet).values()]
    return [
        [version.manifest.sha256 for version in fleet.registry().versions()],
        [record.dropped for record in fleet.registry().rounds()],
        [(device.folder / "simulation.seed").read_bytes() for device in devices],
        [parts and parts.after for parts in (device.load(PrivateParts) for device in devices)],
    ]


def test_workers_make_the_adapters_of_one_process_and_say_what_devices_log(
    fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"rounds": 4, "aggregation__session_rounds": 2, "method": "fedper", "deadline": 300.0}
    one, three = (fleet_of(7, adapter={"layers": 1}, **changes) for _ in range(2))
    in_this_process(one)
    caplog.set_level(logging.INFO, "edgeadapt.device")
    elsewhere = device_folder(three.out, "device-00")
    elsewhere.rename(three.out / "kept")  # a device whose state directory is made when it is needed

    def prepare(names: Sequence[str]) -> None:
        if (three.out / "kept").exists() and "device-00" in names:
            (three.out / "kept").rename(elsewhere)

    in_workers(three, 3, prepare)
    assert outcome(one) == outcome(three)
    assert sum(bool(dropped) for dropped in outcome(one)[1]) == 4
    assert sum("training_seconds" in record.__dict__ for record in caplog.records) > 4 * 4
    assert multiprocessing.active_children() == []


def test_a_killed_worker_ends_the_run_which_can_be_resumed(fleet_of: FleetOf) -> None:
    fleet, names = fleet_of(5, rounds=3), list[str]()

    class Killing(Workers):
        def before(self, step: Step | None, names: Sequence[str]) -> None:
            super().before(step, names)
            if step is Step.PLAN and len(fleet.registry().rounds()) == 1:
                os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)

    nodes = nodes_of(fleet)
    killing = Killing(2, Fleet(fleet.out / DEVICES, fleet.base, nodes))
    with pytest.raises(EdgeAdaptError) as raised, kill_safe(), killing as workers:
        fleet.federate(WorkerGrid(workers, nodes, FaultModel(0, 0.0, 1.0)))
    assert raised.value.about == "--workers"
    assert len(fleet.registry().rounds()) == 1
    assert multiprocessing.active_children() == []
    in_workers(fleet, 2, names.extend)
    assert [record.round for record in fleet.registry().rounds()] == [1, 2, 3]
    assert set(names) == set(nodes.values())
