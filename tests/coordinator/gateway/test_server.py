"""Conversations with the gateway over both carriers, with real TLS and WebSockets: what passes, and what is refused."""

import socket
import ssl
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from websockets.exceptions import InvalidStatus

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki import Authority, IdentityKey
from client.gateway.calls import conversation
from coordinator.gateway.carriers import BrowserSettings
from coordinator.gateway.grid import serving
from coordinator.gateway.hub import WAITING, NoAnswer
from coordinator.gateway.server import Gateway
from coordinator.settings import FederationSettings, GatewaySettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.gateway.messages import DeviceAnswer, RetryWindow
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from tests.coordinator.gateway.conftest import LIMITS, Site, SiteOf
from tests.support import refused
from tests.support.gateway import HOST, certify, server_tls, wait_until
from tests.support.lightdevice import CARRIERS, SOCKET, Kind, LightDevice, SocketTalk

LARGE = bytes(range(256)) * 4096 + b"."


def test_requests_and_answers_of_any_size_pass_and_both_carriers_are_in_one_cohort(site_of: SiteOf) -> None:
    site = site_of()
    talks = {carrier: site.device(carrier, carrier=carrier).attend() for carrier in CARRIERS}
    assert set(site.gateway.devices()) == set(talks)
    for name, talk in talks.items():
        for body in (b"body", LARGE):
            number = site.ask(name, "plan", body)
            asked = talk.request()
            assert (asked.id, asked.step, asked.fields) == (number, "plan", {"body": body})
            talk.answer(asked.id, body[::-1])
            assert site.answered() == (number, body[::-1])
        number = site.ask(name)
        talk.send(messages.reason_message(talk.request().id, 100, "not me"))
        assert site.answered() == (number, NoAnswer(100, "not me"))


def test_requests_of_one_device_go_one_at_a_time_and_no_more_than_a_few_wait(site: Site) -> None:
    talk = site.device("kitchen").attend()
    numbers = [site.ask("kitchen", body=bytes([n])) for n in range(WAITING + 1)]
    assert numbers[-1] is None
    assert None not in numbers[:-1]
    for n in range(WAITING):
        asked = talk.request()
        assert asked.fields["body"] == bytes([n])
        assert talk.is_quiet()
        talk.answer(asked.id, b"answer")
    assert site.ask("garage") is None  # nobody there


def test_an_answer_counts_once_in_time_and_to_the_request_of_its_device(site: Site) -> None:
    talks = [site.device(name).attend() for name in ("kitchen", "garage")]
    number = site.ask("kitchen")
    assert talks[0].request().id == number
    talks[1].answer(number, b"another device's")
    talks[0].answer(12345, b"of no request")
    talks[0].answer(number, b"answer")
    talks[0].answer(number, b"once more")
    assert site.answered() == (number, b"answer")
    late = site.ask("kitchen", seconds=0.1)
    assert talks[0].request().id == late
    assert site.answered() == (late, NoAnswer(None, "did not answer in time"))
    talks[0].answer(late, b"late")
    for name, talk in zip(("kitchen", "garage"), talks, strict=True):  # what was dropped has ended nothing
        number = site.ask(name)
        talk.answer(talk.request().id, b"next")
        assert site.answered() == (number, b"next")


def test_a_device_whose_stream_broke_gets_the_request_again_and_one_that_stays_away_has_no_answer(site: Site) -> None:
    kitchen = site.device("kitchen")
    talk = kitchen.attend()
    number = site.ask("kitchen")
    assert talk.request().id == number
    talk.close()
    talk = kitchen.attend()
    assert talk.request().id == number
    talk.answer(number, b"answer")
    assert site.answered() == (number, b"answer")
    number = site.ask("kitchen")
    talk.close()
    assert site.answered() == (number, NoAnswer(None, "the device disconnected"))
    assert site.ask("kitchen") is None
    assert site.gateway.devices() == ()


def test_a_newer_stream_of_a_device_ends_the_older_one(site_of: SiteOf) -> None:
    site = site_of()
    kitchen = site.device("kitchen")
    older = kitchen.attend()
    kitchen.carrier = SOCKET
    newer = kitchen.attend()
    assert older.ended().kind is Kind.INVALID
    number = site.ask("kitchen")
    assert newer.request().id == number


