"""Peers without credentials connect and say nothing, or half of something, to hold what others need.

They hold the places of the gateway's WebSocket, of the dashboard and of the enrolment service. A certified page, the
health check and a device with an invitation come after them.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from pathlib import Path

import grpc
import pytest
from websockets.exceptions import WebSocketException

from adapters.gateway import frames, websocket
from adapters.gateway import gateway_pb2 as pb
from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError, TrustError
from aggregation.pki import Authority, IdentityKey
from aggregation.pki.requests import request
from aggregation.pki.tls import TlsKey
from coordinator.authority import AuthorityStore
from coordinator.authority.record import AuthorityRecord
from coordinator.gateway import places
from coordinator.gateway import websocket as sockets
from coordinator.gateway.enrolment import THREADS, EnrolmentServer, EnrolmentService, TooManyCallsError
from coordinator.gateway.places import PLACES, REFUSALS, HeldPlace, Places, network_of
from tests.coordinator.gateway.conftest import site_of
from tests.coordinator.gateway.test_enrolment import Invite, enrol, invite, service
from tests.coordinator.gateway.test_websocket import PAGE, Browser, Start, received, start
from tests.support import refused
from tests.support.authority import signer, store
from tests.support.dashboard import TOKEN, dashboard
from tests.support.gateway import HOST, channel

__all__ = ["invite", "service", "signer", "site_of", "start", "store"]
ENTROPY = SystemEntropy()
SILENT = PLACES + 40  # peers at once
WAIT = 20.0  # seconds for what should happen at once, on a machine that has other work
UPGRADE = (
    f"GET {websocket.PATH} HTTP/1.1\r\nHost: {HOST}\r\nOrigin: {PAGE}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
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
    monkeypatch.setattr(sockets, "PROOF", 300.0)
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


def is_let_in(browser: Browser) -> bool:
    try:
        with browser.attending():
            return True
    except (OSError, WebSocketException):
        return False


def port_of(url: str) -> int:
    return int(url.split(":")[2].split("/")[0])


@pytest.mark.parametrize(
    ("sent", "count"), [(UPGRADE, 1000), (b"", SILENT), (UPGRADE[:-2], SILENT)], ids=["websocket", "nothing", "header"]
)
def test_silent_connections_keep_no_certified_page_out(start: Start, fair: bool, sent: bytes, count: int) -> None:
    _, browser = start()
    with silent(port_of(browser("tab").url), sent, count if fair else SILENT):
        assert [is_let_in(browser(f"tab-{number}")) for number in range(4)] == [fair] * 4


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
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, browser = start()
    tab = browser("tab")
    with dashboard(monkeypatch) as view, tab.attending() as connection:
        monkeypatch.setattr(places, "PROOF", 0.1)
        with silent(port_of(tab.url), UPGRADE, 3) as peers, view.connect() as one, view.connect(b"GET /") as other:
            for peer in (*peers, one, other):
                while peer.recv(2**16):  # until the end of the stream
                    pass
        site.ask("tab")
        assert received(connection)


def half_open(channels: Sequence[grpc.Channel], over: threading.Event) -> list[grpc.Future]:
    """Calls whose message does not come, as many as a connection may have."""

    def never() -> Iterator[bytes]:
        over.wait()
        yield b""

    return [each.stream_unary(frames.ENROL).future(never()) for each in channels for _ in range(8)]


def by_itself(service: EnrolmentService) -> grpc.GenericRpcHandler:
    """What holds without the rule: gRPC waits for the message in a thread of the service."""

    def called(raw: bytes, context: grpc.ServicerContext) -> bytes:
        return service.enrol(raw)

    return grpc.method_handlers_generic_handler(
        frames.ENROLMENT, {"Enrol": grpc.unary_unary_rpc_method_handler(called)}
    )


def test_calls_whose_message_does_not_come_keep_no_device_from_enrolling(
    service: EnrolmentServer, invite: Invite, tmp_path: Path, signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, take = threading.Semaphore(0), Places.take
    monkeypatch.setattr(Places, "take", lambda self, *given: taken.release() or take(self, *given))
    over, channels = threading.Event(), [channel(service.port, None, None, signer) for _ in range(4)]
    calls = half_open(channels, over)
    try:
        assert all(taken.acquire(timeout=WAIT) for _ in calls)
        enrol(invite(), tmp_path / "kitchen")
        assert not any(call.done() for call in calls)
    finally:
        over.set()
        for each in channels:
            each.close()


def test_where_grpc_waits_for_the_message_four_such_calls_keep_every_device_out(
    store: AuthorityStore, signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, threads = threading.Semaphore(0), ThreadPoolExecutor(THREADS)
    submit = threads.submit
    monkeypatch.setattr(threads, "submit", lambda *given: taken.release() or submit(*given))
    server = grpc.server(threads)
    server.add_generic_rpc_handlers((by_itself(EnrolmentService(store, signer, 30)),))
    port = server.add_insecure_port(f"{HOST}:0")
    server.start()
    over = threading.Event()
    with grpc.insecure_channel(f"{HOST}:{port}") as held, grpc.insecure_channel(f"{HOST}:{port}") as other:
        calls = half_open([held], over)
        assert all(taken.acquire(timeout=WAIT) for _ in calls)
        with pytest.raises(grpc.RpcError) as caught:
            other.unary_unary(frames.ENROL)(b"", timeout=1)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        over.set()
    server.stop(None).wait()


@pytest.mark.parametrize("first", [True, False], ids=["counted after the proof", "counted before it"])
def test_enrolments_without_an_invitation_do_not_refuse_that_of_the_owner(
    service: EnrolmentServer,
    invite: Invite,
    tmp_path: Path,
    signer: Authority,
    monkeypatch: pytest.MonkeyPatch,
    first: bool,
) -> None:
    def counted(self: EnrolmentService, host: str, certify: Callable[[bytes], bytes], raw: bytes) -> bytes:
        if wait := self._refusals.wait("everybody", time.monotonic()):
            raise TooManyCallsError(wait)
        return certify(raw)

    if not first:
        monkeypatch.setattr(EnrolmentService, "attempt", counted)
    invitation, key = invite(), IdentityKey(bytes(32))
    nobody = pb.EnrolRequest(
        token=bytes(16), request=request(key, "x"), tls_request=TlsKey.generate(ENTROPY).request("x")
    )
    with channel(service.port, None, None, signer) as connection:
        codes = []
        for _ in range(REFUSALS + 16):
            with pytest.raises(grpc.RpcError) as caught:
                connection.unary_unary(frames.ENROL)(nobody.SerializeToString(), timeout=WAIT)
            codes.append(caught.value.code())
    assert codes[0] is grpc.StatusCode.PERMISSION_DENIED
    assert codes[-1] is grpc.StatusCode.RESOURCE_EXHAUSTED
    if first:
        enrol(invitation, tmp_path / "kitchen")
    else:
        with refused(EdgeAdaptError, "enrolment"):
            enrol(invitation, tmp_path / "kitchen")


def test_an_unknown_invitation_is_refused_without_a_look_into_the_record(
    service: EnrolmentServer, invite: Invite, signer: Authority, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    enrol(invite(), tmp_path / "kitchen")
    unknown = invite()._replace(secret=bytes(16))
    with refused(TrustError, "gateway"):
        enrol(unknown, tmp_path / "first")
    monkeypatch.setattr(AuthorityRecord, "_events", None)
    with refused(TrustError, "gateway"):
        enrol(unknown, tmp_path / "second")
