"""Devices in memory do as devices with files, and a run of them can be resumed."""

import os
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from aggregation.errors import TrustError
from aggregation.steps import Step
from aggregation.transcript.logstate import LogState
from client.node.adapterstate import AdapterState
from client.node.app import register
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts
from coordinator.transport import SERVER_NODE
from edgeadapt.formats.storage import kill_safe
from simulations.engine.devices import MemoryDevices
from simulations.engine.grid import FaultModel, InProcessGrid
from simulations.engine.provision import Enrolment, device_folder
from tests.support import FleetOf

CALM = FaultModel(seed=0, message_loss=0.0, mean_delay=1.0)
FAULTS = FaultModel(seed=3, message_loss=0.03, mean_delay=1.0, forced_dropouts=1)


class Stopped(BaseException):  # the coordinator goes on after any other exception
    pass


def devices_of(fleet: Any) -> MemoryDevices:
    return MemoryDevices(Enrolment.of(fleet.out, fleet.scenario, fleet.population, fleet.base).state_dir, fleet.base)


def federate(fleet: Any, *, stop: tuple[Step, str] | None = None, faults: FaultModel = FAULTS) -> MemoryDevices:
    """Run the rounds that are left, on devices in memory."""
    devices, inner = devices_of(fleet), ClientApp()
    register(inner, devices.open)

    def app(message: Message, context: Context) -> Message:
        if stop == (Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id):
            raise Stopped
        return inner(message, context)

    names = [client.name for client in fleet.population.clients if not client.unseen]
    with kill_safe():
        fleet.federate(InProcessGrid(app, dict(enumerate(names, SERVER_NODE + 1)), faults, devices.before))
        devices.write()
    return devices


def adapters(fleet: Any) -> list[str]:
    return [version.manifest.sha256 for version in fleet.registry().versions()]


@pytest.mark.parametrize("method", ["fedit", "fedper"])
def test_a_run_in_memory_makes_the_adapters_of_one_on_disk(fleet_of: FleetOf, method: str) -> None:
    changes = {"rounds": 4, "aggregation__session_rounds": 2, "method": method}
    in_memory, on_disk = fleet_of(6, **changes), fleet_of(6, **changes)
    devices = federate(in_memory)
    records = on_disk.federate(
        on_disk.grid(seed=FAULTS.seed, message_loss=FAULTS.message_loss, forced_dropouts=FAULTS.forced_dropouts)
    )
    assert adapters(in_memory) == adapters(on_disk)
    assert [record.dropped for record in in_memory.registry().rounds()] == [record.dropped for record in records]
    for name in (client.name for client in in_memory.population.clients if not client.unseen):
        here, there = (device_folder(fleet.out, name) for fleet in (in_memory, on_disk))
        assert (here / "simulation.seed").read_bytes() == (there / "simulation.seed").read_bytes()
        mine, theirs = (fleet.state_dir(name).load(PrivateParts) for fleet in (in_memory, on_disk))
        assert (mine and mine.after) == (theirs and theirs.after)
        assert (mine is None) == (method == "fedit")
        state, kept = devices.open(Context(1, 2, {"state": name}, None, {})), on_disk.state_dir(name)  # type: ignore[arg-type]
        assert state.load(AdapterState).digest == kept.load(AdapterState).digest
        assert state.load(LogState).version == kept.load(LogState).version
        assert in_memory.state_dir(name).load(PrivacyLedger) == kept.load(PrivacyLedger) != PrivacyLedger()


@pytest.mark.parametrize("stop", [(Step.CHECK_IN, "session-3-1"), (Step.PLAN, "3")])
def test_a_run_resumed_at_the_first_round_of_a_session_makes_the_same_adapter(
    fleet_of: FleetOf, stop: tuple[Step, str]
) -> None:
    changes = {"rounds": 3, "aggregation__session_rounds": 1, "method": "fedper"}
    through, stopped = fleet_of(5, **changes), fleet_of(5, **changes)
    federate(through)
    with pytest.raises(Stopped):
        federate(stopped, stop=stop)
    assert len(stopped.registry().rounds()) == 2
    federate(stopped)
    assert adapters(through) == adapters(stopped)


@pytest.mark.parametrize("stop", [(Step.ROSTER, "session-1-1"), (Step.PLAN, "3"), (Step.UNMASK, "2")])
def test_a_run_stopped_anywhere_loses_the_round_under_way_at_most(fleet_of: FleetOf, stop: tuple[Step, str]) -> None:
    fleet = fleet_of(5, rounds=3)
    with pytest.raises(Stopped):
        federate(fleet, stop=stop, faults=CALM)
    kept = fleet.registry().rounds()
    assert len(kept) == (int(stop[1]) - 1 if stop[1].isdecimal() else 0)
    federate(fleet, faults=CALM)
    records = fleet.registry().rounds()
    assert records[: len(kept)] == kept
    assert [(record.round, record.version, len(record.survivors)) for record in records] == [
        (n, n, 5) for n in (1, 2, 3)
    ]


def test_privacy_that_is_spent_is_kept_through_a_stop(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6, privacy__mechanism="skellam", privacy__noise_multiplier=2.0, aggregation__clip_norm=0.5)
    with pytest.raises(Stopped):
        federate(fleet, stop=(Step.PLAN, "3"), faults=CALM)
    assert {fleet.state_dir(f"device-0{n}").load(PrivacyLedger).noisy for n in range(6)} == {2}
    devices = federate(fleet, faults=CALM)
    assert devices.open(Context(1, 2, {"state": "device-00"}, None, {})).load(PrivacyLedger).noisy == 3  # type: ignore[arg-type]


def test_a_device_is_enrolled_with_its_first_message(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4)
    folder = device_folder(fleet.out, "device-00")
    folder.rename(folder.with_name("elsewhere"))
    devices = devices_of(fleet)
    assert not folder.exists()
    device = devices.open(Context(1, 2, {"state": "device-00"}, None, {}))  # type: ignore[arg-type]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in folder.with_name("elsewhere").iterdir()
    )
    assert device.device(fleet.base.digest).root.verify(device.certificate) == ("device-00", device.identity.public)
    assert devices.open(Context(1, 2, {"state": "device-00"}, None, {})) is device  # type: ignore[arg-type]


def test_a_device_that_a_session_does_not_ask_leaves_the_one_before(fleet_of: FleetOf) -> None:
    devices = federate(fleet_of(4, rounds=1), faults=CALM)
    asked, idle = (devices.open(Context(1, 2, {"state": f"device-0{n}"}, None, {})) for n in (0, 1))  # type: ignore[arg-type]
    assert None not in (asked.load_state(), idle.load_state())
    devices.before(Step.CHECK_IN, ["device-00"])
    assert [device.load_state() is None for device in (asked, idle)] == [False, True]
    assert None not in (idle.load(LogState), idle.load(AdapterState))
    with pytest.raises(TrustError):
        idle.load_snapshot(bytes(32))


def test_a_simulation_does_not_wait_for_the_disk_and_the_field_does(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, calls, real = fleet_of(4, rounds=1), [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(real(descriptor)))
    federate(fleet, faults=CALM)
    assert not calls
    fleet_of(4, rounds=1)
    assert calls
