"""A small fleet on this machine whose processes are those of the commands: `coordinator up` and `device agent`.

Its base is tiny and its devices train with a bundle, so that their processes start fast. Its rounds have noise, so that
each device keeps a privacy ledger, and a session is one round, so that each round has every step of the protocol.
"""

import os
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from adapters.keyfiles import TLS_CERTIFICATE, TLS_KEY
from adapters.registryfiles import RegistrySettings
from adapters.roundrecord import RoundRecord
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, certificates
from aggregation.pki.identity import IdentityKey
from aggregation.pki.tls import TlsKey, TlsRole, read_tls_request
from coordinator.registry import Registry, leadership
from coordinator.services.deployment import running
from coordinator.servicesettings import SERVICES, ServiceSettings
from coordinator.statedir import KEY, open_registry
from simulations.benchmarks.faults.network import Network
from simulations.benchmarks.faults.postgresql import PostgresServer
from simulations.benchmarks.faults.processes import HOST, Lines, free_port, wait_until
from simulations.benchmarks.simulation.fleets import population, tiny_base
from simulations.engine import provision
from simulations.engine.bases import device_base
from simulations.scenario import Scenario

PASSWORD = "PGPASSWORD"  # noqa: S105  # variable of the environment in which PostgreSQL's programs look for it
FEDERATION = {
    "rounds": 10_000,
    "deadline": 60.0,
    "aggregation": {"session_rounds": 1},
    "gateway": {"client_version": "0.0.2"},
    "privacy": {"mechanism": "skellam", "noise_multiplier": 1.0},
}
SERVICES_OF_A_TEST = {"stop": 20.0, "pause": 4.0, "look": 1.0}  # seconds, of a small fleet: `up` is less patient


@dataclass(frozen=True, slots=True)
class FleetShape:
    """What a fleet has.

    Attributes:
        coordinators: One leads, and the others wait; several have their registry in one PostgreSQL.
        superlink: Whether Flower's SuperLink runs as well, which then starts the rounds.
    """

    coordinators: int = 1
    superlink: bool = False


LIGHT = FleetShape()


