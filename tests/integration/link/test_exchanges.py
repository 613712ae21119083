"""How many exchanges a federation takes on Flower's own grid, counted there, and that none waits for Flower's sleep."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from aggregation.steps import Step
from client.node.statedir import SETTINGS
from coordinator.app import run
from coordinator.gateway.grid import JoinedGrid, serving
from coordinator.statedir import CoordinatorStateDir
from coordinator.transport import LAST_POLL
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from tests.support import FleetOf
from tests.support.flowerlink import living
from tests.support.gateway import HOST, attending, authority_of, free_port, server_tls, wait_until

FLOWERS_SLEEP = 3.0  # seconds between two looks of the SuperLink's grid in ``send_and_receive``
EITHER = 'adversaries = ["active", "honest-but-curious"]'  # what a device's owner writes to allow it


class Counted:
    """What goes through a grid: group and step of each exchange, and how long the grid lay idle before it."""

    def __init__(self, grid: Any) -> None:
        self.exchanges: list[tuple[str, str]] = []
        self.idle: list[float] = []
        self._push, self._pull, self._last = grid.push_messages, grid.pull_messages, time.monotonic()
        grid.push_messages, grid.pull_messages, grid.send_and_receive = self.push, self.pull, None

    def push(self, messages: Iterable[Message]) -> Iterable[str]:
        self.idle.append(time.monotonic() - self._last)
        batch = list(messages)
        asked = {(message.metadata.group_id, message.metadata.message_type) for message in batch}
        assert len(asked) == 1
        self.exchanges.extend(asked)
        return self._push(batch)  # type: ignore[no-any-return]

    def pull(self, message_ids: Iterable[str]) -> Iterable[Message]:
        arrived = list(self._pull(message_ids))
        if arrived:
            self._last = time.monotonic()
        return arrived


@pytest.mark.parametrize(
    ("adversary", "steps"),
    [("active", (Step.PLAN, Step.SURVIVORS, Step.UNMASK)), ("honest-but-curious", (Step.PLAN, Step.UNMASK))],
)
def test_a_round_takes_three_exchanges_or_two_and_no_other_wait(
    fleet_of: FleetOf, link: Any, adversary: str, steps: tuple[Step, ...]
) -> None:
    fleet = fleet_of(3, rounds=3, aggregation__session_rounds=3, aggregation__adversary=adversary)
    for state_dir in fleet.nodes.values():
        with Path(state_dir, SETTINGS).open("a") as settings:  # its last table is the policy
            settings.write(EITHER)
    counted = Counted(link.grid)
    with living(link, fleet.nodes.values()):
        records = list(run(CoordinatorStateDir.open(fleet.out / "coordinator"), link.grid))
    assert [len(record.survivors) for record in records] == [3, 3, 3]
    made = [("session-1-1", step.message_type) for step in (Step.CHECK_IN, Step.OFFER, Step.ROSTER)]
    rounds = [(number, step.message_type) for number in ("1", "2", "3") for step in steps]
    assert counted.exchanges == made + rounds
    assert max(counted.idle[1:]) < FLOWERS_SLEEP - LAST_POLL


# SuperNodes and light devices


def test_supernodes_and_light_devices_make_rounds_together(fleet_of: FleetOf, link: Any) -> None:
    fleet, port = fleet_of(5, rounds=2), free_port()
    tls, folder = server_tls(authority_of(fleet)), fleet.out / "coordinator"
    (folder / TLS_KEY).write_bytes(tls.key)
    (folder / TLS_CERTIFICATE).write_bytes(tls.certificate)
    everyone = [Path(state_dir) for state_dir in fleet.nodes.values()]
    state_dir = CoordinatorStateDir.open(folder)
    with (
        living(link, map(str, everyone[:3])),
        serving(state_dir, f"{HOST}:{port}", own_process=False) as light,
        attending(port, everyone[3:]),
    ):
        grid = JoinedGrid(link.grid, light)
        wait_until(lambda: len([*grid.get_node_ids()]) == 5)
        records = list(run(state_dir, grid))
    state_dir.registry.close()
    names = tuple(path.name for path in everyone)
    assert [(record.survivors, record.dropped) for record in records] == [(names, {}), (names, {})]
