"""The gateway for browsers, over a real WebSocket on loopback: who is let in, what passes, and what is refused."""

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from adapters.gateway import frames, websocket
from adapters.keyfiles import TLS_CERTIFICATE, TLS_KEY
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from aggregation.pki import Authority, IdentityKey
from aggregation.pki.certificates import load
from aggregation.pki.revocation import Revocation
from aggregation.pki.tls import CHALLENGE, TlsRole
from coordinator import traces
from coordinator.gateway.grid import serving
from coordinator.gateway.hub import NoAnswer
from coordinator.gateway.server import GatewayLimits
from coordinator.gateway.websocket import BrowserServer, BrowserSettings
from coordinator.settings import FederationSettings
from coordinator.statedir import CoordinatorStateDir
from tests.coordinator.gateway.conftest import LIMITS, Site
from tests.support import refused
from tests.support.gateway import HOST, certify, server_tls, wait_until
from tests.support.lightdevice import PATIENCE
from tests.support.otlp import attributes, receiving

QUICK = GatewayLimits(grace=0.3)
PAGE = "http://127.0.0.1:8765"
LARGE = bytes(3 * frames.CHUNK + 1)


@dataclass
class Browser:
    """A page's side of the connection."""

    authority: Authority
    url: str
    name: str
    version: str = "1.2.3"
    origin: str | None = PAGE

    def __post_init__(self) -> None:
        now, self.identity = datetime.now(UTC), IdentityKey.generate(SystemEntropy())
        dates = {"not_before": now - timedelta(days=1), "not_after": now + timedelta(days=1)}
        self.certificate = self.authority.issue(self.name, self.identity.public, **dates)

    @contextmanager
    def connected(self, **options: object) -> Iterator[ClientConnection]:
        """A connection that has not answered the challenge."""
        with connect(
            self.url, origin=self.origin, compression=None, max_size=None, proxy=None, **options
        ) as connection:  # type: ignore[arg-type]
            yield connection

    def hello(self, challenge: bytes, host: str = HOST, key: IdentityKey | None = None) -> bytes:
        nonce = websocket.CHALLENGE.decode(challenge).nonce
        signature = (key or self.identity).sign(CHALLENGE, nonce + host.encode())
        return websocket.HELLO.encode(websocket.SocketHello(self.certificate, signature, self.version))

    @contextmanager
    def attending(self) -> Iterator[ClientConnection]:
        with self.connected() as connection:
            connection.send(self.hello(received(connection)))
            assert received(connection) == websocket.ADMITTED
            yield connection


def received(connection: ClientConnection) -> bytes:
    raw = connection.recv(PATIENCE)
    assert isinstance(raw, bytes)
    return raw


def request(connection: ClientConnection) -> websocket.SocketRequest:
    return websocket.REQUEST.decode(received(connection))


def send(connection: ClientConnection, number: int, body: bytes) -> None:
    for message in websocket.answer_messages(number, body):
        connection.send(message)


