"""What peers that have not proved who they are may cost: places for their connections, turns, and a rate of refusals.

Silence costs its sender nothing, so an unproven connection holds one of few places, for a time. When all are taken, a
new connection takes that of the oldest peer of the network that holds most; a peer of a network that holds as many as
any other only one that is ``YOUNG`` seconds old: of devices that all come at once, the first are served. So it takes a
flood of ``PLACES`` connections in ``YOUNG`` seconds, from the own network or from as many others, to keep a peer out.

A process that has no descriptor left can open no file either, and its round is lost. So everything that a peer can make
it hold has a share of them: gRPC's connections half, devices a quarter, other places an eighth.

A network is an IPv4 address or the /64 of an IPv6 address. All peers behind a NAT or a reverse proxy are one network.
Everything runs on one event loop and takes no lock."""

import asyncio
import os
import resource
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Self, TypeAlias

from aggregation.errors import EdgeAdaptError
from coordinator.gateway.pace import FORGET, TokenBucket

PLACES = 512  # connections of an address at which a service listens
YOUNG = 5.0  # seconds that a peer has, if its network does not hold more than that of the next one
REFUSED = 0.02  # seconds that a wrong signature costs its network; one at a time
REFUSALS, REGAINED = 64, 30.0  # refusals of a network in a row, and seconds in which it regains them
DESCRIPTORS = 2**16  # that a process which listens may have, if the system permits
LOOK = 0.25  # seconds between two looks at the connections of gRPC
PROOF = 10.0  # seconds from the first packet to the proof: TLS, HTTP and the first message


