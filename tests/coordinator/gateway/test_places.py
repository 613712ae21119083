"""Places for peers that have proved nothing: who has one, who loses it, and how often a network may be wrong."""

import asyncio
import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.gateway import places
from coordinator.gateway.pace import FORGET
from coordinator.gateway.places import Entrance, GrpcConnections, Places, RefusalRates, Turns, network_of
from tests.support.gateway import HOST


def ended(total: int, hosts: list[str]) -> list[int]:
    """Peers of these hosts come one after the other; which of them have lost their place then, in order."""
    lost: list[int] = []

    def end_of(number: int) -> Callable[[], None]:
        return lambda: lost.append(number)

    async def come() -> list[int]:
        found = Places(total)
        for number, host in enumerate(hosts):
            found.take(host, end_of(number))
        return lost

    return asyncio.run(come())


def test_the_network_that_holds_most_loses_its_oldest_to_a_peer_of_another_one() -> None:
    assert ended(4, ["a", "b", "a", "a", "b"]) == [0]
    assert ended(4, ["a", "a", "a", "a", "b", "c"]) == [0, 1]
    assert ended(3, ["192.0.2.1", "2001:db8::1", "2001:db8::2", "192.0.2.3"]) == [1]  # one /64


def test_of_peers_that_come_at_once_the_first_ones_keep_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(3, ["a"] * 5) == [3, 4]
    assert ended(3, ["a", "b", "c", "d", "e"]) == [3, 4]
    monkeypatch.setattr(places, "YOUNG", 0.0)  # as if they had come long ago
    assert ended(3, ["a"] * 5) == [0, 1]
    assert ended(3, ["a", "b", "c", "d", "e"]) == [0, 1]


def test_a_place_ends_once_and_not_after_it_was_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "PROOF", 0.0)

    async def held() -> None:
        found, lost = Places(1), list[str]()
        place = found.take("a", lambda: lost.append("a"))
        found.leave(place)
        found.leave(place)
        with pytest.raises(TimeoutError):
            async with found.held("b"):
                await asyncio.Event().wait()
        found.take("c", lambda: lost.append("c"))
        assert lost == []
        assert not any(name in found._held for name in "ab")

    asyncio.run(held())


def test_a_connection_holds_its_place_until_it_is_proved_or_closes() -> None:
    async def listen() -> None:
        loop, stack, proved = asyncio.get_running_loop(), ExitStack(), asyncio.Event()
        with Entrance.listening(HOST, 0) as entrance, stack:
            entrance.setblocking(False)
            entrance.places.total = 1

            async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                if await reader.read(1) == b"p":
                    entrance.prove(writer.get_extra_info("peername"))
                    proved.set()
                    await reader.read()
                writer.close()

            served = await asyncio.start_server(serve, sock=entrance)
            reader, writer = await asyncio.open_connection(HOST, entrance.getsockname()[1])
            peer = writer.get_extra_info("sockname")
            writer.write(b"p")
            await proved.wait()
            assert entrance.is_proved(peer)
            silent, other = await asyncio.open_connection(HOST, entrance.getsockname()[1])
            refused, third = await asyncio.open_connection(HOST, entrance.getsockname()[1])
            assert await refused.read() == b""
            assert not entrance.is_proved(other.get_extra_info("sockname"))
            other.write(b"x")
            assert await silent.read() == b""
            assert entrance.places._held == {}
            assert not reader.at_eof()
            for each in (writer, other, third):
                each.close()
            served.close()
            await served.wait_closed()
        assert loop.is_running()

    asyncio.run(listen())


@pytest.mark.skipif(not Path("/dev/fd/").stat().st_size, reason="this system does not count descriptors")
@pytest.mark.parametrize("hole", [True, False])
def test_a_free_low_descriptor_hides_no_connections(hole: bool) -> None:
    low = os.open(os.devnull, os.O_RDONLY)
    with socket.create_server((HOST, 0)) as server, ExitStack() as stack:
        port = server.getsockname()[1]
        peers = [stack.enter_context(socket.create_connection((HOST, port))) for _ in range(40)]
        for _ in peers:
            stack.enter_context(server.accept()[0])
        held = len(list(Path("/dev/fd").iterdir())) - 1
        if hole:
            os.close(low)
        assert GrpcConnections(port, held + 1).look(0.0) == 0
        assert GrpcConnections(port, held - 20).look(0.0) > 20
        assert peers[0].recv(1) == b""
    if not hole:
        os.close(low)


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
    ],
)
def test_a_network_is_an_address_or_a_64(host: str, network: str) -> None:
    assert network_of(host) == network


def test_a_network_may_be_wrong_so_often_and_old_ones_take_no_memory() -> None:
    rates = RefusalRates(2, 10.0)
    assert [rates.wait("2001:db8::1", 0.0), rates.wait("2001:db8::2", 0.0), rates.wait("192.0.2.1", 0.0)] == [0, 0, 0]
    assert rates.wait("2001:db8::3", 0.0) == 5.0
    for number in range(5 * FORGET):
        rates.wait(f"host-{number}", 20.0 * number)
    assert len(rates._buckets) <= FORGET


def test_a_network_has_one_turn_at_a_time_and_a_peer_that_leaves_passes_it_on() -> None:
    async def come() -> list[str]:
        turns, order = Turns(), list[str]()

        async def peer(name: str, host: str = "a") -> None:
            async with turns.held(host):
                order.append(name)

        async with asyncio.timeout(10):
            async with turns.held("a"):
                waiting = asyncio.create_task(peer("waiting"))
                await peer("elsewhere", "b")
                await asyncio.sleep(0)
                assert order == ["elsewhere"]
            waiting.cancel()  # in the moment in which its turn has come
            await asyncio.gather(waiting, return_exceptions=True)
            await peer("last")
        assert turns._waiting == {}
        return order

    assert asyncio.run(come()) == ["elsewhere", "last"]