def ended(connection: ClientConnection) -> tuple[int, str]:
    """Code and reason with which the gateway ends a connection."""
    try:
        while True:
            received(connection)
    except ConnectionClosed as closed:
        return (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")


Start = Callable[..., tuple[Site, Callable[..., Browser]]]


@pytest.fixture
def start(site_of: Callable[..., Site]) -> Iterator[Start]:
    """A gateway with WebSockets on loopback, and devices in browsers."""
    running = []

    def make(limits: GatewayLimits = QUICK, **settings: object) -> tuple[Site, Callable[..., Browser]]:
        site = site_of(limits)
        server = BrowserServer(site.gateway, BrowserSettings(f"{HOST}:0", **settings), server_tls(site.authority))  # type: ignore[arg-type]
        running.append(server)
        return site, lambda name, **changes: Browser(site.authority, server.url, name, **changes)

    yield make
    for server in running:
        server.close()


def test_requests_and_answers_of_any_size_pass_and_a_light_device_is_in_the_same_cohort(start: Start) -> None:
    site, browser = start()
    with browser("tab").attending() as connection:
        phone = site.device("phone").attend()
        assert set(site.gateway.devices()) == {"tab", "phone"}
        for body in (b"body", LARGE):
            number = site.ask("tab", "plan", body)
            asked = request(connection)
            assert (asked.id, asked.step, dict(asked.fields)) == (number, "plan", {"body": body})
            send(connection, asked.id, body[::-1])
            assert site.answered() == (number, body[::-1])
        number = site.ask("tab")
        answer = websocket.SocketAnswer(request(connection).id, 0, 100, b"not me")
        connection.send(websocket.ANSWER.encode(answer))
        assert site.answered() == (number, NoAnswer(100, "not me"))
        site.ask("phone")
        assert phone.request().step == "offer"


def test_a_browser_that_comes_back_in_time_gets_its_request_again(start: Start) -> None:
    site, browser = start(GatewayLimits(grace=600.0))
    tab = browser("tab")
    with tab.attending() as connection:
        number = site.ask("tab")
        assert request(connection).id == number
    with tab.attending() as connection:
        assert request(connection).id == number
        send(connection, number or 0, b"here")
        assert site.answered() == (number, b"here")


def test_a_browser_that_is_gone_is_a_dropout(start: Start) -> None:
    site, browser = start()
    with browser("tab").attending():
        number = site.ask("tab")
    assert site.answered() == (number, NoAnswer(None, "the device disconnected"))
    assert site.gateway.devices() == ()


def test_only_the_key_of_a_certified_device_that_signs_this_host_and_this_nonce_is_let_in(start: Start) -> None:
    site, browser = start()
    tab, other = browser("tab"), browser("other")
    foreign = IdentityKey.generate(SystemEntropy())
    with tab.connected() as connection:
        old = tab.hello(received(connection))
    cases = {
        "another host": lambda challenge: tab.hello(challenge, host="evil.example"),
        "another key": lambda challenge: tab.hello(challenge, key=foreign),
        "a nonce from before": lambda _: old,
        "another device's certificate": lambda challenge: other.hello(challenge, key=tab.identity),
    }
    for what, answer in cases.items():
        with tab.connected() as connection:
            connection.send(answer(received(connection)))
            assert ended(connection)[0] == 1008, what
    assert site.gateway.devices() == ()


def test_a_device_that_is_revoked_is_disconnected_and_not_let_in_again(start: Start) -> None:
    site, browser = start()
    tab, now = browser("tab"), datetime.now(UTC)
    with tab.attending() as connection:
        revoked = {load(tab.certificate).serial_number: Revocation(now)}
        listed = site.authority.revocations(1, revoked, now, now + timedelta(1))
        site.roots.append(site.authority.root.with_revocations(listed.der))
        wait_until(lambda: site.gateway.devices() == ())
        assert ended(connection)[0] == 1008
    with tab.connected() as connection:
        connection.send(tab.hello(received(connection)))
        assert ended(connection) == (1008, "certificate of tab is revoked")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": None}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1.evil.example"}, 403),
        ({"host": "evil.example"}, 421),
        ({"path": "/"}, 404),
    ],
)
def test_a_page_of_another_origin_host_or_path_gets_no_connection(
    start: Start, headers: dict[str, str | None], status: int
) -> None:
    _, browser = start(origins=frozenset({"https://fleet.example"}))
    tab = browser("tab", origin=headers.get("origin", PAGE))
    more = {}
    if "path" in headers:
        tab.url = tab.url.replace(websocket.PATH, str(headers["path"]))
    if "host" in headers:  # as of a page whose host name was made to resolve to this machine
        more = {"sock": socket.create_connection((HOST, int(tab.url.split(":")[2].split("/")[0])))}
        tab.url = tab.url.replace(HOST, str(headers["host"]))
    with pytest.raises(InvalidStatus) as caught, tab.connected(**more):
        pass
    assert caught.value.response.status_code == status
    tab = browser("tab", origin="https://fleet.example")
    with tab.attending():
        pass


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (b"", 1007),
        (b"\xff" * 40, 1007),
        ("text", 1007),
        (bytes(frames.MAX_MESSAGE + 1), 1009),
    ],
    ids=["empty", "noise", "text", "oversized"],
)
@pytest.mark.parametrize("admitted", [False, True])
def test_bytes_that_are_no_message_end_the_connection(
    start: Start, message: bytes | str, code: int, admitted: bool
) -> None:
    site, browser = start()
    tab = browser("tab")
    with tab.attending() if admitted else tab.connected() as connection:
        connection.send(message)
        assert ended(connection)[0] == code
    with tab.attending():
        assert site.gateway.devices() == ("tab",)