def network_of(host: str) -> str:
    """Find the network of a host; a text that is not an address is its own.

    >>> network_of("192.0.2.7"), network_of("2001:db8::1:2:3:4"), network_of("::ffff:192.0.2.7"), network_of("unix")
    ('192.0.2.7', '2001:db8::/64', '192.0.2.7', 'unix')
    """
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        return str(address.ipv4_mapped or ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


def raise_descriptors() -> int:
    """Raise the limit of this process to ``DESCRIPTORS``, or as far as the system permits. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(DESCRIPTORS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(ValueError, OSError):  # macOS has a lower limit, which it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return DESCRIPTORS if soft == resource.RLIM_INFINITY else soft


@dataclass(slots=True, eq=False)
class HeldPlace:
    """``end``: called once, if its time is over or another peer needs the place."""

    network: str
    end: Callable[[], None]
    since: float
    timer: asyncio.TimerHandle = field(init=False)


@dataclass(slots=True)
class Places:
    """The places of an address, each for ``PROOF`` seconds at most."""

    total: int = PLACES
    _held: dict[str, list[HeldPlace]] = field(default_factory=dict)  # by network, oldest first

    def take(self, host: str, end: Callable[[], None]) -> HeldPlace:
        """Take a place. If all are taken another one ends, or this one at once."""
        loop = asyncio.get_running_loop()
        place = HeldPlace(network_of(host), end, loop.time())
        place.timer = loop.call_later(PROOF, self._end, place)
        own = self._held.setdefault(place.network, [])
        own.append(place)
        if sum(map(len, self._held.values())) > self.total:
            fullest = max(self._held.values(), key=len)
            yields = len(fullest) > len(own) or place.since - fullest[0].since >= YOUNG
            self._end(fullest[0] if yields else place)
        return place

    def leave(self, place: HeldPlace) -> None:
        """A second call changes nothing."""
        place.timer.cancel()
        held = self._held.get(place.network, [])
        if place in held:
            held.remove(place)
        if not held:
            self._held.pop(place.network, None)

    def _end(self, place: HeldPlace) -> None:
        self.leave(place)
        place.end()

    @asynccontextmanager
    async def held(self, host: str) -> AsyncIterator[HeldPlace]:
        """Hold a place while the block runs, or until it is left. Raises TimeoutError if the place ends."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as patience:
            place = self.take(host, lambda: patience.reschedule(loop.time()))
            try:
                yield place
            finally:
                self.leave(place)


@dataclass(slots=True)
class Turns:
    """Lets the peers of a network go on one at a time, whichever: an order could keep some from their turn. A wrong
    proof keeps its turn for a while, so that guesses and signature checks have a rate for each network."""

    _waiting: dict[str, list[asyncio.Future[None]]] = field(default_factory=dict)  # by network

    @asynccontextmanager
    async def held(self, host: str) -> AsyncIterator[None]:
        network = network_of(host)
        if network in self._waiting:
            mine = asyncio.get_running_loop().create_future()
            self._waiting[network].append(mine)
            try:
                await mine
            except asyncio.CancelledError:
                if not mine.cancelled():  # the turn came in the same moment
                    self._pass_on(network)
                raise
        else:
            self._waiting[network] = []
        try:
            yield
        finally:
            self._pass_on(network)

    @asynccontextmanager
    async def proving(self, host: str) -> AsyncIterator[None]:
        """Take a turn in which a signature is checked; one that is refused keeps it for ``REFUSED`` seconds."""
        async with self.held(host):
            try:
                yield
            except EdgeAdaptError:
                await asyncio.sleep(REFUSED)
                raise

    def _pass_on(self, network: str) -> None:
        waiting = [each for each in self._waiting.pop(network) if not each.done()]
        if waiting:
            waiting.pop(secrets.randbelow(len(waiting))).set_result(None)
            self._waiting[network] = waiting


class _Peer(socket.socket):
    """``closed`` is called when the connection closes."""

    closed: Callable[[], None]

    def close(self) -> None:
        self.closed()
        super().close()

    def end(self) -> None:
        """End the connection, whatever it is doing: its reader sees the end of the stream."""
        with suppress(OSError):
            self.shutdown(socket.SHUT_RDWR)


class Entrance(socket.socket):
    """A listening socket for an event loop. Each connection holds a place until it is proved, or closes."""

    places: Places
    _peers: dict[tuple[str, int], tuple[_Peer, HeldPlace]]

    @classmethod
    def listening(cls, host: str, port: int) -> Self:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        entrance = cls(fileno=socket.create_server((host, port), family=family).detach())
        entrance.places, entrance._peers = Places(min(PLACES, raise_descriptors() // 8)), {}
        return entrance

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept the next connection, which has a place now. The event loop calls this before TLS."""
        accepted, address = super().accept()
        peer, name = _Peer(fileno=accepted.detach()), address[:2]
        self._peers[name] = peer, self.places.take(address[0], peer.end)
        peer.closed = partial(self._leave, name, peer)
        return peer, address

    def prove(self, address: tuple[str, int]) -> None:
        """Give back the place of the peer at an address: it has proved who it is, and stays."""
        if entry := self._peers.pop(address[:2], None):
            self.places.leave(entry[1])

    def is_proved(self, address: tuple[str, int]) -> bool:
        return address[:2] not in self._peers

    def _leave(self, name: tuple[str, int], peer: _Peer) -> None:
        if self._peers.get(name, (None,))[0] is peer:
            self.prove(name)


Peer: TypeAlias = tuple[str, int]  # network and port


@dataclass(slots=True)
class GrpcConnections:
    """The connections of a port that gRPC has accepted, which it does by itself, past any place.

    They are found among the descriptors of this process. Once it has more than ``room``, a quarter of ``room`` is made
    free: connections whose peer has proved nothing end, of the network that has most, the oldest first. ``port``: of
    the listening socket. ``room``: descriptors, of whatever kind. ``proved``: peers that stay."""

    port: int
    room: int
    proved: set[Peer] = field(default_factory=set)
    _since: dict[Peer, float] = field(default_factory=dict)  # first look that found it

    def look(self, now: float) -> int:
        """Check the descriptors at the time ``now``. Returns how many connections are ended."""
        free = os.open(os.devnull, os.O_RDONLY)  # the lowest number that is free, without a list of all
        os.close(free)
        if max(free, Path("/dev/fd/").stat().st_size) < self.room:  # the size is their count, from Linux 6.2 on
            return 0
        listed = sorted(int(entry.name) for entry in Path("/dev/fd").iterdir())
        if len(listed) <= self.room:
            return 0
        excess = len(listed) - self.room * 3 // 4
        peers = {peer: number for number in listed if (peer := self._peer(number)) and peer not in self.proved}
        self._since = {peer: self._since.get(peer, now) for peer in peers}
        oldest_first = sorted(peers, key=lambda peer: (self._since[peer], peers[peer]))
        later = Counter(network for network, _ in oldest_first)
        ranked = list[tuple[int, int, Peer]]()
        for peer in oldest_first:
            later[peer[0]] -= 1
            ranked.append((-later[peer[0]], len(ranked), peer))
        crowd = [peer for *_, peer in sorted(ranked)[:excess]]
        for peer in crowd:
            self._end(peers[peer], peer)
        return len(crowd)

    def _peer(self, number: int) -> Peer | None:
        """Find the peer of a descriptor. Another thread may close it at any moment, and open something else."""
        try:
            connection = socket.socket(fileno=number)
        except OSError:  # no socket
            return None
        try:
            if connection.getsockname()[1:2] == (self.port,):
                host, port = connection.getpeername()[:2]
                return network_of(host), port
        except OSError:  # no connection
            pass
        finally:
            connection.detach()
        return None

    def _end(self, number: int, peer: Peer) -> None:
        with suppress(OSError):
            copy = os.dup(number)
            try:
                if self._peer(copy) == peer:  # what is checked is what is shut down
                    connection = socket.socket(fileno=copy)
                    connection.shutdown(socket.SHUT_RDWR)
                    connection.detach()
            finally:
                os.close(copy)


@dataclass(slots=True)
class RefusalRates:
    """Limit refusals of a network to ``calls`` in a row, which are regained in ``seconds``."""

    calls: float = REFUSALS
    seconds: float = REGAINED
    _buckets: dict[str, TokenBucket] = field(default_factory=dict)
    _forget: int = FORGET

    def wait(self, host: str, now: float) -> float:
        """Count a refusal at the time ``now``. Returns 0, or the seconds until the network may be wrong again."""
        if len(self._buckets) >= self._forget:
            self._buckets = {each: kept for each, kept in self._buckets.items() if now - kept.at < self.seconds}
            self._forget = max(FORGET, 2 * len(self._buckets))
        return self._buckets.setdefault(network_of(host), TokenBucket(self.calls, self.seconds)).wait(now)
