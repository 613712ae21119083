"""Whatever a peer sends to ``device serve``, it is answered or cut off within a bound, and the next one is answered."""

import json
import re
import socket
import struct
import tracemalloc
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest

from client.inference import connections, server
from export.bundle.write import write_bundle
from tests.support.gateway import wait_until
from tests.support.wire import Site, read, replies, site

TEXT = "turn on the kitchen lights"
GOOD = {"model": "global", "input": TEXT}
BODY = json.dumps(GOOD).encode()
HEAD = b"POST /v1/classify HTTP/1.1\r\nHost: 127.0.0.1\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)


def is_well(site: Site) -> bool:
    return site.ask("/v1/classify", GOOD).status == 200


# Each with what follows it on the connection, which must not be a request of its own.
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
FRAMING = {
    "length and chunks": HEAD + LENGTH + CHUNKED + b"\r\n" + CHUNKS,
    "chunks and length": HEAD + CHUNKED + LENGTH + b"\r\n" + BODY,
    "no chunks, but a length": HEAD + CHUNKED + LENGTH + b"\r\n",
    "two lengths": HEAD + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY,
    "two lengths in one": HEAD + b"Content-Length: 3, 4\r\n\r\n" + BODY,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + BODY,
    "a signed length": HEAD + b"Content-Length: +5\r\n\r\n" + BODY,
    "a length of letters": HEAD + b"Content-Length: ten\r\n\r\n" + BODY,
    "a length with an underscore": HEAD + b"Content-Length: 1_0\r\n\r\n" + BODY,
    "an endless length": HEAD + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n" + BODY,
    "an empty length": HEAD + b"Content-Length: \r\n\r\n" + BODY,
    "another coding": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + CHUNKS,
    "a coding twice": HEAD + CHUNKED * 2 + b"\r\n" + CHUNKS,
    "an unknown coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n" + CHUNKS,
    "a coding of HTTP/1.0": HEAD.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNKS,
    "a space before the colon": HEAD + b"Content-Length : 3\r\n\r\n" + BODY,
    "a folded header": HEAD + b"Transfer-Encoding:\r\n chunked\r\n" + LENGTH + b"\r\n" + CHUNKS,
    "a size that is none": HEAD + CHUNKED + b"\r\nzz\r\n" + BODY,
    "a negative size": HEAD + CHUNKED + b"\r\n-5\r\n" + BODY,
    "an endless size": HEAD + CHUNKED + b"\r\n" + b"f" * 30 + b"\r\n" + BODY,
    "a chunk without its end": HEAD + CHUNKED + b"\r\n3\r\n{}}}\r\n0\r\n\r\n",
    "a trailer that is none": HEAD + CHUNKED + b"\r\n0\r\nno header\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: localhost\r\n\r\n",
    "a foreign host": b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n",
    "no version": b"GET /v1/models\r\n\r\n",
    "another version": b"GET /v1/models HTTP/2.0\r\nHost: 127.0.0.1\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)),
    "no method": b" /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a method of signs": b"G@T /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "a path of letters that are none": b"GET /\xff\xfe HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "NUL": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\0b\r\n\r\n",
    "a bare return": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX: a\rY: b\r\n\r\n",
    "large headers": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX: " + b"a" * 2**20,
    "many headers": b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 2**15,
    "a long path": b"GET /" + b"a" * 2**17,
    "empty lines": b"\r\n" * 2**15,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: Any, exported: Any, source: Any, vendor: Any) -> Iterator[Site]:
    """A server of a classifier with the adapter ``global``."""
    folder = tmp_path_factory.mktemp("wire")
    write_bundle(folder / "bundle", exported, [source()], key=vendor)
    (folder / "trust.pem").write_bytes(vendor.public.to_pem())
    with site(folder / "bundle") as running:
        yield running