@pytest.mark.parametrize("parts", [[b"\0" * 9], [b""], [b"\0" * 4, b""]], ids=["too long", "empty", "empty at last"])
def test_an_answer_that_has_not_the_size_it_began_with_ends_the_connection(start: Start, parts: list[bytes]) -> None:
    site, browser = start()
    with browser("tab").attending() as connection:
        site.ask("tab")
        connection.send(websocket.ANSWER.encode(websocket.SocketAnswer(request(connection).id, 8, 0)))
        for part in parts:
            connection.send(part)
        assert ended(connection)[0] == 1007


def test_an_answer_over_the_limit_or_with_neither_body_nor_reason_is_refused(start: Start) -> None:
    _, browser = start()
    for size, code in ((frames.MAX_ANSWER + 1, 0), (0, 0), (1, 1)):
        with refused(ConfigError, "answer.size" if size > 1 else "answer.reason"):
            websocket.SocketAnswer(1, size, code)
        raw = (1).to_bytes(8, "big") + size.to_bytes(4, "big") + code.to_bytes(2, "big") + bytes(4)
        with browser("tab").attending() as connection:
            connection.send(raw)
            assert ended(connection)[0] == 1007


def test_an_answer_that_stalls_ends_the_connection_and_a_void_one_is_dropped(start: Start) -> None:
    site, browser = start(LIMITS)
    with browser("tab").attending() as connection:
        send(connection, 12345, b"of no request")
        number = site.ask("tab")
        connection.send(websocket.ANSWER.encode(websocket.SocketAnswer(request(connection).id, 8, 0)))
        assert ended(connection) == (1008, "too slow")
    assert site.answered() == (number, NoAnswer(None, "the device disconnected"))


def test_a_device_that_sends_too_much_or_is_too_old_or_too_early_is_sent_away(start: Start) -> None:
    site, browser = start(GatewayLimits(calls=5, grace=0.1, uploading=100, client_version="1.2"))
    with browser("tab").attending() as connection:
        site.ask("tab")
        connection.send(websocket.ANSWER.encode(websocket.SocketAnswer(request(connection).id, 101, 0)))
        assert ended(connection)[0] == 1013
    with browser("busy").attending() as connection:
        with suppress(ConnectionClosed):  # the server may close before the ninth is sent
            for _ in range(9):
                connection.send(websocket.ANSWER.encode(websocket.SocketAnswer(1, 0, 100)))
        assert ended(connection)[0] == 1013
    old = browser("old", version="1.1")
    with old.connected() as connection:
        connection.send(old.hello(received(connection)))
        code, reason = ended(connection)
        assert (code, reason.startswith("edgeadapt 1.1 is older than 1.2")) == (1007, True)


def test_when_the_run_is_over_a_device_gets_its_window(start: Start) -> None:
    site, browser = start(GatewayLimits(accepted=30.0))
    with browser("tab").attending() as connection:
        site.gateway.call(released(site))
        code, reason = ended(connection)
        assert (code, reason.split("-")[1].isdigit()) == (1001, True)
    wait_until(lambda: site.gateway.devices() == ())


async def released(site: Site) -> None:
    site.gateway.service.release()


