"""Agents whose owners have conditions, over a real gateway: they wait, come, stop and leave as machines change."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import pytest

from client.gateway.agent import Agent
from client.node.readings import SystemReadings
from coordinator.gateway.server import GatewayLimits
from tests.support import FleetOf
from tests.support.gateway import HOST, attending, gateway, wait_until
from tests.support.machine import Machine

ROOT = Path(__file__).parents[2]
LIMITS = GatewayLimits(calls=10_000, grace=0.1)
AGENT = """
import logging, sys
from pathlib import Path
from client.gateway.agent import Agent
from client.node.readings import SystemReadings
logging.basicConfig(format="%(message)s")
logging.getLogger("edgeadapt").setLevel(logging.INFO)
folder, address, root = sys.argv[1:]
Agent(Path(folder), (address,), SystemReadings(Path(root)), look=0.05).run()
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
    with gateway(fleet, LIMITS) as grid, agent_on(machine, folder, grid.port) as lines:
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


class Unplugged(SystemReadings):
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
    with gateway(fleet, LIMITS) as grid, attending(grid.port, others):
        agent = Agent(Path(last), (f"{HOST}:{grid.port}",), readings, look=3600)
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
