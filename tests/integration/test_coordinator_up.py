"""``edgeadapt coordinator up`` with light devices: real processes, one of them killed, and all of them stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from coordinator.services.deployment import RUNNING, running
from coordinator.statedir import PUBLIC_KEY, STOPPING, CoordinatorStateDir
from tests.support.gateway import HOST, attending, wait_until
from tests.support.trial import call
from tests.support.up import LONG, ROOT, coordinator_of, going_up, listens

pytestmark = pytest.mark.slow


def test_rounds_that_are_killed_go_on_from_the_last_one_and_up_ends_when_all_are_done(
    app_fleet_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = app_fleet_of(3, rounds=6)
    folder, port = coordinator_of(fleet)
    state_dir, archive, restored = CoordinatorStateDir.open(folder), fleet.out / "during.tar", fleet.out / "restored"
    with going_up(folder) as up, attending(port, [*fleet.nodes.values()]):
        wait_until(lambda: state_dir.registry.rounds() or up.process.poll() is not None, LONG)
        call("coordinator", "backup", folder, "--out", archive, "--keys")  # of what other processes write to
        os.kill(up.pid(), signal.SIGKILL)
        assert up.wait() == 0, up.other
    records = state_dir.registry.rounds()
    state_dir.registry.close()
    assert [record.round for record in records] == [*range(1, 7)]
    assert [record.version for record in records if record.aborted is None] == [*range(1, 7)]
    codes = [each["code"] for each in up.events if each["event"] == "ended"]
    assert codes == [-signal.SIGKILL, 0]
    assert up.count("ready") == 2
    assert up.events[-1]["event"] == "done"
    assert running(folder) is None
    capsys.readouterr()
    call("audit", "verify", folder, "--authority", fleet.out / "authority" / "authority.pem", "--json")
    assert json.loads(capsys.readouterr().out)["ok"]

    call("coordinator", "restore", restored, "--archive", archive, "--coordinator", folder / PUBLIC_KEY)
    assert not (restored / RUNNING).exists()
    copied = CoordinatorStateDir.open(restored)
    early = copied.registry.rounds()
    copied.registry.close()
    assert 0 < len(early) <= len(records)
    assert early == records[: len(early)]
    capsys.readouterr()
    pinned = fleet.out / "authority" / "authority.pem"
    call("audit", "verify", restored, "--authority", pinned, "--unfinished", "--json")
    assert json.loads(capsys.readouterr().out)["ok"]


def test_services_run_once_are_shown_and_stop_by_command_or_when_up_is_killed(
    app_fleet_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, port = coordinator_of(app_fleet_of(3, rounds=1))
    with going_up(folder) as up:
        wait_until(lambda: up.count("ready") or up.process.poll() is not None, LONG)
        wait_until(lambda: "ready" in json.dumps(running(folder)))
        capsys.readouterr()
        call("coordinator", "status", folder)
        shown = capsys.readouterr().out
        assert f"rounds at {HOST}:{port}: ready, process {up.pid()}, 0 restarts" in shown
        second = subprocess.run(
            [sys.executable, "-m", "edgeadapt", "coordinator", "up", folder], cwd=ROOT, capture_output=True, text=True
        )
        assert (second.returncode, second.stdout, second.stderr.count("\n")) == (1, "", 1)
        assert "run already" in second.stderr
        call("coordinator", "stop", folder)
        assert capsys.readouterr().out == "stopped\n"
        assert up.wait() == 0  # systemd starts no service again that was asked to stop
        assert [each["event"] for each in up.events if each["event"] != "output"][-2:] == ["stopping", "ended"]
        assert not listens(port)
    with going_up(folder) as up:
        wait_until(lambda: up.count("ready") or up.process.poll() is not None, LONG)
        assert listens(port)
        up.process.kill()
        wait_until(lambda: not listens(port), LONG)
    assert running(folder) is None


def test_a_run_on_a_superlink_closes_its_log_before_the_superlink_is_stopped(
    app_fleet_of: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = app_fleet_of(3, rounds=1000)
    folder, port = coordinator_of(fleet, superlink=True)
    state_dir = CoordinatorStateDir.open(folder)
    with going_up(folder) as up, attending(port, [*fleet.nodes.values()]):
        wait_until(lambda: len(state_dir.registry.rounds()) > 1 or up.process.poll() is not None, LONG)
        call("coordinator", "stop", folder)
        done = len(state_dir.registry.rounds())
        assert up.wait() == 0, up.other
    assert (len(state_dir.registry.rounds()), state_dir.in_use) == (done, False)
    state_dir.registry.close()
    assert not (folder / STOPPING).exists()
    capsys.readouterr()
    call("audit", "verify", folder, "--authority", fleet.out / "authority" / "authority.pem", "--json")
    assert json.loads(capsys.readouterr().out)["ok"]  # without --unfinished
