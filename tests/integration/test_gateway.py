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
from typing import Any

import pytest
from flwr.app import Message

from aggregation.steps import BODY, RECORD
from coordinator.gateway.grid import GatewayGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.settings import GatewaySettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats.gateway.messages import node_of
from tests.support import FleetOf
from tests.support.gateway import HOST, attending, authority_of, free_port, gateway, server_tls, wait_until
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
    with contextlib.closing(grid), attending(grid.port, [*fleet.nodes.values()]):
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
        attending(grid.port, others),
        agent_process(grid.port, last) as agent,
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
    limits = GatewayLimits(devices=1, grace=0.1, calls=10_000, settings=GatewaySettings(rejected_seconds=0.2))
    with caplog.at_level("INFO", "edgeadapt"), gateway(fleet, limits) as grid:
        with attending(grid.port, [first]):
            grid.await_devices(1)
            with attending(grid.port, [second]):
                wait_until(lambda: any("asks this device to come back" in line for line in caplog.messages))
                assert [*grid.get_node_ids()] == [node_of(Path(first).name)]
        with attending(grid.port, [second]):
            wait_until(lambda: [*grid.get_node_ids()] == [node_of(Path(second).name)])
    assert not [line for line in caplog.messages if "too early" in line]


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
        agent_process(grid.port, folder) as agent,
    ):
        _, errors = agent.communicate(timeout=120)
    assert agent.returncode == 3
    assert [line for line in errors.splitlines() if "99.1" in line] == errors.splitlines()[-1:]