def test_a_health_check_is_answered(site_of: SiteOf) -> None:
    site = site_of()
    credentials = grpc.ssl_channel_credentials(site.authority.root.to_pem())
    with grpc.secure_channel(f"{HOST}:{site.gateway.port}", credentials) as channel:
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10) == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(f"/{messages.SERVICE}/nothing")(b"", timeout=10)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_a_port_in_use_or_a_wrong_key_is_refused(site_of: SiteOf) -> None:
    site = site_of()
    tls, free = server_tls(site.authority), f"{HOST}:0"
    pages = site.gateway.url("").split("/")[2]
    for address, given, browsers, about in (
        (f"{HOST}:{site.gateway.port}", tls, None, "--gateway"),
        (free, replace(tls, key=b"no key"), None, "--gateway"),
        (free, tls, BrowserSettings(pages), "websocket"),
    ):
        with refused(ConfigError, about):
            Gateway(address, given, lambda at: site.authority.root, lambda number, answer: None, browsers=browsers)


def test_a_revocation_list_that_has_expired_refuses_no_device_for_good(site: Site) -> None:
    def expired(at: datetime) -> Any:
        raise TrustError("the revocation list has expired", about="revocation.expired")

    site.gateway.service.read_root = expired
    over = site.device("kitchen").greet().ended()
    assert (over.kind, over.window) == (Kind.LATER, None)


# Attacks: who may attend.


def test_only_the_key_of_a_certified_device_that_signs_this_host_and_this_nonce_is_let_in(site: Site) -> None:
    kitchen, garage = site.device("kitchen"), site.device("garage")
    now = datetime.now(UTC)
    stranger = Authority.create("fleet", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=1))
    forged = LightDevice(site.gateway, stranger, "kitchen")
    old = kitchen.hello(kitchen.connect().receive())
    cases: dict[str, Callable[[bytes], bytes]] = {
        "another host": lambda challenge: kitchen.hello(challenge, host="evil.example"),
        "another host under this one's name": lambda challenge: kitchen.hello(
            challenge, host="evil.example", stated=HOST
        ),
        "another key": lambda challenge: kitchen.hello(challenge, key=IdentityKey.generate(SystemEntropy())),
        "a nonce from before": lambda _: old,
        "another device's certificate": lambda challenge: garage.hello(challenge, key=kitchen.identity),
        "a certificate of another authority": forged.hello,
    }
    for what, answer in cases.items():
        talk = kitchen.connect()
        talk.send(answer(talk.receive()))
        assert talk.ended().kind is Kind.REFUSED, what
    assert site.gateway.devices() == ()
    assert site.gateway.service.check_ins == {"refused": len(cases)}
    assert {(kind, version) for kind, version, _ in site.refusals} == {
        ("hello.host", "1.2.3"),
        ("signature", "1.2.3"),
        ("certificate.issuer", "1.2.3"),
    }


def test_a_device_without_the_authoritys_certificate_as_its_root_does_not_speak_to_a_gateway(site_of: SiteOf) -> None:
    """Nor to whoever has a certificate for another host, as a device has for none."""
    site = site_of()
    stranger = replace(site.device("kitchen"), authority=site_of().authority)
    over = stranger.connect().ended()
    assert over.code is grpc.StatusCode.UNAVAILABLE
    assert site.gateway.devices() == ()


def test_a_device_that_is_revoked_is_disconnected_and_not_admitted_again(site: Site) -> None:
    kitchen, garage = site.device("kitchen"), site.device("garage")
    talks = [kitchen.attend(), garage.attend()]
    site.revoke(kitchen.certificate)
    assert site.gateway.devices() == ("garage",)
    assert talks[0].ended().kind is Kind.REFUSED
    over = kitchen.greet().ended()
    assert (over.kind, over.reason) == (Kind.REFUSED, "certificate of kitchen is revoked")


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
    site_of: SiteOf, headers: dict[str, str | None], status: int
) -> None:
    site = site_of(carrier=SOCKET, origins=frozenset({"https://fleet.example"}))
    url, more = site.gateway.url(headers.get("path") or messages.ATTEND), {}
    if "host" in headers:  # as of a page whose host name was made to resolve to this machine
        more = {"sock": socket.create_connection((HOST, int(url.split(":")[2].split("/")[0])))}
        url = url.replace(HOST, str(headers["host"]))
    if "origin" in headers:
        more["origin"] = headers["origin"]
    with pytest.raises(InvalidStatus) as caught:
        SocketTalk(url, **more)
    assert caught.value.response.status_code == status
    site.device("tab").attend(origin="https://fleet.example")


