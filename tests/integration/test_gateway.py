"""A federation of light devices over real gRPC with mutual TLS on loopback, with the same ServerApp."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.authority import AuthorityStore
from coordinator.gateway.enrolment import EnrolmentServer, EnrolmentService
from coordinator.gateway.grid import GatewayGrid
from coordinator.gateway.server import GatewayLimits
from coordinator.statedir import CoordinatorStateDir
from tests.support.gateway import HOST, attending, authority_of, free_port, give_tls, server_tls
from tests.support.trial import AUTHORITY, COORDINATOR, call, make_trial_fleet

ROOT = Path(__file__).parents[2]
PHRASES = [("Light", "turn on the light"), ("Music", "play music"), ("Timer", "set a timer")]
EXAMPLES = """{"text": "switch the lamp on", "label": 0}
{"text": "play the song", "label": 1}
{"text": "make it bright", "label": 0, "split": "validation"}
"""
DEVICES = ("device-00", "device-01", "device-02")


@contextmanager
def gateway(fleet: Any, limits: GatewayLimits | None = None) -> Iterator[GatewayGrid]:
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    grid = GatewayGrid(f"{HOST}:0", server_tls(authority_of(fleet)), state_dir.read_root, limits)
    try:
        yield grid
    finally:
        grid.close()
        state_dir.registry.close()


@contextmanager
def agent_process(port: int, folder: Path) -> Iterator["subprocess.Popen[str]"]:
    """The command, as an owner starts it; killed at the end of the block if it runs still."""
    command = [sys.executable, "-m", "edgeadapt", "device", "agent", "--state", folder, "--gateway", f"{HOST}:{port}"]
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


def test_light_devices_make_the_rounds_and_the_audit_passes(
    app_fleet_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = app_fleet_of(3, rounds=2)
    give_tls(fleet)
    with gateway(fleet) as grid, attending(grid.port, [*fleet.nodes.values()]):
        grid.await_devices(3)
        records = fleet.federate(grid)
    assert [(record.survivors, record.dropped, record.version) for record in records] == [
        (DEVICES, {}, 1),
        (DEVICES, {}, 2),
    ]
    require_audited(fleet, capsys)


def test_a_device_that_is_killed_while_it_trains_drops_out_and_the_others_finish(
    app_fleet_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = app_fleet_of(4, rounds=2)
    give_tls(fleet)
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


def test_a_fleet_is_enrolled_by_tokens_and_makes_its_rounds_by_commands(
    tmp_path: Path, tiny_base: Any, one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trial_fleet(tmp_path, str(tiny_base.folder), PHRASES, {}, "rounds=2", rank=2)
    authority, fleet = tmp_path / AUTHORITY, tmp_path / COORDINATOR
    call("coordinator", "tls-request", fleet)
    call(
        "authority", "issue-tls", authority, "--request", fleet / "tls.csr", "--host", HOST, "--out", fleet / "tls.pem"
    )
    store = AuthorityStore(authority)
    enrolment = EnrolmentServer(EnrolmentService(store, store.unlock(None), 30), f"{HOST}:0", [HOST])
    gateway_port = free_port()
    places = ("--enrolment", f"{HOST}:{enrolment.port}", "--gateway", f"{HOST}:{gateway_port}")
    limits = ("policy.minimum_cohort=3", "policy.minimum_survivors=2", "policy.answer_quantum_seconds=0")
    capsys.readouterr()
    for device in DEVICES:
        call("authority", "invite", authority, "--name", device, "--coordinator", fleet / "coordinator.pem", *places)
        token = capsys.readouterr().out.strip()
        chosen = [part for limit in limits for part in ("--set", limit)]
        call("device", "enrol", "--state", tmp_path / device, "--base", tiny_base.folder, "--token", token, *chosen)
        capsys.readouterr()
        (tmp_path / device / "examples.jsonl").write_text(EXAMPLES)
    enrolment.close()
    with attending(gateway_port, [tmp_path / device for device in DEVICES]):
        call("coordinator", "run", fleet, "--gateway", f"{HOST}:{gateway_port}", "--json")
    status = json.loads(capsys.readouterr().out)
    assert [each["survivors"] for each in status["rounds"]] == [[*DEVICES]] * 2
    call("audit", "verify", fleet, "--authority", authority / "authority.pem", "--json")
    assert json.loads(capsys.readouterr().out)["ok"]
