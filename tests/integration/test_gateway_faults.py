"""What breaks while light devices train, and what is lost: nothing but time, or the round under way."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from client.gateway import agent as agents
from client.node.step import Refusal
from coordinator.gateway.hub import NoAnswer
from coordinator.gateway.server import Gateway
from coordinator.statedir import TLS_CERTIFICATE, TLS_KEY
from tests.integration.test_gateway import DEVICES, gateway, require_audited
from tests.support.gateway import HOST, attending, authority_of, free_port, give_tls, server_tls
from tests.support.proxy import Proxy

ROOT = Path(__file__).parents[2]
FleetOf = Callable[..., Any]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let agents come back at once."""
    monkeypatch.setattr("client.gateway.calls.FIRST_PAUSE", 0.05)


@pytest.mark.parametrize("when", ["before the answer is sent", "after the answer was received"])
def test_a_network_that_breaks_while_a_device_answers_costs_no_device_the_round(
    app_fleet_of: FleetOf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """All connections of one device break at each of its answers, once for each."""
    fleet, send = app_fleet_of(3, rounds=2), agents._send
    give_tls(fleet)
    first, *others = fleet.nodes.values()
    broken = set[int]()

    def interrupted(channel: Any, number: int, found: bytes | Refusal) -> None:
        mine, new = threading.current_thread() is victim[0], number not in broken
        broken.add(number)
        if mine and new and when == "before the answer is sent":
            proxy.cut()
        send(channel, number, found)
        if mine and new and when == "after the answer was received":
            proxy.cut()

    monkeypatch.setattr(agents, "_send", interrupted)
    with gateway(fleet) as grid, attending(grid.port, others):
        proxy = Proxy(grid.port)
        agent = agents.Agent(Path(first), f"{HOST}:{proxy.port}")
        victim = [threading.Thread(target=agent.run)]
        victim[0].start()
        grid.await_devices(3)
        records = fleet.federate(grid)
        agent.stop()
        victim[0].join()
        proxy.close()
    assert proxy.cuts > 6  # 3 steps of a session, 3 of each round
    assert [(record.survivors, record.dropped) for record in records] == [(DEVICES, {}), (DEVICES, {})]
    require_audited(fleet, capsys)


@pytest.mark.slow
def test_a_coordinator_that_is_killed_in_a_round_goes_on_with_the_same_agents(
    app_fleet_of: FleetOf, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet, port = app_fleet_of(3, rounds=2), free_port()
    give_tls(fleet)
    tls, folder = server_tls(authority_of(fleet)), fleet.out / "coordinator"
    (folder / TLS_KEY).write_bytes(tls.key)
    (folder / TLS_CERTIFICATE).write_bytes(tls.certificate)
    command = [sys.executable, "-m", "edgeadapt", "coordinator", "run", folder, "--gateway", f"{HOST}:{port}", "--json"]
    answer, plans = agents.answer, threading.Semaphore(0)

    def counted(open_state: Any, step: Any, fields: Any, node: int) -> Any:
        if step.value == "plan":
            plans.release()
        return answer(open_state, step, fields, node)

    monkeypatch.setattr(agents, "answer", counted)
    with attending(port, [*fleet.nodes.values()]):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as killed:
            assert plans.acquire(timeout=60)
            killed.kill()
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    rounds = json.loads(done.stdout)["rounds"]
    assert [(each["round"], each["survivors"]) for each in rounds] == [(1, [*DEVICES]), (2, [*DEVICES])]
    require_audited(fleet, capsys)


def test_an_agent_that_is_refused_ends_with_one_line_and_one_that_is_stopped_ends(
    app_fleet_of: FleetOf, tmp_path: Path
) -> None:
    fleet, answers = app_fleet_of(2), list[tuple[int, bytes | NoAnswer]]()
    give_tls(fleet)
    kitchen, hall = map(Path, fleet.nodes.values())
    running = Gateway(
        f"{HOST}:0",
        server_tls(authority_of(fleet)),
        lambda at: authority_of(fleet).root,
        lambda *found: answers.append(found),
    )
    (hall / "tls.key").write_bytes((kitchen / "tls.key").read_bytes())
    (hall / "tls.pem").write_bytes((kitchen / "tls.pem").read_bytes())
    command = [sys.executable, "-m", "edgeadapt", "device", "agent", "--gateway", f"{HOST}:{running.port}", "--state"]
    refused = subprocess.run([*command, hall], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 4
    assert re.search(r"^edgeadapt: the gateway refuses this device: .*identity", refused.stderr, re.MULTILINE)
    with subprocess.Popen([*command, kitchen], cwd=ROOT, stderr=subprocess.PIPE, text=True) as agent:
        assert agent.stderr is not None
        assert any("connected" in line for line in agent.stderr)
        second = subprocess.run([*command, kitchen], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert (second.returncode, "another agent" in second.stderr) == (2, True)
        agent.terminate()
        assert agent.wait(20) == 0
    running.close()
