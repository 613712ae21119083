"""A small fleet on this machine whose processes are those of the commands: `coordinator up` and `device agent`.

Its base is tiny and its devices train with a bundle, so that their processes start fast. Its rounds have noise, so that
each device keeps a privacy ledger, and a session is one round, so that each round has every step of the protocol.
"""

import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, certificates
from aggregation.pki.identity import IdentityKey
from aggregation.pki.tls import TlsKey, read_tls_request
from aggregation.steps import Step
from benchmarks.faults import supernodes
from benchmarks.faults.network import Network
from benchmarks.faults.postgresql import PostgresServer
from benchmarks.faults.processes import HOST, Lines, edgeadapt, free_port, processes_of, wait_until
from benchmarks.simulation.fleets import population, tiny_base
from coordinator.registry import Registry, leadership
from coordinator.services.deployment import HOME, running
from coordinator.settings import SERVICES, ServiceSettings
from coordinator.statedir import AUTHORITY, KEY, open_registry
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.registryfiles import RegistrySettings
from edgeadapt.formats.roundrecord import RoundRecord
from simulations.engine import provision
from simulations.engine.provision import device_base
from simulations.scenario import Scenario

PASSWORD = "PGPASSWORD"  # noqa: S105  # variable of the environment in which PostgreSQL's programs look for it
FEDERATION = {
    "rounds": 10_000,
    "deadline": 60.0,
    "aggregation": {"session_rounds": 1},
    "gateway": {"client_version": "0.0.2"},
    "privacy": {"mechanism": "skellam", "noise_multiplier": 1.0},
}
SLOW = {"deadline": 120.0}  # a SuperNode starts a process for each step
SUPERNODES = "supernodes"  # their link
SERVICES_OF_A_TEST = {"stop": 20.0, "pause": 4.0, "look": 1.0}  # seconds, of a small fleet: `up` is less patient


@dataclass(frozen=True, slots=True)
class FleetShape:
    """What a fleet has.

    Attributes:
        coordinators: One leads, and the others wait; several have their registry in one PostgreSQL.
        superlink: Whether Flower's SuperLink runs as well, which then starts the rounds.
        supernodes: Devices, of all, that are SuperNodes of it, with keys that are registered there.
    """

    coordinators: int = 1
    superlink: bool = False
    supernodes: int = 0


LIGHT = FleetShape()


