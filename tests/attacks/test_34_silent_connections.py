"""Peers without credentials connect and say nothing, half of something, or what is wrong, to hold what others need.

They hold the places of the gateway, of the dashboard and of the enrolment service. A certified device, the health check
and a device with an invitation come after them.
"""

import asyncio
import queue
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from http.client import HTTPException
from subprocess import PIPE, Popen
from threading import Semaphore
from types import SimpleNamespace

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, IdentityKey
from coordinator.gateway import carriers, places
from coordinator.gateway.carriers import Carrier
from coordinator.gateway.enrolment import THREADS, EnrolmentServer, EnrolmentService, _Certifying, too_many
from coordinator.gateway.hub import Credentials
from coordinator.gateway.pace import TokenBucket
from coordinator.gateway.places import PLACES, REFUSALS, HeldPlace, Places, Turns, network_of
from coordinator.gateway.server import Service
from edgeadapt.authority.record import AuthorityRecord
from edgeadapt.formats.gateway import messages
from tests.coordinator.gateway.conftest import Site, SiteOf, carrier, site, site_of
from tests.coordinator.gateway.test_enrolment import Invite, invite, service
from tests.support.authority import signer, store
from tests.support.dashboard import TOKEN, dashboard
from tests.support.gateway import HOST, wait_until
from tests.support.lightdevice import PAGE, SOCKET, Kind, LightDevice, Talk, talk_of

__all__ = ["carrier", "invite", "service", "signer", "site", "site_of", "store"]
ENTROPY = SystemEntropy()
SILENT = PLACES + 40  # peers at once
FEW = 8  # places, where a peer is a call of gRPC
WAIT = 20.0  # seconds for what should happen at once, on a machine that has other work
OTHER = "127.0.0.2"  # another address of loopback, and so another network
UPGRADE = (
    f"GET {messages.ATTEND} HTTP/1.1\r\nHost: {HOST}\r\nOrigin: {PAGE}\r\nConnection: Upgrade\r\n"
    "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
).encode()


def newest_loses(self: Places, host: str, end: Callable[[], None]) -> HeldPlace:
    """What holds without the rule: who comes first keeps the place, and who comes next is refused."""
    place = HeldPlace(network_of(host), end, 0.0)
    place.timer = asyncio.get_running_loop().call_later(places.PROOF, self._end, place)
    held = self._held.setdefault(place.network, [])
    held.append(place)
    if len(held) > self.total:
        asyncio.get_running_loop().call_soon(self._end, place)
    return place


@pytest.fixture(params=[True, False], ids=["with the rule", "without it"])
def fair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the network that holds most places loses its oldest one; without that, the newest peer is refused."""
    monkeypatch.setattr(places, "PROOF", 300.0)
    monkeypatch.setattr(carriers, "PROOF", 300.0)
    monkeypatch.setattr(places, "YOUNG", 0.0)  # as if the silent peers had been there for a while
    if not request.param:
        monkeypatch.setattr(Places, "take", newest_loses)
    return bool(request.param)


@contextmanager
def silent(port: int, sent: bytes, count: int = SILENT) -> Iterator[list[socket.socket]]:
    """Peers that send this, and nothing more."""
    with ExitStack() as stack:
        peers = []
        for _ in range(count):
            peers.append(stack.enter_context(socket.create_connection((HOST, port), WAIT)))
            peers[-1].sendall(sent)
        yield peers


def port_of(site: Site) -> int:
    return int(site.gateway.url("").split(":")[2])


@pytest.mark.parametrize(
    ("sent", "count"), [(UPGRADE, 1000), (b"", SILENT), (UPGRADE[:-2], SILENT)], ids=["websocket", "nothing", "header"]
)
def test_silent_connections_keep_no_certified_page_out(site_of: SiteOf, fair: bool, sent: bytes, count: int) -> None:
    site = site_of(carrier=SOCKET)
    with silent(port_of(site), sent, count if fair else SILENT):
        assert [site.device(f"tab-{number}").is_let_in() for number in range(4)] == [fair] * 4


def test_silent_calls_keep_no_certified_device_out(
    site_of: SiteOf, fair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carriers, "GrpcCalls", partial(carriers.GrpcCalls, places=Places(FEW)))
    site = site_of()
    peers = [site.device("silent").connect() for _ in range(FEW + 4)]
    for peer in peers[:FEW]:
        assert messages.CHALLENGE.decode(peer.receive())
    assert [site.device(f"device-{number}").is_let_in() for number in range(4)] == [fair] * 4


FLOOD = 1100  # connections: more than the descriptors of the gateway


def is_open(peer: socket.socket) -> bool:
    peer.setblocking(False)
    try:
        return bool(peer.recv(1))
    except BlockingIOError:
        return True
    except OSError:
        return False


GATEWAY = """
import os, sys
from aggregation.pki import Authority
from coordinator.gateway import carriers, server
from edgeadapt.formats.gateway import messages
from tests.support.gateway import HOST, server_tls

