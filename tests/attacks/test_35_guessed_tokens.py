"""Peers guess the dashboard's token: many at once, without waiting for an answer, under the names of others.

What was guessed is counted where it is compared. The owner, who has the token, comes from another address, or from the
same one.
"""

import secrets
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from threading import Event, Semaphore, Thread
from typing import Any

import pytest
import uvicorn
from starlette.requests import Request

from coordinator.dashboard import server
from coordinator.dashboard.server import Logins
from tests.support.dashboard import TOKEN, WAIT, Dashboard, dashboard
from tests.support.gateway import wait_until

WRONG = "b" * 64
GUESSES = 20
OTHER = "127.0.0.2"  # another address of loopback, and so another network


class Compared:
    """Counts the texts that reach the dashboard, and those that it compares with its token."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.arrived = Semaphore(0)

    def compare_digest(self, given: bytes, token: bytes) -> bool:
        self.given.append(given.decode())
        return secrets.compare_digest(given, token)

    def __getattr__(self, name: str) -> Any:
        return getattr(secrets, name)

    def await_guesses(self, count: int) -> None:
        assert all(self.arrived.acquire(timeout=WAIT) for _ in range(count))


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Compared:
    found, genuine = Compared(), Logins._is_token

    async def arrived(self: Logins, request: Request, given: str) -> bool:
        found.arrived.release()
        return await genuine(self, request, given)

    monkeypatch.setattr(server, "secrets", found)
    monkeypatch.setattr(Logins, "_is_token", arrived)
    return found


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    """A dashboard where a wrong token takes its network a very long time."""
    monkeypatch.setattr(server, "PATIENCE", 300.0)
    with dashboard(monkeypatch) as made:
        yield made


def without_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    async def is_token(self: Logins, request: Request, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())

    monkeypatch.setattr(Logins, "_is_token", is_token)


def bearer(token: str, more: str = "") -> bytes:
    return f"GET /view.json HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}Authorization: Bearer {token}\r\n\r\n".encode()


def login(token: str, more: str = "") -> bytes:
    head = f"POST /login HTTP/1.1\r\nHost: 127.0.0.1\r\n{more}Content-Length: {len(token) + 6}\r\n\r\n"
    return f"{head}token={token}".encode()


def allows(site: Dashboard, source: str) -> bool:
    headers = {"authorization": f"Bearer {TOKEN}"}
    by_form = site.ask("/login", source=source, method="POST", body=f"token={TOKEN}")[0]
    return (by_form, site.ask("/view.json", source=source, **headers)[0]) == (303, 200)


@pytest.mark.parametrize("form", [bearer, login])
def test_guesses_from_a_network_are_compared_one_at_a_time_and_the_owner_elsewhere_does_not_wait(
    compared: Compared, site: Dashboard, form: Any
) -> None:
    with ExitStack() as stack:
        for _ in range(GUESSES):
            stack.enter_context(site.connect(form(WRONG)))
        compared.await_guesses(GUESSES)
        assert allows(site, OTHER)
        wait_until(lambda: WRONG in compared.given)
        assert compared.given.count(WRONG) == 1


@pytest.mark.parametrize("form", [bearer, login])
def test_without_turns_all_guesses_are_answered_at_once(
    site: Dashboard, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    without_turns(monkeypatch)
    with ExitStack() as stack:
        peers = [stack.enter_context(site.connect(form(WRONG))) for _ in range(GUESSES)]
        assert all(peer.recv(2**16).startswith(b"HTTP/1.1 401") for peer in peers)


@pytest.mark.parametrize("trusted", [False, True], ids=["by its address", "by what it claims"])
def test_a_guesser_has_no_other_turn_by_claiming_another_address(
    compared: Compared, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    """Behind a reverse proxy a server takes the client's address from a header, and so would this one."""
    monkeypatch.setattr(server, "PATIENCE", 300.0)
    if trusted:
        monkeypatch.setattr(uvicorn, "Config", partial_config(proxy_headers=True))
    with dashboard(monkeypatch) as site, ExitStack() as stack:
        for number in range(GUESSES):
            stack.enter_context(site.connect(bearer(WRONG, f"X-Forwarded-For: 192.0.2.{number}\r\n")))
        compared.await_guesses(GUESSES)
        wait_until(lambda: len(compared.given) == (GUESSES if trusted else 1))


@pytest.mark.parametrize("limited", [False, True], ids=["by places", "by uvicorn"])
def test_guessers_that_hang_up_block_neither_the_health_check_nor_the_owner(
    compared: Compared, monkeypatch: pytest.MonkeyPatch, limited: bool
) -> None:
    monkeypatch.setattr(server, "PATIENCE", 300.0)
    if limited:
        monkeypatch.setattr(uvicorn, "Config", partial_config(limit_concurrency=128))
    with dashboard(monkeypatch) as site:
        for number in range(130):
            with site.connect(login(WRONG)):
                if number < 128 or not limited:
                    compared.await_guesses(1)
        assert site.ask("/health")[0] == (503 if limited else 200)
        assert limited or allows(site, OTHER)
        assert compared.given.count(WRONG) <= 1


def test_the_owner_gets_a_turn_at_the_address_of_a_guesser(compared: Compared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PATIENCE", 0.1)
    over = Event()

    def guess() -> None:
        while not over.is_set():
            site.ask("/view.json", authorization=f"Bearer {WRONG}")

    with dashboard(monkeypatch) as site:
        guessers = [Thread(target=guess) for _ in range(4)]
        for each in guessers:
            each.start()
        compared.await_guesses(2)
        assert allows(site, "127.0.0.1")
        over.set()
        for each in guessers:
            each.join()


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "unchecked"])
def test_a_stream_ends_when_its_session_is_logged_out(monkeypatch: pytest.MonkeyPatch, checked: bool) -> None:
    """Somebody has copied a session, and opened the stream of the fleet with it."""
    monkeypatch.setattr(server, "EVERY", 0.01)
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.0)
    with dashboard(monkeypatch) as site:
        cookie = site.ask("/login", method="POST", body=f"token={TOKEN}")[2]["set-cookie"].split(";")[0]
        head = f"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\nCookie: {cookie}\r\n\r\n".encode()
        with site.connect(head) as stream:
            begin = stream.recv(2**16)
            assert b"200 OK" in begin
            if not checked:
                monkeypatch.setattr(Logins, "is_open", lambda self, request: True)
            assert site.ask("/logout", method="POST", cookie=cookie)[0] == 303
            assert (site.ask("/view.json", cookie=cookie)[0] == 401) is checked
            assert _ends(stream, begin) is checked


def _ends(stream: socket.socket, found: bytes, after: int = 50) -> bool:
    """Whether a stream of which this was found ends before so many further parts: with a chunk of no bytes (RFC 9112,
    section 7.1)."""
    for _ in range(after):
        found += stream.recv(2**16)
        if found.endswith(b"\r\n0\r\n\r\n"):
            return True
    return False


def partial_config(**changes: Any) -> Any:
    genuine = uvicorn.Config
    return lambda *given, **settings: genuine(*given, **{**settings, **changes})
