"""A real deployment on Flower's own runtime: a SuperLink with TLS, and SuperNodes that authenticate with their keys.

Each is a process with its own Flower home in one folder, and none of them outlives the test.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority
from benchmarks.faults import supernodes
from benchmarks.faults.processes import HOST, free_port, processes_of
from tests.support.gateway import certify

ROOT = Path(__file__).resolve().parents[2]
TAIL = 4000  # characters of each log that a failure shows
LINK = "test"  # the SuperLink's name in Flower's configuration
SETTINGS = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",  # seconds until a task that waits is started; 1 by default
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",  # the nodes train at the same time
    "TOKENIZERS_PARALLELISM": "false",
    "NO_COLOR": "1",
    "COLUMNS": "200",
}


@dataclass
class Deployment:
    """A SuperLink, its SuperNodes, and Flower's command line for them."""

    folder: Path
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self) -> None:
        """Make certificates and start the SuperLink."""
        _certify(self.folder)
        link = {"address": f"{HOST}:{self.port}", "root-certificates": str(self.folder / "ca.pem")}
        lines = [f"[superlink.{LINK}]", *(f'{key} = "{value}"' for key, value in link.items())]
        state_dir = self._home("cli")
        (state_dir / "config.toml").write_text("\n".join(lines) + "\n")
        options = {
            "--host": HOST,
            "--port": self.port,
            "--database": self.folder / "state.db",
            "--ssl-certfile": self.folder / "server.pem",
            "--ssl-keyfile": self.folder / "server.key",
            "--ssl-ca-certfile": self.folder / "ca.pem",
        }
        flags = ("--enable-supernode-auth", "--disable-runtime-dependency-installation")
        self._spawn("superlink", ["flower-superlink", *_listed(options), *flags])
        self.wait("the SuperLink listens", lambda: _listens(self.port), seconds=60)

    def add_node(self, name: str, device: Path, environment: Mapping[str, str] | None = None) -> None:
        """Register a new key and start a SuperNode with it, for the device with the state directory ``device``."""
        private, address, root = self.folder / f"{name}.key", f"{HOST}:{self.port}", self.folder / "ca.pem"
        supernodes.register(supernodes.write_key(private), address, root)
        self._spawn(name, supernodes.command(address, root, private, device), environment=environment)

    def wait_for_nodes(self) -> None:
        """Until every node is registered with the SuperLink."""
        nodes = [name for name in self.processes if name != "superlink"]
        self.wait("the nodes are online", lambda: all(supernodes.ONLINE in self.log(n) for n in nodes), seconds=90)

    def flwr(self, *arguments: str, seconds: float = 60) -> str:
        done = subprocess.run(
            [_script("flwr"), *arguments],
            env=self._environment("cli"),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        )
        output = done.stdout.decode(errors="replace")
        assert done.returncode == 0, output
        return output

    def begin(self, state_dir: Path) -> str:
        """Start ``edgeadapt coordinator run`` for a coordinator's state directory; the run's name here."""
        name = f"run-{len(list(self.folder.glob('run-*.log'))) + 1}"
        link = ["--superlink", f"{HOST}:{self.port}", "--root-certificates", str(self.folder / "ca.pem")]
        command = [sys.executable, "-m", "edgeadapt", "coordinator", "run", str(state_dir), *link]
        self._spawn(name, command, state_dir="cli")
        return name

    def finish(self, run: str, *, seconds: float) -> str:
        """Wait until the command ends; what it has written: the run's log, and the status."""
        code = self.processes[run].wait(timeout=seconds)
        del self.processes[run]
        assert code == 0, self.log(run)
        return self.log(run)

    def statuses(self) -> list[str]:
        listed = self.flwr("list", LINK, "--format", "json")
        return [run["status"] for run in json.loads(listed[listed.index("{") :])["runs"]]

    def wait(self, what: str, condition: Callable[[], bool], *, seconds: float) -> None:
        """Poll until ``condition`` holds; fail if a process ends before that, or after ``seconds``."""
        end = time.monotonic() + seconds
        while not condition():
            ended = [name for name, process in self.processes.items() if process.poll() is not None]
            assert not ended, f"{ended} ended before {what}"
            assert time.monotonic() < end, f"not within {seconds} s: {what}"
            time.sleep(0.1)

    def stop(self, name: str) -> None:
        """Ask a process to end, as an operator would, and insist if it does not."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for name in list(self.processes):
            self.stop(name)
        # Flower starts some of its children in sessions of their own; their Flower home identifies them.
        for process_id in processes_of(self.folder):
            os.kill(process_id, signal.SIGKILL)

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def logs(self) -> str:
        """The end of what each process has written."""
        paths = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-TAIL:]}" for path in paths)

    def _spawn(
        self, name: str, command: list[str], *, state_dir: str = "", environment: Mapping[str, str] | None = None
    ) -> None:
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                [command[0] if Path(command[0]).is_absolute() else _script(command[0]), *command[1:]],
                cwd=ROOT,
                env=self._environment(state_dir or name) | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C interrupts the test, which then ends the process
            )

    def _home(self, name: str) -> Path:
        state_dir = self.folder / f"{name}-home"
        state_dir.mkdir(exist_ok=True)
        return state_dir

    def _environment(self, name: str) -> dict[str, str]:
        # Flower finds the programs that it starts by PATH.
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **SETTINGS, "PATH": path, "FLWR_HOME": str(self._home(name))}


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Deployment]:
    if " " in sys.prefix:
        # It joins the folders of its database's versions by spaces, and makes no table where one has a space itself.
        pytest.skip("Flower's SuperLink cannot set up its database from an environment whose path has a space")
    made = Deployment(tmp_path_factory.mktemp("flower"))
    failed = request.session.testsfailed
    try:
        made.start()
        yield made
    finally:
        made.close()
        if request.session.testsfailed > failed:
            print(made.logs())


def _listed(options: Mapping[str, object]) -> list[str]:
    return [str(part) for option in options.items() for part in option]


def _script(name: str) -> str:
    return str(Path(sysconfig.get_path("scripts")) / name)


def _listens(port: int) -> bool:
    with socket.socket() as caller:
        caller.settimeout(1)
        return caller.connect_ex((HOST, port)) == 0


def _certify(folder: Path) -> None:
    """``ca.pem``, and ``server.pem`` with ``server.key`` for ``HOST``."""
    now = datetime.now(UTC)
    authority = Authority.create("test", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=1))
    key, certificate = certify(authority)
    for name, content in (("ca.pem", authority.root.to_pem()), ("server.key", key), ("server.pem", certificate)):
        (folder / name).write_bytes(content)