if sys.argv[1] == "without it":
    carriers.raise_descriptors = lambda: 2**30
options = {**dict(messages.GATEWAY_OPTIONS), "grpc.server_handshake_timeout_ms": 300_000}
messages.GATEWAY_OPTIONS = tuple(options.items())
authority = Authority.from_pem(b"".join(iter(sys.stdin.buffer.readline, b"\\n")))
gateway = server.Gateway(f"{HOST}:0", server_tls(authority), lambda at: authority.root, print)
print(gateway.port, flush=True)
for _ in sys.stdin:
    try:
        print(len(os.listdir("/dev/fd")), flush=True)
    except OSError as error:
        print(error.strerror, flush=True)
"""


@pytest.mark.parametrize("rule", ["with the rule", "without it"])
def test_idle_connections_leave_descriptors_for_files_and_devices(rule: str) -> None:
    now = datetime.now(UTC)
    authority = Authority.create("fleet", ENTROPY, now - timedelta(days=1), now + timedelta(days=9))
    limited = ["prlimit", "--nofile=512:1024", sys.executable, "-c", GATEWAY, rule]
    with ExitStack() as stack:
        process = stack.enter_context(Popen(limited, stdin=PIPE, stdout=PIPE))
        stack.callback(process.kill)
        assert process.stdin is not None
        assert process.stdout is not None

        def said(line: bytes) -> str:
            process.stdin.write(line + b"\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
            return process.stdout.readline().decode().strip()  # type: ignore[union-attr]

        port = int(said(authority.to_pem()))
        stack.enter_context(silent(port, b"", FLOOD))
        if rule == "without it":
            wait_until(lambda: said(b"") == "Too many open files")
            return
        site = SimpleNamespace(port=port)
        kitchen = LightDevice(site, authority, "kitchen")  # type: ignore[arg-type]
        stack.callback(kitchen.close)
        wait_until(kitchen.is_let_in)
        talk = kitchen.attend()
        for _ in range(3):
            with silent(port, b"", FLOOD) as peers:
                wait_until(lambda peers=peers: sum(map(is_open, peers)) <= 1024 * 3 // 8)  # type: ignore[misc]
                assert int(said(b"")) <= 1024 * 5 // 8
        assert talk.is_quiet()


def test_silent_connections_do_not_block_the_dashboard_and_its_health_check(
    fair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_served(path: str) -> bool:
        try:
            return bool(site.ask(path, authorization=f"Bearer {TOKEN}")[0] == 200)
        except (OSError, HTTPException):
            return False

    with dashboard(monkeypatch) as site, silent(site.port, b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n"):
        assert [is_served(path) for path in ("/health", "/view.json", "/login")] == [fair] * 3


def test_a_peer_that_proves_nothing_in_time_is_cut_off_and_one_that_has_stays(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = site.device("kitchen").attend()
    with dashboard(monkeypatch) as view:
        monkeypatch.setattr(places, "PROOF", 0.1)
        with silent(port_of(site), UPGRADE, 3) as peers, view.connect() as one, view.connect(b"GET /") as other:
            for peer in (*peers, one, other):
                while peer.recv(2**16):  # until the end of the stream
                    pass
        assert site.device("silent").connect().ended().kind is Kind.LATER
        site.ask("kitchen")
        assert talk.request()


@pytest.mark.parametrize("in_turns", [True, False], ids=["in turns", "at once"])
def test_wrong_signatures_of_a_network_are_checked_one_at_a_time_and_a_device_elsewhere_does_not_wait(
    site: Site, monkeypatch: pytest.MonkeyPatch, in_turns: bool
) -> None:
    genuine, checked = Service._verified, Semaphore(0)

    def counted(self: Service, *given: object) -> Credentials:
        checked.release()
        return genuine(self, *given)  # type: ignore[arg-type]

    class NoTurns(Turns):
        def proving(self, host: str) -> object:  # type: ignore[override]
            return asyncio.timeout(None)

    monkeypatch.setattr(Service, "_verified", counted)
    monkeypatch.setattr(places, "REFUSED", 300.0)
    if not in_turns:
        site.gateway.service._turns = NoTurns()
    device, peers = site.device("kitchen"), list[Talk]()
    for _ in range(FEW):
        peers.append(device.connect())
        peers[-1].send(device.hello(peers[-1].receive(), key=IdentityKey.generate(ENTROPY)))
    if in_turns:
        assert checked.acquire(timeout=WAIT)
        elsewhere = site.device("tab", carrier=SOCKET).attend(source_address=(OTHER, 0))
        assert checked.acquire(timeout=WAIT)  # its own
        assert not checked.acquire(blocking=False)
        assert all(peer.is_quiet() for peer in peers)
        elsewhere.close()
    else:
        assert {peer.ended().kind for peer in peers} == {Kind.REFUSED}
        assert all(checked.acquire(blocking=False) for _ in peers)


async def in_a_thread(self: _Certifying, carrier: Carrier) -> None:
    """What holds without the rule: a thread of the service waits for the message, as gRPC's own threads do."""
    loop = asyncio.get_running_loop()

    def called() -> bytes:
        raw = asyncio.run_coroutine_threadsafe(carrier.receive(), loop).result()  # type: ignore[arg-type,var-annotated]
        return self.service.attempt(carrier.host, self.certify, raw)

    await carrier.send(await loop.run_in_executor(self.threads, called))