# Attacks: what is sent.


@pytest.mark.parametrize(
    "sent",
    [b"", b"\xff" * 40, "text", bytes(messages.CHUNK + 1)],
    ids=["empty", "noise", "text", "oversized"],
)
@pytest.mark.parametrize("admitted", [False, True])
def test_bytes_that_are_not_a_message_end_the_conversation(site: Site, sent: bytes | str, admitted: bool) -> None:
    kitchen = site.device("kitchen")
    talk = kitchen.attend() if admitted else kitchen.connect()
    talk.send(sent)
    assert talk.ended().kind is (Kind.LATER if len(sent) > messages.CHUNK else Kind.INVALID)
    kitchen.attend()
    assert site.gateway.devices() == ("kitchen",)


@pytest.mark.parametrize("parts", [[b"\0" * 9], [b""], [b"\0" * 4, b""]], ids=["too long", "empty", "empty at last"])
def test_an_answer_that_does_not_have_the_size_it_began_with_ends_the_conversation(
    site: Site, parts: list[bytes]
) -> None:
    talk = site.device("kitchen").attend()
    site.ask("kitchen")
    talk.send(messages.ANSWER.encode(DeviceAnswer(talk.request().id, 8)), *parts)
    assert talk.ended().kind is Kind.INVALID


def test_an_answer_over_the_limit_or_with_neither_body_nor_reason_is_refused(site: Site) -> None:
    kitchen = site.device("kitchen")
    for size, code in ((messages.MAX_ANSWER + 1, 0), (0, 0), (1, 1)):
        with refused(ConfigError, "answer.size" if size > 1 else "answer.reason"):
            DeviceAnswer(1, size, code)
        talk = kitchen.attend()
        talk.send((1).to_bytes(8, "big") + size.to_bytes(4, "big") + code.to_bytes(2, "big") + bytes(4))
        assert talk.ended().kind is Kind.INVALID


def test_an_answer_that_stalls_ends_its_conversation_and_meanwhile_others_are_served(site: Site) -> None:
    talks = [site.device(name).attend() for name in ("kitchen", "garage")]
    numbers = [site.ask(name) for name in ("kitchen", "garage")]
    talks[0].send(messages.ANSWER.encode(DeviceAnswer(talks[0].request().id, 8)))
    talks[1].answer(talks[1].request().id, b"quick")
    assert site.answered() == (numbers[1], b"quick")
    over = talks[0].ended()
    assert (over.kind, over.reason.startswith("too slow")) == (Kind.LATER, True)
    assert site.answered() == (numbers[0], NoAnswer(None, "the device disconnected"))


