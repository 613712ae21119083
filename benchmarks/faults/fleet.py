"""A small fleet on this machine whose processes are those of the commands: `coordinator up` and `device run`.

Its base is tiny and its devices train with a bundle, so that their processes start fast. Its rounds have noise, so that
each device keeps a privacy ledger, and a session is one round, so that each round has every step of the protocol.
"""

import asyncio
import os
import shutil
import signal
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from aggregation.pki import Authority
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from benchmarks.faults import supernodes
from benchmarks.faults.postgresql import PostgresServer
from benchmarks.faults.processes import HOST, Lines, edgeadapt, free_port, processes_of, wait_until
from benchmarks.gateway.measure import tls_of
from benchmarks.simulation.fleets import population, tiny_base
from coordinator.registry import Registry, leadership
from coordinator.services.deployment import HOME, running
from coordinator.settings import SERVICES, ServiceSettings
from coordinator.statedir import KEY, open_registry
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from edgeadapt.formats.manifest import RoundRecord
from edgeadapt.formats.registryfiles import AUTHORITY, RegistrySettings
from simulations.engine import provision
from simulations.engine.provision import device_base
from simulations.scenario import Scenario

PIECE = 2**16  # bytes


class Damage(Enum):
    """What happens once to the next bytes that a device sends."""

    NONE = "none"
    DUPLICATE = "duplicate"  # they arrive twice
    REORDER = "reorder"  # they arrive after those that follow them
    CUT = "cut"  # half of them arrive, then the connection breaks


@dataclass(slots=True)
class Link:
    """The way of one device to the gateway. Attributes may be set from any thread."""

    port: int = 0  # where the device reaches it
    delay: float = 0.0  # seconds that bytes of the device take
    back: float = 0.0  # seconds that bytes to the device take
    refused: bool = False  # whether connections that begin now are broken off
    damage: Damage = Damage.NONE  # of the next bytes that the device sends
    connections: set["Carried"] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Carried:
    """One connection: the sides of the device and of the gateway. ``dead``: it carries nothing any more."""

    link: Link
    device: asyncio.StreamWriter
    gateway: asyncio.StreamWriter
    dead: bool = False

    async def up(self, reader: asyncio.StreamReader) -> None:
        held = b""
        while piece := await reader.read(PIECE):
            await asyncio.sleep(self.link.delay)
            damage, self.link.damage = self.link.damage, Damage.NONE
            if self.dead:
                continue
            if damage is Damage.CUT:
                self.gateway.write(piece[: len(piece) // 2])
                self.abort()
            elif damage is Damage.REORDER:
                held = piece
            else:
                self.gateway.write(piece + held + (piece if damage is Damage.DUPLICATE else b""))
                held = b""

    async def down(self, reader: asyncio.StreamReader) -> None:
        while piece := await reader.read(PIECE):
            await asyncio.sleep(self.link.back)
            if not self.dead:
                self.device.write(piece)

    def abort(self) -> None:
        for side in (self.device, self.gateway):
            side.transport.abort()


class Network:
    """Links to one gateway, on an event loop in a thread of its own."""

    def __init__(self, host: str, gateway: int, devices: Iterable[str]) -> None:
        """Listen for each device at a port of its own."""
        self._host, self.gateway = host, gateway  # a port, which may be set from any thread
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self._servers = list[asyncio.Server]()
        self.links = {name: self._call(self._listen()) for name in devices}

    async def _listen(self) -> Link:
        link = Link()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._carry(link, reader, writer)

        server = await asyncio.start_server(connected, self._host, 0)
        self._servers.append(server)
        link.port = server.sockets[0].getsockname()[1]
        return link

    async def _carry(self, link: Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if link.refused:
                raise ConnectionRefusedError
            back, gateway = await asyncio.open_connection(self._host, self.gateway)
        except OSError:
            writer.transport.abort()
            return
        connection = Carried(link, writer, gateway)
        link.connections.add(connection)
        ways = [asyncio.ensure_future(connection.up(reader)), asyncio.ensure_future(connection.down(back))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            while connection.dead and not all(way.done() for way in ways):  # a side that does not know of it goes on
                await asyncio.sleep(0.1)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            link.connections.discard(connection)
            connection.abort()

    def cut(self, link: Link) -> None:
        """Break all connections of a link."""
        self._each(link, Carried.abort)

    def silence(self, link: Link) -> None:
        """Let nothing arrive on the connections that are open now, which stay open."""
        self._each(link, lambda connection: setattr(connection, "dead", True))

    def half_close(self, link: Link) -> None:
        """Break the device's side of all connections; the gateway keeps its side, on which nothing arrives."""

        def half(connection: Carried) -> None:
            connection.dead = True
            connection.device.transport.abort()

        self._each(link, half)

    def _each(self, link: Link, do: Any) -> None:
        async def done() -> None:
            for connection in list(link.connections):
                do(connection)

        self._call(done())

    def close(self) -> None:

        async def closed() -> None:
            for server in self._servers:
                server.close()
            for link in self.links.values():
                for connection in list(link.connections):
                    connection.dead = False
                    connection.abort()
            await asyncio.sleep(0.2)

        self._call(closed())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


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
    coordinators: int = 1  # one leads; several have their registry in one PostgreSQL
    superlink: bool = False  # whether Flower's SuperLink runs as well, which then starts the rounds
    supernodes: int = 0  # devices, of all, that are SuperNodes of it, with keys that are registered there


LIGHT = FleetShape()


@dataclass(slots=True)
class CoordinatorMachine:
    """A coordinator's state directory, the networks between devices and its gateway, and its `coordinator up`."""

    folder: Path
    network: Network
    superlink: str = ""  # HOST:PORT
    up: Lines | None = None

    def start(self) -> None:
        self.up = Lines(edgeadapt("coordinator", "up", self.folder))

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
    """The fleet's folder, its processes, and what its records say."""

    out: Path
    names: tuple[str, ...]
    machines: tuple[CoordinatorMachine, ...]
    server: PostgresServer | None = None  # of the registry, where there are several coordinators
    supernodes: tuple[str, ...] = ()  # the other devices are light
    front: Network | None = None  # where SuperNodes reach the SuperLink of the machine that leads
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
        self.agents[name] = Lines(edgeadapt("device", "run", *place), environment)

    def node_key(self, name: str) -> Path:
        return self.out / f"{name}.key"

    def node_home(self, name: str) -> Path:
        return self.out / f"{name}-home"

    def kill_device(self, name: str) -> None:
        """End a device's processes by ``kill -9``."""
        for process in processes_of(self.node_home(name)):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.agents[name].end()

    def keep_supernodes(self) -> None:
        """Start SuperNodes that have ended again, each second, as systemd does, until the fleet is closed. One ends
        when a SuperLink does not let it in: as it is not known there, or was a minute ago under the same key."""
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
    """Make a fleet of 3 devices or more in the new folder ``out``; at the end of the block, end its processes. Several
    coordinators need a PostgreSQL server (``postgresql.missing``)."""
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
    tls = tls_of(authority)
    (out / provision.COORDINATOR / TLS_KEY).write_bytes(tls.key)
    (out / provision.COORDINATOR / TLS_CERTIFICATE).write_bytes(tls.certificate)