@pytest.mark.parametrize("on_the_loop", [True, False], ids=["on the loop", "in threads"])
def test_calls_whose_message_does_not_come_keep_no_device_from_enrolling(
    service: EnrolmentServer, invite: Invite, monkeypatch: pytest.MonkeyPatch, on_the_loop: bool
) -> None:
    taken, take = Semaphore(0), Places.take
    monkeypatch.setattr(Places, "take", lambda self, *given: taken.release() or take(self, *given))
    if not on_the_loop:
        monkeypatch.setattr(_Certifying, "__call__", in_a_thread)
    kitchen = invite()
    given = kitchen.carrier, service, messages.ENROL, kitchen.authority
    peers = [talk_of(*given) for _ in range(4 * THREADS)]  # type: ignore[arg-type]
    assert all(taken.acquire(timeout=WAIT) for _ in peers)
    talk = talk_of(*given)  # type: ignore[arg-type]
    talk.send(kitchen.enrolment())
    if on_the_loop:
        assert talk.receive(WAIT)
        assert all(peer.is_quiet() for peer in peers)
    else:
        with pytest.raises(queue.Empty):
            talk.receive(1.0)
    for peer in (*peers, talk):
        peer.close()
    wait_until(lambda: not service._sockets.connections)  # type: ignore[union-attr]


@pytest.mark.parametrize("first", [True, False], ids=["counted after the proof", "counted before it"])
def test_enrolments_without_an_invitation_do_not_refuse_that_of_the_owner(
    invite: Invite, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    def counted(self: EnrolmentService, host: str, certify: Callable[[bytes], bytes], raw: bytes) -> bytes:
        if wait := self._refusals.wait("everybody", time.monotonic()):
            raise too_many(wait)
        return certify(raw)

    if not first:
        monkeypatch.setattr(EnrolmentService, "attempt", counted)
    monkeypatch.setattr(places, "REFUSED", 0.0)
    wait = TokenBucket.wait  # nothing is regained, however slow the machine
    monkeypatch.setattr(TokenBucket, "wait", lambda self, now: wait(self, self.at or now))
    kitchen = invite()
    nobody = replace(kitchen, invitation=kitchen.invitation._replace(secret=bytes(16)))
    kinds = [nobody.kind(nobody.enrolment()) for _ in range(REFUSALS + 16)]
    assert (kinds[0], kinds[-1]) == (Kind.REFUSED, Kind.LATER)
    assert kitchen.kind(kitchen.enrolment()) is (Kind.DONE if first else Kind.LATER)


def test_an_unknown_invitation_is_refused_without_a_look_into_the_record(
    invite: Invite, monkeypatch: pytest.MonkeyPatch
) -> None:
    kitchen, nobody = invite(), invite("nobody")
    nobody = replace(nobody, invitation=nobody.invitation._replace(secret=bytes(16)))
    kitchen.enrolled()
    assert nobody.kind(nobody.enrolment()) is Kind.REFUSED
    monkeypatch.setattr(AuthorityRecord, "_events", None)
    assert nobody.kind(nobody.enrolment()) is Kind.REFUSED
