"""``edgeadapt coordinator up`` with light devices: real processes, one of them killed, and all of them stopped."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from coordinator.services.deployment import RUNNING, running
from coordinator.services.supervisor import Happening
from coordinator.settings import SERVICES, ServiceSettings
from coordinator.statedir import PUBLIC_KEY, STOPPING, CoordinatorStateDir
from edgeadapt.formats import storage
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.registryfiles import REVOKED
from tests.support import FleetOf
from tests.support.gateway import HOST, attending, authority_of, free_port, server_tls, wait_until
from tests.support.trial import call

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
STATES = {state.value for state in Happening}
LONG = 300.0  # seconds, on a machine that has other work


class Up:
    """The command as a process, and the events that it has written."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.lines = folder, list[str]()
        command = [sys.executable, "-m", "edgeadapt", "coordinator", "up", folder, "--json"]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def count(self, event: str, service: str = "rounds") -> int:
        return sum((each["event"], each["service"]) == (event, service) for each in self.events)

    def wait(self) -> int:
        code = self.process.wait(LONG)
        self._reader.join(LONG)
        return code

    def pid(self, service: str = "rounds") -> int:
        found = running(self.folder)
        assert found is not None
        (pid,) = [each["pid"] for each in found["services"] if each["name"] == service]
        assert isinstance(pid, int)
        return pid


@contextmanager
def going_up(folder: Path) -> Iterator[Up]:
    up = Up(folder)
    try:
        yield up
    finally:
        up.process.kill()
        up.process.communicate()


def listens(port: int) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex((HOST, port)) == 0


def coordinator_of(fleet: Any, *, superlink: bool = False, dashboard: str = "") -> tuple[Path, int]:
    """The state directory of a fleet's coordinator with a gateway in its services, and the gateway's port."""
    folder, port, tls = fleet.out / "coordinator", free_port(), server_tls(authority_of(fleet))
    (folder / TLS_KEY).write_bytes(tls.key)
    (folder / TLS_CERTIFICATE).write_bytes(tls.certificate)
    link = f"{HOST}:{free_port()}" if superlink else ""
    settings = ServiceSettings(gateway=f"{HOST}:{port}", superlink=link, dashboard=dashboard)
    (folder / SERVICES).write_text(settings.to_toml())
    return folder, port


def test_rounds_that_are_killed_go_on_from_the_last_one_and_up_ends_when_all_are_done(
    app_fleet_of: FleetOf, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = app_fleet_of(3, rounds=6)
    folder, port = coordinator_of(fleet)
    state_dir, archive, restored = CoordinatorStateDir.open(folder), fleet.out / "during.tar", fleet.out / "restored"
    with going_up(folder) as up, attending(port, [*fleet.nodes.values()]):
        wait_until(lambda: state_dir.registry.rounds() or up.process.poll() is not None, LONG)
        call("coordinator", "backup", folder, "--out", archive, "--keys")  # of what other processes write to
        os.kill(up.pid(), signal.SIGKILL)
        assert up.wait() == 0, up.events[-3:]
    records = state_dir.registry.rounds()
    state_dir.registry.close()
    assert [record.round for record in records] == [*range(1, 7)]
    assert [record.version for record in records if record.aborted is None] == [*range(1, 7)]
    assert all({"time", "level", "event", "service"} <= each.keys() for each in up.events)
    ends = [each for each in up.events if re.match(r"round . of 6: 3 of 3 devices are in the sum", each["event"])]
    assert [each["round"] for each in ends][-1] == 6
    assert {each["service"] for each in ends} == {"rounds"}
    named = [each for each in up.events if each["event"].endswith("is connected over gRPC")]
    assert {each["device"] for each in named} == {"device-00", "device-01", "device-02"}
    assert len({each["run"] for each in [*ends, *named]}) == 2  # one was killed
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
    app_fleet_of: FleetOf, capsys: pytest.CaptureFixture[str]
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
        assert [each["event"] for each in up.events if each["event"] in STATES][-2:] == ["stopping", "ended"]
        assert not listens(port)
    with going_up(folder) as up:
        wait_until(lambda: up.count("ready") or up.process.poll() is not None, LONG)
        assert listens(port)
        up.process.kill()
        wait_until(lambda: not listens(port), LONG)
    assert running(folder) is None


def test_a_run_on_a_superlink_closes_its_log_before_the_superlink_is_stopped(
    app_fleet_of: FleetOf, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = app_fleet_of(3, rounds=1000)
    folder, port = coordinator_of(fleet, superlink=True)
    state_dir = CoordinatorStateDir.open(folder)
    with going_up(folder) as up, attending(port, [*fleet.nodes.values()]):
        # Flower hands a run's log on every few seconds.
        wait_until(lambda: any("round" in each for each in up.events) or up.process.poll() is not None, LONG)
        call("coordinator", "stop", folder)
        done = len(state_dir.registry.rounds())
        assert up.wait() == 0, up.events[-3:]
    assert (len(state_dir.registry.rounds()), state_dir.in_use) == (done, False)
    state_dir.registry.close()
    assert not (folder / STOPPING).exists()
    (run,) = {each["run"] for each in up.events if "run" in each}
    assert run.isdigit()  # Flower's
    assert {each["round"] for each in up.events if "round" in each} >= {1}
    capsys.readouterr()
    call("audit", "verify", folder, "--authority", fleet.out / "authority" / "authority.pem", "--json")
    assert json.loads(capsys.readouterr().out)["ok"]  # without --unfinished


def test_an_expired_revocation_list_holds_rounds_back_and_nothing_else(app_fleet_of: FleetOf) -> None:
    fleet = app_fleet_of(3, rounds=2)
    authority, now = authority_of(fleet), datetime.now(UTC)
    shown = f"{HOST}:{free_port()}"
    folder, port = coordinator_of(fleet, dashboard=shown)

    def give(number: int, begin: datetime, end: datetime) -> None:
        storage.replace(folder / REVOKED, authority.revocations(number, {}, begin, end).to_pem())

    give(1, now - timedelta(days=9), now - timedelta(days=2))
    with going_up(folder) as up, attending(port, [*fleet.nodes.values()]):
        wait_until(lambda: up.count("ready", "dashboard") or up.process.poll() is not None, LONG)
        with urlopen(f"http://{shown}/health", timeout=LONG) as answer:
            assert answer.status == 200
        refusal = "devices cannot be served: revocation list 1 was valid until"
        wait_until(lambda: any(refusal in each["event"] for each in up.events), LONG)
        give(2, now - timedelta(days=1), now + timedelta(days=1))
        assert up.wait() == 0, up.events[-3:]
    assert up.count("started") == 1


def test_sighup_has_settings_read_again_between_two_rounds(app_fleet_of: FleetOf) -> None:
    fleet = app_fleet_of(3, rounds=1000)
    folder, port = coordinator_of(fleet)
    with going_up(folder) as up, attending(port, [*fleet.nodes.values()]):
        for changes, line in (
            ({"method": "ffa", "rounds": 1}, "the settings stay as they were: method changed"),
            ({"method": "fedit", "rounds": 1}, "settings that are new from this round on: rounds"),
        ):
            wait_until(lambda: any("round" in each for each in up.events), LONG)
            fleet.configure(changes)
            up.process.send_signal(signal.SIGHUP)
            wait_until(lambda text=line: any(text in each["event"] for each in up.events), LONG)  # type: ignore[misc]
        assert up.wait() == 0, up.events[-3:]
    assert up.count("started") == 1
