"""Peers that speak no gRPC: they say nothing, a byte at a time, or break HTTP/2. Others are served meanwhile."""

import socket
import ssl
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from edgeadapt.formats.gateway import messages
from tests.coordinator.gateway.conftest import Site, SiteOf
from tests.support.gateway import HOST

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