def test_a_device_that_takes_no_more_of_a_request_is_cut_off(site_of: SiteOf) -> None:
    site = site_of()
    kitchen = site.device("kitchen")
    with conversation(f"{HOST}:{site.gateway.port}", messages.ATTEND, site.authority.root.to_pem()) as talk:
        talk.send((kitchen.hello(talk.receive()),))
        assert talk.receive() == messages.ADMITTED
        number = site.ask("kitchen", body=bytes(2**27))
        assert site.answered() == (number, NoAnswer(None, "the device disconnected"))
        with pytest.raises(grpc.RpcError) as caught:
            list(talk.call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


def test_an_answer_of_a_device_that_the_gateway_has_released_meanwhile_is_dropped(site_of: SiteOf) -> None:
    """The gateway closes while the answer is on the way, as when the coordinator's disk is full."""
    site = site_of(replace(LIMITS, transfer=60.0, grace=0.0))
    talk = site.device("kitchen").attend()
    number = site.ask("kitchen")
    talk.send(messages.ANSWER.encode(DeviceAnswer(talk.request().id, 6)))
    site.gateway.call(released(site))
    assert site.answered() == (number, NoAnswer(None, "the device disconnected"))
    assert talk.ended().kind is Kind.DONE
    assert site.answers.empty()


async def released(site: Site) -> None:
    site.gateway.service.release()


# Limits.


def test_a_device_that_answers_or_comes_too_often_has_to_wait_and_others_do_not(site_of: SiteOf, carrier: str) -> None:
    site = site_of(replace(LIMITS, calls=3, seconds=1e6, grace=60.0), carrier)
    kitchen = site.device("kitchen")
    talk = kitchen.attend()
    for _ in range(3):
        talk.send(messages.reason_message(1, 100, "of no request"))
    assert talk.ended().kind is Kind.LATER
    over = kitchen.greet().ended()
    assert over.kind is Kind.LATER
    assert over.window is not None
    assert over.window.earliest > 1e5 / 3 or over.window.earliest == messages.LONGEST_WAIT
    site.device("garage").attend()


def test_a_device_that_was_sent_away_and_comes_back_too_early_gets_the_rest_of_its_window(
    site_of: SiteOf, carrier: str
) -> None:
    site = site_of(replace(LIMITS, settings=GatewaySettings(devices=1, rejected_seconds=3600.0)), carrier)
    site.device("kitchen").attend()
    garage, hall = site.device("garage"), site.device("hall")
    first, early, other = (device.greet().ended() for device in (garage, garage, hall))
    assert {first.kind, early.kind, other.kind} == {Kind.LATER}
    assert first.window and early.window and other.window  # noqa: PT018
    assert 3500 < first.window.earliest <= 3600.001
    assert first.window.latest - first.window.earliest == pytest.approx(3600, abs=0.002)
    assert early.window.earliest < first.window.earliest
    assert other.window.earliest > early.window.earliest  # another device has a later one
    assert site.gateway.service.check_ins == {"admitted": 1, "full": 2, "early": 1}


def test_a_device_whose_clock_is_wrong_is_counted_while_it_is_connected(site: Site) -> None:
    now = int(time.time())
    for name, clock in {"kitchen": now, "garage": now - 600, "hall": now + 600, "attic": None}.items():
        site.device(name, clock=clock).attend()
    assert site.gateway.snapshot("here:1").skewed == 2


def test_check_ins_above_the_target_are_sent_away_with_windows_of_their_own(site_of: SiteOf) -> None:
    site = site_of(
        replace(LIMITS, settings=GatewaySettings(check_ins_per_minute=0.1, rejected_seconds=1.0))
    )  # one in ten minutes
    site.device("kitchen").attend()
    windows = [site.device(name).greet().ended().window for name in ("garage", "hall")]
    assert windows[0] and windows[1]  # noqa: PT018
    assert 0 < windows[0].earliest <= 1.001
    assert windows[1].earliest - windows[0].earliest > 1000  # half of the target is for these


def test_a_full_gateway_has_room_again_once_a_device_stays_away(site_of: SiteOf, carrier: str) -> None:
    site = site_of(replace(LIMITS, settings=GatewaySettings(devices=1, rejected_seconds=0.001)), carrier)
    talk, garage = site.device("kitchen").attend(), site.device("garage")
    assert not garage.is_let_in()
    talk.close()
    wait_until(garage.is_let_in)


def test_a_gateway_that_closes_tells_its_devices_when_to_come_back(site_of: SiteOf, carrier: str) -> None:
    site = site_of(replace(LIMITS, settings=GatewaySettings(check_ins_per_minute=60.0, accepted_seconds=5.0)), carrier)
    talk = site.device("kitchen").attend()
    site.gateway.close()
    over = talk.ended()
    assert (over.kind, over.window) == (Kind.DONE, RetryWindow(5.0, 10.0))


@pytest.mark.parametrize(
    ("version", "is_admitted"),
    [("0.9.9", False), ("1.2.0.dev3", False), ("1.2", True), ("1.10.0", True), ("newest", False)],
)
def test_a_device_of_an_older_version_is_refused_with_the_version_that_it_needs(
    site_of: SiteOf, carrier: str, version: str, is_admitted: bool
) -> None:
    site = site_of(replace(LIMITS, settings=GatewaySettings(client_version="1.2")), carrier)
    kitchen = site.device("kitchen", version=version)
    if is_admitted:
        kitchen.attend()
        return
    over = kitchen.greet().ended()
    assert over.kind is Kind.INVALID
    assert "1.2" in over.reason or version == "newest"


def test_answers_over_the_memory_of_the_gateway_come_later_and_a_newer_stream_frees_that_of_the_older(
    site_of: SiteOf, carrier: str
) -> None:
    site = site_of(replace(LIMITS, uploading=150, transfer=60.0, grace=60.0), carrier)
    kitchen, garage = site.device("kitchen"), site.device("garage")
    numbers = {}
    talks = {device.name: device.attend() for device in (kitchen, garage)}
    for name, talk in talks.items():
        numbers[name] = site.ask(name)
        talk.request()
    talks["kitchen"].send(messages.ANSWER.encode(DeviceAnswer(numbers["kitchen"] or 0, 100)))  # and stalls
    wait_until(lambda: site.gateway.service._receiving == 100)
    talks["garage"].answer(numbers["garage"], bytes(100))
    over = talks["garage"].ended()
    assert (over.kind, over.window) == (Kind.LATER, RetryWindow(15.0, 30.0))
    talk = kitchen.attend()
    wait_until(lambda: site.gateway.service._receiving == 0)
    talk.answer(talk.request().id, bytes(100))
    assert site.answered() == (numbers["kitchen"], bytes(100))
    talk = garage.attend()
    talk.answer(talk.request().id, bytes(50))
    assert site.answered() == (numbers["garage"], bytes(50))


# Where it listens.


def test_off_loopback_it_listens_for_pages_with_the_gateways_certificate(site_of: SiteOf) -> None:
    site = site_of()
    place = f"{HOST}:0", server_tls(site.authority), lambda at: site.authority.root, lambda number, answer: None
    gateway = Gateway(*place, browsers=BrowserSettings("0.0.0.0:0"))  # type: ignore[arg-type]
    try:
        url = gateway.url(messages.ATTEND).replace("0.0.0.0", HOST)  # noqa: S104
        assert url.startswith("wss://")
        talk = SocketTalk(url, ssl=ssl.create_default_context(cadata=site.authority.root.to_pem().decode()))
        talk.send(site.device("tab").hello(talk.receive()))
        assert talk.receive() == messages.ADMITTED
        talk.close()
        with pytest.raises(ssl.SSLCertVerificationError):
            SocketTalk(url, ssl=ssl.create_default_context())
    finally:
        gateway.close()


def test_the_settings_of_a_coordinator_say_where_browsers_are_served_and_from_which_pages(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    authority = Authority.create("fleet", SystemEntropy(), now - timedelta(days=1), now + timedelta(days=9))
    given = {"gateway": {"websocket": f"{HOST}:0", "origins": ["https://fleet.example"]}}
    settings = FederationSettings.parse(given, "test")
    state_dir = CoordinatorStateDir.create(tmp_path / "fleet", authority.root.to_pem(), settings, SystemEntropy())
    for name, content in zip((TLS_KEY, TLS_CERTIFICATE), certify(authority), strict=True):
        (state_dir.folder / name).write_bytes(content)
    with serving(state_dir, f"{HOST}:0", own_process=False) as grid:
        tab = LightDevice(grid.gateway, authority, "tab", SOCKET)
        tab.attend(origin="https://fleet.example")
        grid.await_devices(1)
        assert list(grid.get_node_ids()) == [messages.node_of("tab")]
        tab.close()
    state_dir.registry.close()


@pytest.mark.parametrize("address", ["9445", "127.0.0.1", "http://127.0.0.1:9445", "a b:1", ":9445"])
def test_what_is_not_an_address_is_refused_before_anything_runs(address: str) -> None:
    with pytest.raises(ConfigError):
        FederationSettings.parse({"gateway": {"websocket": address}}, "test")


# Peers that speak no gRPC


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS, DATA, HEADERS, PING, CONTINUATION = 4, 0, 1, 6, 9
SILENT = 60  # peers at once
PATIENCE = 90.0  # seconds


def frame(kind: int, body: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    """A frame of HTTP/2 (RFC 9113, section 4.1)."""
    return len(body).to_bytes(3, "big") + bytes([kind, flags]) + struct.pack(">I", stream) + body


def connect(site: Site) -> socket.socket:
    return socket.create_connection((HOST, site.gateway.port), timeout=PATIENCE)


@pytest.fixture
def site(site_of: SiteOf, monkeypatch: pytest.MonkeyPatch) -> Site:
    options = {**dict(messages.GATEWAY_OPTIONS), "grpc.server_handshake_timeout_ms": 3_000}  # in place of ten seconds
    monkeypatch.setattr(messages, "GATEWAY_OPTIONS", tuple(options.items()))
    return site_of()


@pytest.fixture
def peer(site: Site) -> Iterator[ssl.SSLSocket]:
    """A connection with TLS, on which nothing was sent."""
    context = ssl.create_default_context(cadata=site.authority.root.to_pem().decode())
    context.set_alpn_protocols(["h2"])
    with context.wrap_socket(connect(site), server_hostname=HOST) as peer:
        yield peer


def ends(peer: socket.socket) -> bool:
    """Whether the gateway ends a connection, whatever it sends before that."""
    try:
        while peer.recv(2**16):
            pass
    except TimeoutError:
        return False
    except OSError:  # a reset
        return True
    return True


@pytest.mark.slow
def test_peers_that_connect_and_say_nothing_hold_up_no_device_and_are_cut_off(site: Site) -> None:
    kitchen = site.device("kitchen")
    with ExitStack() as stack:
        peers = [stack.enter_context(connect(site)) for _ in range(SILENT)]
        assert kitchen.is_let_in()
        stream = kitchen.attend()
        number = site.ask("kitchen")
        assert stream.request().id == number
        assert all(ends(peer) for peer in peers)
    assert kitchen.is_let_in()


@pytest.mark.slow
def test_a_handshake_a_byte_at_a_time_is_cut_off(site: Site) -> None:
    """Slow loris: each byte would prove that the peer is there, and the handshake has a time for the whole."""
    kitchen, greeting = site.device("kitchen"), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with pytest.raises(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), greeting).do_handshake()
    hello, end = greeting.read(), time.monotonic() + PATIENCE
    with connect(site) as peer:
        try:
            for at in range(len(hello) - 1):
                assert time.monotonic() < end
                peer.sendall(hello[at : at + 1])
                time.sleep(0.1)
        except OSError:  # cut off: there are more than three seconds of bytes
            pass
        else:
            pytest.fail("the whole greeting was taken a byte at a time")
    assert kitchen.is_let_in()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n",
        PREFACE + frame(SETTINGS, b"12345"),  # no whole setting
        PREFACE + frame(SETTINGS) + frame(HEADERS, b"\xff" * 64, flags=4, stream=1),  # no HPACK
        PREFACE + frame(SETTINGS) + frame(CONTINUATION, b"", flags=4, stream=1),
        PREFACE + frame(SETTINGS) + frame(PING, b"short"),
        PREFACE + frame(SETTINGS) + (2**24 - 1).to_bytes(3, "big") + bytes([DATA, 0]) + struct.pack(">I", 1),
        bytes(range(256)) * 64,
    ],
    ids=["http-1", "settings", "hpack", "continuation", "ping", "oversized", "junk"],
)
def test_malformed_http2_ends_its_connection_and_no_other(site: Site, peer: ssl.SSLSocket, sent: bytes) -> None:
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    peer.sendall(sent)
    assert ends(peer)
    number = site.ask("kitchen")
    assert stream.request().id == number


def test_frames_for_streams_that_do_not_exist_change_nothing(site: Site, peer: ssl.SSLSocket) -> None:
    kitchen = site.device("kitchen")
    stream = kitchen.attend()
    peer.sendall(PREFACE + frame(SETTINGS) + frame(DATA, b"x") + frame(HEADERS, flags=4, stream=2))
    number = site.ask("kitchen")
    assert stream.request().id == number
    assert site.gateway.devices() == ("kitchen",)


def test_pings_without_end_are_cut_off(site: Site, peer: ssl.SSLSocket) -> None:
    peer.sendall(PREFACE + frame(SETTINGS) + frame(PING, bytes(8)) * 100)
    assert ends(peer)
    assert site.device("kitchen").is_let_in()
