"""The networks between devices and the gateway: TCP connections that pass through this process, and can be disturbed.

Each device has a link of its own. TLS protects what passes, so that damaged bytes end a connection and change nothing.
"""

import asyncio
import threading
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

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
