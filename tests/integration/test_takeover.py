"""Three coordinators with one registry in a real PostgreSQL: real processes, killed, stopped and continued."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from coordinator.registry import Leadership, Registry, database, leadership
from coordinator.statedir import PUBLIC_KEY, CoordinatorStateDir, open_registry
from edgeadapt.formats.registryfiles import BLOBS, DATABASE, REGISTRY, RegistrySettings
from edgeadapt.formats.registrystores import postgresql_url
from tests.support.gateway import HOST, attending, free_port, wait_until
from tests.support.postgresql import Server
from tests.support.trial import call
from tests.support.up import coordinator_of

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NOISY = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 1.0, "aggregation__clip_norm": 0.5}
LONG = 300.0  # seconds, on a machine that has other work


class Coordinator:
    """A state directory on a machine of its own, and the command that runs its rounds."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.lines = folder, port, list[str]()
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "edgeadapt", "coordinator", "run", self.folder]
        command += ["--gateway", f"{HOST}:{self.port}"]
        self.process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self._reader = threading.Thread(target=self._read, args=(self.process,), daemon=True)
        self._reader.start()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        for line in process.stderr or ():
            self.lines.append(line.rstrip())

    def has_said(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)

    def end(self) -> int:
        """Wait until the process has ended by itself."""
        code = self.process.wait(LONG)
        self._reader.join(LONG)
        return code


@contextmanager
def running(folders: dict[Path, int]) -> Iterator[list[Coordinator]]:
    """The first leads, and the others wait."""
    started = list[Coordinator]()
    with ExitStack() as stack:
        for folder, port in folders.items():
            each = Coordinator(folder, port)
            stack.callback(each._reader.join, LONG)
            stack.callback(each.process.wait, LONG)
            stack.callback(lambda each=each: each.process.kill())
            said = "waiting: .*epoch 1" if started else "^leads, epoch 1"
            started.append(each)
            wait_until(lambda each=each, said=said: each.has_said(said) or each.process.poll() is not None, LONG)
            assert each.process.poll() is None, each.lines
        yield started
        for each in started:
            each.process.kill()


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server.create()
    monkeypatch.setenv("PGPASSWORD", server.password)
    yield server
    server.remove()


def shared_by_three(fleet: Any, address: str) -> dict[Path, int]:
    """The coordinator of a new fleet on three machines, with its registry in the database: state directory → port."""
    folder, port = coordinator_of(fleet)
    opened = CoordinatorStateDir.open(folder)
    first = opened.registry.newest_adapter()
    opened.registry.close()
    blobs = fleet.out / "shared-blobs"
    (folder / REGISTRY).write_text(RegistrySettings(database=address, blobs=str(blobs)).to_toml())
    (folder / DATABASE).unlink()
    shutil.rmtree(folder / BLOBS)
    registry = open_registry(folder, opened.key)
    registry.publish(first.manifest, first.blob, opened.key)
    registry.close()
    archive, pinned = fleet.out / "standby.tar", folder / PUBLIC_KEY
    call("coordinator", "backup", folder, "--out", archive, "--standby", "--keys")
    others = {fleet.out / name: free_port() for name in ("second", "third")}
    for other in others:
        call("coordinator", "restore", other, "--archive", archive, "--coordinator", pinned)
    return {folder: port} | others


def test_another_coordinator_takes_over_when_the_leader_is_killed_or_stopped_or_the_database_restarts(
    app_fleet_of: Callable[..., Any], own_server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    fleet = app_fleet_of(3, rounds=1000, **NOISY)
    address = own_server.url(own_server.database())
    folders = shared_by_three(fleet, address)
    engine = database.engine_of(postgresql_url(address))
    registry = Registry(engine, None, (CoordinatorStateDir.open(next(iter(folders))).key.public,))  # type: ignore[arg-type]

    def led() -> Leadership:
        found = leadership(engine)
        assert found is not None
        return found

    def go_on(epoch: int, since: float, what: str) -> None:
        """Wait for the next round under a later epoch."""
        wait_until(lambda: led().epoch >= epoch, LONG)
        taken, done = time.monotonic() - since, len(registry.rounds())
        wait_until(lambda: len(registry.rounds()) > done, LONG)
        seconds = time.monotonic() - since
        with capsys.disabled():
            print(f"\n{what}: another led after {taken:.1f} s, its next round ended after {seconds:.1f} s")

    with attending(tuple(folders.values()), [*fleet.nodes.values()]), running(folders) as coordinators:
        first, *others = coordinators
        wait_until(lambda: len(registry.rounds()) >= 2, LONG)
        first.process.kill()
        go_on(2, time.monotonic(), "kill -9 of the leader")
        (second,) = [each for each in others if each.has_said("^leads, epoch 2")]
        (third,) = [each for each in others if each is not second]
        assert not third.has_said("^leads")

        os.kill(second.process.pid, signal.SIGSTOP)
        since = time.monotonic()
        wait_until(lambda: led().epoch == 3, LONG)
        go_on(3, since, "SIGSTOP of the leader")  # its transcript lacks this round
        os.kill(second.process.pid, signal.SIGCONT)
        assert second.end() == 1
        assert sum(bool(re.search("has taken over in epoch 3", line)) for line in second.lines) == 1, second.lines
        assert "has taken over in epoch 3" in second.lines[-1], second.lines
        assert third.has_said("^leads, epoch 3")

        second.start()
        wait_until(lambda: second.has_said("waiting: .*epoch 3"), LONG)
        own_server.stop(signal.SIGQUIT)
        own_server.start()
        go_on(3, time.monotonic(), "restart of the database")
        assert any(each.process.poll() is None for each in (second, third))

    records = registry.rounds()
    assert [record.round for record in records] == [*range(1, len(records) + 1)]
    made = [record.version for record in records if record.version is not None]
    assert made == [*range(1, len(made) + 1)]
    spent = [record.epsilon for record in records]
    assert all(before <= after for before, after in itertools.pairwise(spent))  # type: ignore[operator]
    for folder in folders:  # the directory of the coordinator that was killed first has all as well
        capsys.readouterr()
        pinned = fleet.out / "authority" / "authority.pem"
        call("audit", "verify", folder, "--authority", pinned, "--unfinished", "--json")
        assert json.loads(capsys.readouterr().out)["ok"]
    engine.dispose()