@dataclass(slots=True)
class CoordinatorMachine:
    """A coordinator's state directory, the networks between devices and its gateway, and its `coordinator up`."""

    folder: Path
    network: Network
    superlink: str = ""  # HOST:PORT
    up: Lines | None = None

    def start(self) -> None:
        self.up = Lines(edgeadapt("coordinator", "up", self.folder, "--json"))

    def stop(self) -> None:
        if self.up is not None:
            self.up.end(signal.SIGTERM)
            self.up = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process: to the services first, so that none of them is asked to end."""
        listed = (running(self.folder) or {"services": []})["services"]
        services = {each["pid"] for each in listed if each["pid"]} | {*processes_of(self.folder.resolve() / HOME)}
        for process in (*services, *([self.up.process.pid] if self.up else ())):
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def kill(self) -> None:
        """End every process by ``kill -9``."""
        self.signal(signal.SIGKILL)
        if self.up is not None:
            self.up.end()
            self.up = None

    def is_ready(self, service: str) -> bool:
        """Whether a service does its work."""
        listed = (running(self.folder) or {"services": []})["services"]
        return any((each["name"], each["state"]) == (service, "ready") for each in listed)

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

    Attributes:
        server: Has the registry, where there are several coordinators.
        supernodes: The devices that are SuperNodes; the others are light.
        front: The address at which SuperNodes reach the SuperLink of the machine that leads, as a virtual one does.
    """

    out: Path
    names: tuple[str, ...]
    machines: tuple[CoordinatorMachine, ...]
    server: PostgresServer | None = None
    supernodes: tuple[str, ...] = ()
    front: Network | None = None
    closing: threading.Event = field(default_factory=threading.Event)
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
        return provision.device_folder(self.out, name)

    def start(self) -> None:
        """Start every ``coordinator up``; of several, the first one leads. Raises ``Late``."""
        self.first.start()
        if others := self.machines[1:]:
            wait_until(lambda: self.leading()[1] is self.first, "the first coordinator leads")
        for machine in others:
            machine.start()

    def stop(self) -> None:
        for machine in self.machines:
            machine.stop()

    def attend(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        """Start a device's agent, or its SuperNode."""
        if name in self.supernodes:
            address = f"{HOST}:{self.front.links[SUPERNODES].port}" if self.front else self.first.superlink
            root = self.first.folder / AUTHORITY
            command = supernodes.command(address, root, self.node_key(name), self.device(name))
            self.agents[name] = Lines(command, supernodes.environment(self.node_home(name)))
            return
        gateways = ",".join(f"{HOST}:{machine.network.links[name].port}" for machine in self.machines)
        place = ("--state", self.device(name), "--gateway", gateways)
        self.agents[name] = Lines(edgeadapt("device", "agent", *place), environment)

    def node_key(self, name: str) -> Path:
        return self.out / f"{name}.key"

    def node_home(self, name: str) -> Path:
        """Flower's own folder of a SuperNode."""
        return self.out / f"{name}-home"

    def kill_device(self, name: str) -> None:
        """End a device's processes by ``kill -9``."""
        for process in processes_of(self.node_home(name)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.agents[name].end()

    def keep_supernodes(self) -> None:
        """Start SuperNodes that have ended again, each second, as systemd does, until the fleet is closed.

        One ends when a SuperLink does not let it in: as it is not known there, or was a minute ago under the same key.
        """
        while not self.closing.wait(1.0):
            for name in self.supernodes:
                if name in self.agents and self.agents[name].process.poll() is not None:
                    self.attend(name)

    def await_step(self, name: str, step: Step) -> None:
        """Wait until a device has got the next message of a step, and has not answered yet. Raises ``Late``."""
        agent, light = self.agents[name], f"answering {step.value}"
        agent.next(f"Receiving: {step.message_type} " if name in self.supernodes else light, since=len(agent.lines))

    def close(self) -> None:
        self.closing.set()
        for name in self.agents:
            self.kill_device(name)
        for machine in self.machines:
            if machine.up is not None:
                machine.signal(signal.SIGCONT)
                machine.stop()
            machine.network.close()
        if self.front is not None:
            self.front.close()

    def lead_supernodes_to(self, machine: CoordinatorMachine) -> None:
        """Let the address of the SuperLink be that of another machine."""
        if self.front is not None:
            self.front.gateway = int(machine.superlink.rpartition(":")[2])
            self.front.cut(self.front.links[SUPERNODES])

    def records(self) -> tuple[RoundRecord, ...]:
        with self._registry() as registry:
            return registry.rounds()

    def leading(self) -> tuple[int, CoordinatorMachine]:
        """The epoch, and the machine that leads, once one does. Raises ``Late``."""
        with self._registry() as registry:
            while (found := leadership(registry.engine)) is None or not found.in_force:
                wait_until(lambda: _in_force(registry), "a coordinator that leads")
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
        return IdentityKey.from_pem((self.first.folder / KEY).read_bytes())

    def await_version(self, after: int, what: str) -> int:
        """Wait until a round after so many has made a version; how many rounds there are then. Raises ``Late``."""

        def made() -> bool:
            return any(record.version is not None for record in self.records()[after:])

        wait_until(made, what)
        return len(self.records())


def _in_force(registry: Registry) -> bool:
    found = leadership(registry.engine)
    return found is not None and found.in_force


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
        names = _provision(out, devices, stores, SLOW if shape.supernodes else {})
        _give_tls(out)
        folder = out / provision.COORDINATOR
        copies = [out / f"{provision.COORDINATOR}-{number}" for number in range(2, shape.coordinators + 1)]
        for copy in copies:
            shutil.copytree(folder, copy)
        machines = [_machine(each, names, shape) for each in (folder, *copies)]
        fleet = FaultFleet(out, names, tuple(machines), server, names[: shape.supernodes])
        if shape.supernodes and copies:
            fleet.front = Network(HOST, int(fleet.first.superlink.rpartition(":")[2]), (SUPERNODES,))
        stack.callback(fleet.close)
        _register(fleet)
        keeper = threading.Thread(target=fleet.keep_supernodes, daemon=True)
        keeper.start()
        stack.callback(keeper.join)
        stack.callback(fleet.closing.set)
        yield fleet


def _register(fleet: FaultFleet) -> None:
    """Make a key for each SuperNode, and register it at every SuperLink."""
    keys = [supernodes.write_key(fleet.node_key(name)) for name in fleet.supernodes]
    for machine in fleet.machines if keys else ():
        machine.start()
        wait_until(lambda: machine.is_ready("superlink"), "a SuperLink that answers")  # noqa: B023
        for key in keys:
            supernodes.register(key, machine.superlink, machine.folder / AUTHORITY)
        machine.stop()


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
    superlink = f"{HOST}:{free_port()}" if shape.superlink else ""
    settings |= {"superlink": superlink} if superlink else {}
    (folder / SERVICES).write_text(ServiceSettings(**settings).to_toml(), encoding="utf-8")
    return CoordinatorMachine(folder, Network(HOST, port, names), superlink)


def _provision(
    out: Path, devices: int, stores: RegistrySettings | None, federation: Mapping[str, Any]
) -> tuple[str, ...]:
    base, people = tiny_base(out / "base"), population(devices)
    scenario = Scenario.parse(
        {
            "base": {"model": str(base.folder), "engine": "onnx"},
            "adapter": {"rank": 2},
            "federation": {**FEDERATION, **federation},
        },
        "bench faults",
    )
    provision.provision(out, scenario, people, base, stores)
    device_base(out, scenario, base, people)
    names = tuple(client.name for client in people.clients)
    provision.Enrolment.of(out, scenario, people, base).enrol(names)
    return names


def _give_tls(out: Path) -> None:
    authority = Authority.from_pem((out / provision.AUTHORITY / provision.AUTHORITY_KEY).read_bytes())
    folder, key, now = out / provision.COORDINATOR, TlsKey.generate(SystemEntropy()), datetime.now(UTC)
    _, public = read_tls_request(key.request("gateway"))
    dates = {"not_before": now - timedelta(hours=1), "not_after": now + timedelta(days=1)}
    der = authority.issue_tls("gateway", public, (HOST,), serial=1, **dates)
    (folder / TLS_KEY).write_bytes(key.pem)
    (folder / TLS_CERTIFICATE).write_bytes(certificates.to_pem(der))