def test_off_loopback_it_listens_with_the_gateways_certificate(site_of: Callable[..., Site], tmp_path: Path) -> None:
    site = site_of()
    server = BrowserServer(site.gateway, BrowserSettings("0.0.0.0:0"), server_tls(site.authority))
    try:
        port = server.url.split(":")[2].split("/")[0]
        tab = Browser(site.authority, f"wss://{HOST}:{port}{websocket.PATH}", "tab")
        context = ssl.create_default_context(cadata=site.authority.root.to_pem().decode())
        with tab.connected(ssl=context) as connection:
            connection.send(tab.hello(received(connection)))
            assert received(connection) == websocket.ADMITTED
        with pytest.raises(ssl.SSLCertVerificationError), tab.connected(ssl=ssl.create_default_context()):
            pass
    finally:
        server.close()


def test_a_port_in_use_is_refused_in_one_line(start: Start) -> None:
    site, browser = start()
    address = browser("tab").url.split("/")[2]
    with refused(ConfigError, "websocket", value=address):
        BrowserServer(site.gateway, BrowserSettings(address), server_tls(site.authority))


def test_the_settings_of_a_coordinator_say_where_browsers_are_served_and_from_which_pages(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = Authority.create("fleet", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=9))
    given = {"gateway": {"websocket": f"{HOST}:0", "origins": ["https://fleet.example"]}}
    settings = FederationSettings.parse(given, "test")
    state_dir = CoordinatorStateDir.create(tmp_path / "fleet", authority.root.to_pem(), settings, SystemEntropy())
    key, certificate = certify(authority, "gateway", TlsRole.GATEWAY)
    (state_dir.folder / TLS_KEY).write_bytes(key)
    (state_dir.folder / TLS_CERTIFICATE).write_bytes(certificate)
    with serving(state_dir, f"{HOST}:0", own_process=False) as grid:
        assert grid.browsers is not None
        with Browser(authority, grid.browsers.url, "tab", origin="https://fleet.example").attending():
            grid.await_devices(1)
            assert list(grid.get_node_ids()) == [frames.node_of("tab")]
    state_dir.registry.close()


@pytest.mark.parametrize("address", ["9445", "127.0.0.1", "http://127.0.0.1:9445", "a b:1", ":9445"])
def test_what_is_no_address_is_refused_before_anything_runs(address: str) -> None:
    with pytest.raises(ConfigError):
        FederationSettings.parse({"gateway": {"websocket": address}}, "test")


def test_calls_of_browsers_are_spans_of_the_step_and_name_no_device(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, browser = start()
    tab, thief = browser("kitchen-tab"), IdentityKey.generate(SystemEntropy())

    async def served() -> int:
        return sum("protocol_handler" in repr(task.get_coro()) for task in asyncio.all_tasks())

    with receiving() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.url)
        with traces.exporting("edgeadapt-test"):
            with tab.connected() as connection:
                connection.send(tab.hello(received(connection), key=thief))
                assert ended(connection)[0] == 1008
            with tab.connected() as connection:
                received(connection)
                connection.close(1001)
            with tab.connected() as connection:
                received(connection)
                connection.close(4321)
            with tab.attending() as connection:
                assert site.gateway.call(served()) > 0
                with traces.span("plan"):
                    assert site.ask("kitchen-tab") is not None
                send(connection, request(connection).id, b"answer")
                assert site.answered()[1] == b"answer"
            wait_until(lambda: site.gateway.call(served()) == 0)
    unknown, gone, other, admitted, plan, answer = receiver.spans()
    attend = f"{frames.SERVICE}/Attend"
    assert [each.name for each in receiver.spans()] == [*4 * [attend], "plan", f"{frames.SERVICE}/Answer"]
    assert (answer.parent_span_id, answer.trace_id) == (plan.span_id, plan.trace_id)
    assert not admitted.parent_span_id
    assert attributes(admitted) == attributes(answer) == {"edgeadapt.protocol": "WebSocket"}
    assert attributes(gone) == attributes(admitted)
    for failed, code in ((unknown, "POLICY_VIOLATION"), (other, "OTHER")):
        assert attributes(failed) == {"edgeadapt.protocol": "WebSocket", "error.type": code}
    assert b"kitchen" not in b"".join(receiver.bodies)