@dataclass(slots=True)
class CoordinatorMachine:
    """A coordinator's state directory, the networks between devices and its gateway, and its `coordinator up`."""

    folder: Path
    network: Network
    up: Lines | None = None

    def start(self) -> None:
        """Start ``coordinator up``."""
        self.up = Lines("coordinator", "up", self.folder, "--json")

    def stop(self) -> None:
        """End ``coordinator up`` in order."""
        if self.up is not None:
            self.up.end(signal.SIGTERM)
            self.up = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process: to the services first, so that none of them is asked to end."""
        listed = (running(self.folder) or {"services": []})["services"]
        for process in (*(each["pid"] for each in listed if each["pid"]), *([self.up.process.pid] if self.up else ())):
            os.kill(process, number)

    def kill(self) -> None:
        """End every process by ``kill -9``."""
        self.signal(signal.SIGKILL)
        if self.up is not None:
            self.up.end()
            self.up = None

    def pid(self, service: str) -> int:
        """The process of a service, once there is one. Raises ``Late``."""

        def found() -> int:
            listed = (running(self.folder) or {"services": []})["services"]
            return next((each["pid"] or 0 for each in listed if each["name"] == service), 0)

        wait_until(found, f"a process of {service}")
        return found()


@dataclass(slots=True)
class FaultFleet:
    """The fleet's folder, its processes, and what its records say.

    ``server``: has the registry, where there are several coordinators.
    """

    out: Path
    names: tuple[str, ...]
    machines: tuple[CoordinatorMachine, ...]
    server: PostgresServer | None = None
    agents: dict[str, Lines] = field(default_factory=dict)

    @property
    def first(self) -> CoordinatorMachine:
        """The machine of the only coordinator, or of the first one."""
        return self.machines[0]

    @property
    def database(self) -> PostgresServer:
        """The server that has the registry. Raises AssertionError: the only coordinator has it itself."""
        if self.server is None:
            raise AssertionError
        return self.server

    def device(self, name: str) -> Path:
        """A device's state directory."""
        return provision.device_folder(self.out, name)

    def start(self) -> None:
        """Start every ``coordinator up``."""
        for machine in self.machines:
            machine.start()

    def stop(self) -> None:
        """End every ``coordinator up`` in order."""
        for machine in self.machines:
            machine.stop()

    def attend(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a device's agent."""
        gateways = ",".join(f"{HOST}:{machine.network.links[name].port}" for machine in self.machines)
        place = ("--state", self.device(name), "--gateway", gateways)
        self.agents[name] = Lines("device", "agent", *place, environment=environment)

    def close(self) -> None:
        """End every process."""
        for agent in self.agents.values():
            agent.end()
        for machine in self.machines:
            if machine.up is not None:
                machine.signal(signal.SIGCONT)
                machine.stop()
            machine.network.close()

    def records(self) -> tuple[RoundRecord, ...]:
        """Of all rounds so far."""
        with self._registry() as registry:
            return registry.rounds()

    def leading(self) -> tuple[int, CoordinatorMachine]:
        """The epoch, and the machine that leads, or did last. Raises ``Late``: none did."""
        with self._registry() as registry:
            wait_until(lambda: leadership(registry.engine), "a coordinator that leads")
            found = leadership(registry.engine)
        if found is None:
            raise AssertionError
        (machine,) = (each for each in self.machines if found.leader.endswith(f":{each.folder.resolve()}"))
        return found.epoch, machine

    @contextmanager
    def _registry(self) -> Iterator[Registry]:
        registry = open_registry(self.first.folder, self.key)
        try:
            yield registry
        finally:
            registry.close()

    @property
    def key(self) -> IdentityKey:
        """With which the coordinator signs."""
        return IdentityKey.from_pem((self.first.folder / KEY).read_bytes())

    def await_version(self, after: int, what: str) -> int:
        """Wait until a round after so many has made a version; how many rounds there are then. Raises ``Late``."""

        def made() -> bool:
            return any(record.version is not None for record in self.records()[after:])

        wait_until(made, what)
        return len(self.records())


@contextmanager
def running_fleet(out: Path, devices: int, shape: FleetShape = LIGHT) -> Iterator[FaultFleet]:
    """Make a fleet in the folder ``out``; at the end of the block, end its processes.

    Args:
        out: Does not exist.
        devices: Their number, 3 or more.
        shape: What else it has. Several coordinators need a PostgreSQL server (``postgresql.missing``).
    """
    with ExitStack() as stack:
        server = stack.enter_context(_server()) if shape.coordinators > 1 else None
        stores = (
            None
            if server is None
            else RegistrySettings(database=server.url(server.database()), blobs=str(out / "blobs"))
        )
        names = _provision(out, devices, stores)
        _give_tls(out, names)
        folder = out / provision.COORDINATOR
        copies = [out / f"{provision.COORDINATOR}-{number}" for number in range(2, shape.coordinators + 1)]
        for copy in copies:
            shutil.copytree(folder, copy)
        machines = [_machine(each, names, shape) for each in (folder, *copies)]
        fleet = FaultFleet(out, names, tuple(machines), server)
        stack.callback(fleet.close)
        yield fleet


@contextmanager
def _server() -> Iterator[PostgresServer]:
    """A PostgreSQL server whose password is in the environment of this process, and of those that it starts."""
    server, before = PostgresServer.create(), os.environ.get(PASSWORD)
    os.environ[PASSWORD] = server.password
    try:
        yield server
    finally:
        server.remove()
        del os.environ[PASSWORD]
        if before is not None:
            os.environ[PASSWORD] = before


def _machine(folder: Path, names: tuple[str, ...], shape: FleetShape) -> CoordinatorMachine:
    port = free_port()
    settings: dict[str, Any] = {"gateway": f"{HOST}:{port}", **SERVICES_OF_A_TEST}
    settings |= {"superlink": f"{HOST}:{free_port()}"} if shape.superlink else {}
    (folder / SERVICES).write_text(ServiceSettings(**settings).to_toml(), encoding="utf-8")
    return CoordinatorMachine(folder, Network(HOST, port, names))


def _provision(out: Path, devices: int, stores: RegistrySettings | None) -> tuple[str, ...]:
    base, people = tiny_base(out / "base"), population(devices)
    scenario = Scenario.parse(
        {"base": {"model": str(base.folder), "engine": "onnx"}, "adapter": {"rank": 2}, "federation": FEDERATION},
        "bench faults",
    )
    provision.provision(out, scenario, people, base, stores)
    device_base(out, scenario, base, people)
    names = tuple(client.name for client in people.clients)
    provision.Enrolment.of(out, scenario, people, base).enrol(names)
    return names


def _give_tls(out: Path, names: tuple[str, ...]) -> None:
    authority = Authority.from_pem((out / provision.AUTHORITY / provision.AUTHORITY_KEY).read_bytes())
    places = [(provision.device_folder(out, name), name, TlsRole.DEVICE, ()) for name in names]
    for folder, name, role, hosts in (*places, (out / provision.COORDINATOR, "gateway", TlsRole.GATEWAY, (HOST,))):
        key, now = TlsKey.generate(SystemEntropy()), datetime.now(UTC)
        _, public = read_tls_request(key.request(name))
        serial = int.from_bytes(SystemEntropy().bytes(8), "big") + 1
        dates = {"not_before": now - timedelta(hours=1), "not_after": now + timedelta(days=1)}
        der = authority.issue_tls(name, public, role, hosts, serial=serial, **dates)
        (folder / TLS_KEY).write_bytes(key.pem)
        (folder / TLS_CERTIFICATE).write_bytes(certificates.to_pem(der))
