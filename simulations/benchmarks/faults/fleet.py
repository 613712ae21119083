"""A small fleet on this machine whose processes are those of the commands: `coordinator up` and `device agent`.

Its base is tiny and its devices train with a bundle, so that their processes start fast. Its rounds have noise, so that
each device keeps a privacy ledger, and a session is one round, so that each round has every step of the protocol.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from adapters.roundrecord import RoundRecord
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, certificates
from aggregation.pki.tls import TlsKey, TlsRole, read_tls_request
from client.node.statedir import TLS_CERTIFICATE, TLS_KEY
from coordinator.services.deployment import running
from coordinator.servicesettings import SERVICES, ServiceSettings
from coordinator.statedir import CoordinatorStateDir
from simulations.benchmarks.faults.network import Network
from simulations.benchmarks.simulation.fleets import population, tiny_base
from simulations.engine import provision
from simulations.engine.bases import device_base
from simulations.scenario import Scenario

HOST = "127.0.0.1"
PATIENCE = 300.0  # seconds for anything to happen, on a machine that has other work
LOOK = 0.05  # seconds
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "OMP_NUM_THREADS": "1"}
FEDERATION = {
    "rounds": 10_000,
    "deadline": 60.0,
    "aggregation": {"session_rounds": 1},
    "gateway": {"client_version": "0.0.2"},
    "privacy": {"mechanism": "skellam", "noise_multiplier": 1.0},
}
SERVICES_OF_A_TEST = {"stop": 20.0, "pause": 4.0, "look": 1.0}  # seconds, of a small fleet: `up` is less patient


class Late(Exception):  # noqa: N818
    """Something did not happen in time."""


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    """Poll until a condition holds. Raises ``Late``."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Late(f"not within {seconds:g} s: {what}")
        time.sleep(LOOK)


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


class Lines:
    """A process of `edgeadapt`, and the lines that it writes to standard error, with the time of each."""

    def __init__(self, *arguments: object, environment: Mapping[str, str] | None = None) -> None:
        self.lines = list[tuple[float, str]]()
        self._changed = threading.Condition()
        # -P: a checkout in the working directory has metadata of its own, which would come before those of PYTHONPATH.
        command = [sys.executable, "-P", "-m", "edgeadapt", *map(str, arguments)]
        own = {**os.environ, **QUIET, **(environment or {})}
        self.process = subprocess.Popen(  # noqa: S603
            command, env=own, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr or ():
            with self._changed:
                self.lines.append((time.monotonic(), line.rstrip()))
                self._changed.notify_all()

    def next(self, text: str, since: int, seconds: float = PATIENCE) -> None:
        """Wait for a line with ``text`` after the first ``since`` lines. Raises ``Late``."""
        with self._changed:
            found = self._changed.wait_for(lambda: any(text in line for _, line in self.lines[since:]), seconds)
        if not found:
            raise Late(f"not within {seconds:g} s: a line with {text!r}; the last ones: {self.lines[-5:]}")

    def end(self, ask: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal and wait for the end; kill it if it takes too long."""
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(ask)
        try:
            code = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join(1.0)
        return code


@dataclass(slots=True)
class FaultFleet:
    """The fleet's folder, its processes, and what its records say."""

    out: Path
    names: tuple[str, ...]
    network: Network
    agents: dict[str, Lines] = field(default_factory=dict)
    up: Lines | None = None

    @property
    def coordinator(self) -> Path:
        """The coordinator's state directory."""
        return self.out / provision.COORDINATOR

    def device(self, name: str) -> Path:
        """A device's state directory."""
        return provision.device_folder(self.out, name)

    def start(self) -> None:
        """Start ``coordinator up``."""
        self.up = Lines("coordinator", "up", self.coordinator, "--json")

    def stop(self) -> None:
        """End ``coordinator up`` in order."""
        if self.up is not None:
            self.up.end(signal.SIGTERM)
            self.up = None

    def attend(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a device's agent."""
        place = ("--state", self.device(name), "--gateway", f"{HOST}:{self.network.links[name].port}")
        self.agents[name] = Lines("device", "agent", *place, environment=environment)

    def close(self) -> None:
        """End every process."""
        for agent in self.agents.values():
            agent.end()
        if self.up is not None:
            for each in (running(self.coordinator) or {"services": []})["services"]:
                if each["pid"]:
                    os.kill(each["pid"], signal.SIGCONT)
            self.stop()

    def pid(self, service: str) -> int:
        """The process of a service, once there is one. Raises ``Late``."""

        def found() -> int:
            listed = (running(self.coordinator) or {"services": []})["services"]
            return next((each["pid"] or 0 for each in listed if each["name"] == service), 0)

        wait_until(found, f"a process of {service}")
        return found()

    def records(self) -> tuple[RoundRecord, ...]:
        """Of all rounds so far."""
        registry = CoordinatorStateDir.open(self.coordinator).registry
        try:
            return registry.rounds()
        finally:
            registry.close()

    def await_version(self, after: int, what: str) -> int:
        """Wait until a round after so many has made a version; how many rounds there are then. Raises ``Late``."""

        def made() -> bool:
            return any(record.version is not None for record in self.records()[after:])

        wait_until(made, what)
        return len(self.records())


@contextmanager
def running_fleet(out: Path, devices: int, *, superlink: bool = False) -> Iterator[FaultFleet]:
    """Make a fleet in the folder ``out``; at the end of the block, end its processes.

    Args:
        out: Does not exist.
        devices: Their number, 3 or more.
        superlink: Whether Flower's SuperLink runs as well, which then starts the rounds.
    """
    port, names = free_port(), _provision(out, devices)
    network = Network(HOST, port, names)
    fleet = FaultFleet(out, names, network)
    _give_tls(fleet)
    settings: dict[str, Any] = {"gateway": f"{HOST}:{port}", **SERVICES_OF_A_TEST}
    settings |= {"superlink": f"{HOST}:{free_port()}"} if superlink else {}
    (fleet.coordinator / SERVICES).write_text(ServiceSettings(**settings).to_toml(), encoding="utf-8")
    try:
        yield fleet
    finally:
        fleet.close()
        network.close()


def _provision(out: Path, devices: int) -> tuple[str, ...]:
    base, people = tiny_base(out / "base"), population(devices)
    scenario = Scenario.parse(
        {"base": {"model": str(base.folder), "engine": "onnx"}, "adapter": {"rank": 2}, "federation": FEDERATION},
        "bench faults",
    )
    provision.provision(out, scenario, people, base)
    device_base(out, scenario, base, people)
    names = tuple(client.name for client in people.clients)
    provision.Enrolment.of(out, scenario, people, base).enrol(names)
    return names


def _give_tls(fleet: FaultFleet) -> None:
    authority = Authority.from_pem((fleet.out / provision.AUTHORITY / provision.AUTHORITY_KEY).read_bytes())
    places = [(fleet.device(name), name, TlsRole.DEVICE, ()) for name in fleet.names]
    for folder, name, role, hosts in (*places, (fleet.coordinator, "gateway", TlsRole.GATEWAY, (HOST,))):
        key, now = TlsKey.generate(SystemEntropy()), datetime.now(UTC)
        _, public = read_tls_request(key.request(name))
        serial = int.from_bytes(SystemEntropy().bytes(8), "big") + 1
        dates = {"not_before": now - timedelta(hours=1), "not_after": now + timedelta(days=1)}
        der = authority.issue_tls(name, public, role, hosts, serial=serial, **dates)
        (folder / TLS_KEY).write_bytes(key.pem)
        (folder / TLS_CERTIFICATE).write_bytes(certificates.to_pem(der))