@pytest.fixture
def impatient(served: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The same, with bounds that a test can wait for."""
    monkeypatch.setattr(connections, "PATIENCE", 0.3)
    monkeypatch.setattr(server, "PATIENCE", 0.3)
    monkeypatch.setattr(connections, "SPARE", 0.2)
    monkeypatch.setattr(served.runner.config, "timeout_keep_alive", 0.5)
    return served


def is_idle(site: Site) -> bool:
    return (site.connections, site.service._waiting, len(site.runner.server_state.tasks)) == (0, 0, 0)


@pytest.mark.parametrize("sent", FRAMING.values(), ids=FRAMING)
def test_a_request_that_is_not_http_is_refused_and_its_connection_closed(served: Site, sent: bytes) -> None:
    found = served.say(sent + SMUGGLED)
    assert len(found) <= 1  # what follows is not answered
    for reply in found:
        assert 400 <= reply.status < 600
        assert reply.error["message"]
        assert reply.headers["connection"] == "close"
    assert is_well(served)
    assert not served.logged


def test_a_length_said_twice_alike_is_one(served: Site) -> None:
    """As RFC 9112, section 6.3, allows: what follows the body is the next request."""
    last = SMUGGLED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    for lengths in (LENGTH * 2, b"Content-Length: %d, %d\r\n" % (len(BODY), len(BODY))):
        assert [one.status for one in served.say(HEAD + lengths + b"\r\n" + BODY + last)] == [200, 200]


def test_chunks_and_requests_in_a_row_are_answered_in_order(served: Site) -> None:
    last = SMUGGLED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    pieces = b"".join(b"1;x=y\r\n%c\r\n" % byte for byte in BODY) + b"0\r\nX: trailer\r\n\r\n"
    first, second, third = served.say(HEAD + CHUNKED + b"\r\n" + pieces + HEAD + LENGTH + b"\r\n" + BODY + last)
    assert first.body == second.body
    assert json.loads(third.body)["object"] == "list"


def test_garbage_after_a_request_does_not_change_its_answer(served: Site) -> None:
    good, bad = served.say(HEAD + LENGTH + b"\r\n" + BODY + b"\0garbage\r\n\r\n" * 100)
    assert (good.status, bad.status, bad.headers["connection"]) == (200, 400, "close")
    assert not served.logged


def test_garbage_after_an_early_refusal_only_ends_the_connection(served: Site) -> None:
    """The path is refused before the chunks come, so that an answer was given when one of them is wrong."""
    with served.connect(HEAD.replace(b"/v1/classify", b"/nowhere") + CHUNKED + b"\r\n") as peer:
        raw = peer.recv(2**16)
        peer.sendall(b"zz\r\n")
        (reply,) = replies(raw + read(peer))
    assert reply.status == 404
    assert "/v1/classify" in reply.error["message"]
    assert not served.logged


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c"])
def test_another_protocol_is_not_offered(served: Site, upgrade: bytes) -> None:
    found = served.ask("/v1/models", None, f"Upgrade: {upgrade.decode()}", "Connection: Upgrade")
    assert found.status == 200
    assert not served.logged


SLOW = {
    "nothing": b"",
    "half a line": b"GET /v1/mo",
    "half a header": HEAD[:-2],
    "no body": HEAD + LENGTH + b"\r\n",
    "half a body": HEAD + LENGTH + b"\r\n" + BODY[:9],
    "half a chunk": HEAD + CHUNKED + b"\r\n5\r\n{",
    "a body that nobody reads": HEAD.replace(b"/v1/classify", b"/nowhere") + b"Content-Length: 9999\r\n\r\n{",
}


@pytest.mark.parametrize("sent", SLOW.values(), ids=SLOW)
def test_a_request_that_does_not_come_is_cut_off(impatient: Site, sent: bytes) -> None:
    with impatient.connect(sent) as silent:
        assert is_well(impatient)
        for reply in replies(read(silent)):
            assert reply.status in (404, 408)
    assert not impatient.logged


def test_a_byte_at_a_time_buys_no_more_time(impatient: Site) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(impatient.connect(sent)) for sent in SLOW.values()]

        def ended() -> bool:
            for peer in slow:
                with suppress(OSError):
                    peer.sendall(b" ")
            return is_idle(impatient)

        wait_until(ended)
    assert is_well(impatient)
    assert not impatient.logged


def test_a_peer_that_does_not_read_its_answers_is_cut_off(impatient: Site) -> None:
    asked = b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with impatient.connect() as peer:
        peer.settimeout(0.2)
        with suppress(OSError):
            while True:
                peer.sendall(asked * 100)
        wait_until(lambda: is_idle(impatient))
    assert is_well(impatient)
    assert not impatient.logged


@pytest.mark.parametrize("cut", range(0, len(HEAD + LENGTH + BODY) + 2, 7))
def test_a_peer_that_hangs_up_anywhere_leaves_nothing(served: Site, cut: int) -> None:
    for abrupt in (False, True):
        with served.connect((HEAD + LENGTH + b"\r\n" + BODY)[:cut]) as peer:
            if abrupt:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    wait_until(lambda: is_idle(served))
    assert is_well(served)
    assert not served.logged


def test_who_sends_too_much_can_read_why(served: Site) -> None:
    found = served.ask("/v1/classify", b" " * (8 * server.MAX_BODY))
    assert (found.status, found.error["type"]) == (413, "invalid_request_error")


def test_a_body_without_an_end_is_cut_off(served: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UNREAD", 2**22)
    with served.connect(HEAD + b"Content-Length: %d\r\n\r\n" % 2**40) as peer, suppress(ConnectionError):
        for _ in range(2**10):
            peer.sendall(bytes(2**20))
        pytest.fail("it reads a gigabyte")
    assert is_well(served)
    assert not served.logged


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v1/models/", "/v1//models", "/%ff%00", "/../health"])
def test_a_path_that_is_not_served_names_those_that_are(served: Site, path: str) -> None:
    found = served.ask(path, {})
    assert found.status == 404
    assert "/v1/classify" in found.error["message"]


def test_a_method_that_is_not_served_names_those_that_are(served: Site) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
        found = served.ask("/v1/classify", GOOD, method=method)
        assert (found.status, found.headers["allow"]) == (405, "POST")
        assert found.error["message"]


def test_a_page_of_another_host_lets_no_model_run(served: Site) -> None:
    """A browser sends such a request without asking, and only keeps its answer from the page."""
    runs = served.service._registry.get_sample_value("edgeadapt_rows_count")
    for origin in ("https://evil.example", "http://127.0.0.1.evil.example", "null", "", "http://evil@127.0.0.2"):
        found = served.ask("/v1/classify", GOOD, f"Origin: {origin}")
        assert (found.status, found.error["code"]) == (403, "403"), origin
    assert served.service._registry.get_sample_value("edgeadapt_rows_count") == runs
    assert served.ask("/v1/classify", GOOD, "Origin: http://127.0.0.1:3000").status == 200


def test_what_a_host_header_says_decides_no_path(served: Site) -> None:
    for host in ("127.0.0.1:8/v1/models?", "127.0.0.1:8/x#", "127.0.0.1:[", "127.0.0.1:\xff"):
        raw = b"POST /v1/classify HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n" % host.encode("latin-1")
        (found,) = served.say(raw + LENGTH + b"\r\n" + BODY)
        assert found.status == 200
    text = served.ask("/metrics").body.decode()
    assert set(re.findall('requests_total{path="([^"]*)"', text)) <= set(served.service.paths)


# Bodies of a megabyte, which a reader may make much more of.
LARGE = {
    "wrong items": b'{"model": "global", "input": [%b1]}' % (b"1," * 500_000),
    "unknown keys": b'{"model": "global", "input": "a", %b}' % b",".join(b'"%x": 1' % n for n in range(75_000)),
    "a long key": b'{"model": "global", "input": "a", "%b": 1}' % (b"k" * 10**6),
    "deep": b'{"model": "global", "input": ' + b"[" * 10**6,
    "a large number": b'{"model": "global", "input": "a", "top": %b}' % (b"9" * 10**6),
    "escapes": b'{"model": "global", "input": "%b"}' % (b"\\u0000" * 170_000),
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE)
def test_a_large_body_that_is_wrong_costs_little(served: Site, body: bytes) -> None:
    assert len(body) <= server.MAX_BODY
    tracemalloc.start()
    try:
        found = served.ask("/v1/classify", body)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.status, len(found.body) < 1000) == (400, True)
    assert found.error["message"]
    assert most < 64 * server.MAX_BODY
