"""A federation of light devices over real gRPC on loopback, with the same ServerApp, in one process."""

import contextlib
import copy
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from flwr.app import Message

from aggregation.steps import BODY, RECORD
from client.gateway.agent import Agent
from client.node.readings import Readings
from coordinator.gateway.grid import GatewayGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.settings import GatewaySettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats.gateway.messages import node_of
from tests.support import FleetOf
from tests.support.gateway import HOST, attending, authority_of, free_port, gateway, server_tls, wait_until
from tests.support.machine import Machine
from tests.support.trial import call

ROOT = Path(__file__).parents[2]
PHRASES = [("Light", "turn on the light"), ("Music", "play music"), ("Timer", "set a timer")]
EXAMPLES = """{"text": "switch the lamp on", "label": 0}
{"text": "play the song", "label": 1}
{"text": "make it bright", "label": 0, "split": "validation"}
"""
DEVICES = ("device-00", "device-01", "device-02")


@contextmanager
def agent_process(port: int, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The command, as an owner starts it; killed at the end of the block if it runs still."""
    command = [sys.executable, "-m", "edgeadapt", "device", "run", "--state", folder, "--gateway", f"{HOST}:{port}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def require_audited(fleet: Any, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    call(
        "audit", "verify", fleet.out / "coordinator", "--authority", fleet.out / "authority" / "authority.pem", "--json"
    )
    assert json.loads(capsys.readouterr().out)["ok"]


class AskingTwice(GatewayGrid):
    """Asks each device everything twice, as a coordinator to which the first answer was lost."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.first: list[str] = []
        self.second: list[Message] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch = list(messages)
        self.first += super().push_messages(copy.deepcopy(batch))
        return super().push_messages(batch)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = [*super().pull_messages(message_ids)]
        self.second += found
        return found


def test_an_agent_that_is_asked_again_answers_as_before(app_fleet_of: FleetOf) -> None:
    def bodies(replies: Iterable[Message]) -> list[str]:
        return sorted(str(reply.content.config_records[RECORD][BODY]) for reply in replies)

    fleet = app_fleet_of(3, rounds=2)
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    grid = AskingTwice(f"{HOST}:0", server_tls(authority_of(fleet)), state_dir.read_root)
    with contextlib.closing(grid), attending(grid.gateway.port, [*fleet.nodes.values()]):
        grid.await_devices(3)
        records = fleet.federate(grid)
        assert [(record.survivors, record.dropped) for record in records] == [(DEVICES, {})] * 2
        assert bodies(GatewayGrid.pull_messages(grid, grid.first)) == bodies(grid.second)
    state_dir.registry.close()


def test_a_device_that_is_killed_while_it_trains_drops_out_and_the_others_finish(
    app_fleet_of: FleetOf, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = app_fleet_of(4, rounds=2)
    *others, last = fleet.nodes.values()
    with (
        gateway(fleet, GatewayLimits(grace=0.5)) as grid,
        attending(grid.gateway.port, others),
        agent_process(grid.gateway.port, last) as agent,
    ):

        def kill_at_the_plan() -> None:
            for line in agent.stderr or ():
                if "answering plan" in line:
                    agent.kill()
                    return

        watching = threading.Thread(target=kill_at_the_plan)
        watching.start()
        grid.await_devices(4)
        records = fleet.federate(grid)
        watching.join()
    assert agent.returncode == -signal.SIGKILL
    assert [(record.survivors, record.dropped, record.version) for record in records] == [
        (DEVICES, {"device-03": "plan"}, 1),
        (DEVICES, {"device-03": "plan"}, 2),
    ]
    require_audited(fleet, capsys)


def test_an_agent_that_finds_the_gateway_full_comes_back_when_there_is_room(
    app_fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = app_fleet_of(2, rounds=1)
    first, second = fleet.nodes.values()
    settings = GatewaySettings(devices=1, rejected_seconds=0.2)
    limits = GatewayLimits(grace=0.1, calls=10_000, settings=settings)
    with caplog.at_level("INFO", "edgeadapt"), gateway(fleet, limits) as grid:
        with attending(grid.gateway.port, [first]):
            grid.await_devices(1)
            with attending(grid.gateway.port, [second]):
                wait_until(lambda: any("the gateway is full" in line for line in caplog.messages))
                assert [*grid.get_node_ids()] == [node_of(Path(first).name)]
        with attending(grid.gateway.port, [second]):
            wait_until(lambda: [*grid.get_node_ids()] == [node_of(Path(second).name)])


def test_an_agent_goes_to_the_next_address_when_a_gateway_is_away_and_back_when_that_one_is(
    app_fleet_of: FleetOf,
) -> None:
    fleet = app_fleet_of(1, rounds=1)
    (folder,) = fleet.nodes.values()
    tls, read_root = server_tls(authority_of(fleet)), CoordinatorStateDir.open(fleet.out / "coordinator").read_root
    ports = free_port(), free_port()
    with attending(ports, [folder]):
        for port in (ports[1], ports[0], ports[1]):
            grid = GatewayGrid(f"{HOST}:{port}", tls, read_root)
            try:
                wait_until(grid.get_node_ids)
            finally:
                grid.close()


def test_an_agent_of_a_version_that_is_too_old_ends_with_one_line(app_fleet_of: FleetOf) -> None:
    fleet = app_fleet_of(1, rounds=1)
    (folder,) = fleet.nodes.values()
    with (
        gateway(fleet, GatewayLimits(settings=GatewaySettings(client_version="99.1"))) as grid,
        agent_process(grid.gateway.port, folder) as agent,
    ):
        _, errors = agent.communicate(timeout=120)
    assert agent.returncode == 3
    assert [line for line in errors.splitlines() if "99.1" in line] == errors.splitlines()[-1:]


# Agents whose owners have conditions, over a real gateway: they wait, come, stop and leave as machines change.
LIMITS = GatewayLimits(calls=10_000, grace=0.1)
AGENT = """
import logging, sys
from pathlib import Path
from client.gateway.agent import Agent
from client.node.readings import Readings
logging.basicConfig(format="%(message)s")
logging.getLogger("edgeadapt").setLevel(logging.INFO)
folder, address, root = sys.argv[1:]
Agent(Path(folder), (address,), Readings(Path(root)), look=0.05).run()
"""


@contextmanager
def agent_on(machine: Machine, folder: Path, port: int) -> Iterator[list[str]]:
    """An agent in its own process, on a machine of files; the lines of its log so far."""
    command = [sys.executable, "-c", AGENT, str(folder), f"{HOST}:{port}", str(machine.root)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines: list[str] = []

    def read() -> None:
        for line in process.stderr or ():
            lines.append(line.strip())

    reading = Thread(target=read)
    reading.start()
    try:
        yield lines
    finally:
        process.kill()
        reading.join()
        process.wait()


def demand(folder: str | Path, table: str) -> None:
    with (Path(folder) / "device.toml").open("a") as settings:
        settings.write(f"\n[eligibility]\n{table}\n")


def test_an_agent_waits_says_why_once_comes_and_leaves_as_the_power_does(app_fleet_of: FleetOf, tmp_path: Path) -> None:
    fleet = app_fleet_of(3, rounds=1)
    machine, folder = Machine(tmp_path / "machine"), Path(fleet.nodes[next(iter(fleet.nodes))])
    demand(folder, "charging = true\nminimum_battery = 30")
    machine.supply("BAT0", type="Battery", capacity="80")
    machine.supply("AC", type="Mains", online="0")
    with gateway(fleet, LIMITS) as grid, agent_on(machine, folder, grid.gateway.port) as lines:
        wait_until(lambda: lines)
        for charge in range(79, 69, -1):  # the reading changes, and the reason does not
            machine.supply("BAT0", capacity=str(charge))
        machine.supply("BAT0", capacity="20")
        wait_until(lambda: len(lines) > 1)
        assert [*grid.get_node_ids()] == []
        machine.supply("AC", online="1")
        wait_until(lambda: len(lines) > 2)
        machine.supply("BAT0", capacity="90")
        wait_until(lambda: [*grid.get_node_ids()])
        machine.supply("AC", online="0")
        wait_until(lambda: sum("not eligible" in line for line in lines) == 4 and not [*grid.get_node_ids()])
        machine.supply("AC", online="1")
        wait_until(lambda: [*grid.get_node_ids()])
    battery = "minimum_battery: 20 %, and at least 30 are demanded"
    assert [line for line in lines if "connected" not in line] == [
        "not eligible: charging: on battery",
        f"not eligible: charging: on battery; {battery}",
        f"not eligible: {battery}",
        "not eligible: charging: on battery",
    ]


class Unplugged(Readings):
    """Loses its power when training has begun: after it waited, checked in, joined, and read its plan; once."""

    calls = 0

    def external_power(self) -> bool:
        self.calls += 1
        return self.calls != 5


def test_a_device_that_is_unplugged_while_it_trains_drops_out_and_comes_back(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("client.node.step.LOOK", 0.0)
    fleet = app_fleet_of(4, rounds=2)
    *others, last = fleet.nodes.values()
    demand(last, "charging = true")
    readings = Unplugged()
    with gateway(fleet, LIMITS) as grid, attending(grid.gateway.port, others):
        agent = Agent(Path(last), (f"{HOST}:{grid.gateway.port}",), readings, look=3600)
        thread = Thread(target=agent.run)
        thread.start()
        grid.await_devices(4)
        with caplog.at_level("INFO", "edgeadapt"):
            first, second = fleet.federate(grid)
        agent.stop()
        thread.join()
    assert [line for line in caplog.messages if "declined" in line] == ["plan declined: charging: on battery"]
    assert (first.dropped, first.version) == ({"device-03": "plan"}, 1)
    assert (second.dropped, second.version, len(second.survivors)) == ({}, 2, 4)
    assert readings.calls > 5
