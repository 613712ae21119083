"""The dashboard without a network: who gets in, what is served, and that hostile requests get nothing."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from coordinator.dashboard import server
from coordinator.dashboard.server import COOKIE, TOKEN, Feed, application, read_token, serve
from coordinator.settings import is_loopback
from tests.support import refused

SECRET = "a" * 64
VIEW: dict[str, Any] = {"rounds_done": 3}


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setattr(server, "PATIENCE", 0.0)
    app = application(lambda: VIEW, SECRET, lambda: ["127.0.0.1"], secure=False)
    with TestClient(app, base_url="http://127.0.0.1", follow_redirects=False) as client:
        yield client


def log_in(client: TestClient, token: str = SECRET) -> Any:
    return client.post("/login", content=f"token={token}")


@pytest.mark.parametrize("path", ["/view.json", "/events", "/metrics"])
def test_nothing_of_the_fleet_is_shown_without_the_token(client: TestClient, path: str) -> None:
    wrong = [{"authorization": "Bearer "}, {"authorization": f"Bearer {SECRET[:-1]}"}, {"cookie": f"{COOKIE}=x"}]
    for headers in ({}, *wrong):
        answer = client.get(path, headers=headers)
        assert (answer.status_code, answer.text) == (401, "log in\n")
    assert client.get("/").headers["location"] == "/login"


def test_a_bearer_token_and_a_login_open_it_and_a_logout_closes_it(client: TestClient) -> None:
    assert client.get("/view.json", headers={"authorization": f"Bearer {SECRET}"}).json() == VIEW
    answer = log_in(client)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert client.get("/view.json").json() == VIEW
    assert "Fleet" in client.get("/").text
    kept = client.cookies[COOKIE]
    client.post("/logout")
    assert client.get("/view.json", headers={"cookie": f"{COOKIE}={kept}"}).status_code == 401


@pytest.mark.parametrize("body", ["", "token=", f"token={SECRET}x", "token=%ff%fe", "x" * 10_000, f"other={SECRET}"])
def test_another_token_or_form_is_refused_without_a_session(client: TestClient, body: str) -> None:
    answer = client.post("/login", content=body)
    assert answer.status_code == 401
    assert "not the token" in answer.text
    assert "set-cookie" not in answer.headers


def test_a_session_over_tls_has_a_secure_cookie() -> None:
    app = application(lambda: VIEW, SECRET, lambda: ["fleet.example"], secure=True)
    with TestClient(app, base_url="https://fleet.example", follow_redirects=False) as client:
        assert "Secure" in log_in(client).headers["set-cookie"]


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "[", "localhost@evil"])
def test_a_request_for_another_host_is_refused(client: TestClient, host: str) -> None:
    """DNS rebinding: a foreign site whose name resolves to this machine."""
    answer = client.get("/login", headers={"host": host})
    assert answer.status_code == 421
    assert "token" not in answer.text


def test_every_response_forbids_foreign_code_and_frames(client: TestClient) -> None:
    for path in ("/login", "/files/page.js", "/nothing", "/view.json", "/health"):
        headers = client.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["cache-control"] == "no-store"


@pytest.mark.parametrize("name", ["server.py", "../server.py", "%2e%2e%2fserver.py", "index.html", ""])
def test_only_the_listed_files_are_served(client: TestClient, name: str) -> None:
    assert client.get(f"/files/{name}").status_code == 404


def test_what_cannot_be_read_is_said_and_the_next_look_may_succeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "EVERY", 0.0)
    broken = [True]

    def look() -> dict[str, Any]:
        if broken:
            broken.pop()
            raise TrustError("a record was altered", about="record")
        return VIEW

    app = application(look, SECRET, lambda: ["127.0.0.1"], secure=False)
    with TestClient(app, base_url="http://127.0.0.1", headers={"authorization": f"Bearer {SECRET}"}) as client:
        answer = client.get("/metrics")
        assert (answer.status_code, answer.text) == (503, "a record was altered\n")
        assert client.get("/view.json").json() == VIEW


def test_a_stream_sends_changes_only_and_all_pages_share_one_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "EVERY", 0.01)
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.05)
    looks = [0]

    def look() -> dict[str, Any]:
        looks[0] += 1
        return {"round": min(looks[0] // 20, 2)}

    async def heard(feed: Feed) -> list[str]:
        found = []
        async for event in feed.events(lambda: True):
            if event.startswith("data"):
                found.append(event)
            elif len(found) == 3:
                return found
        return found

    async def both() -> list[list[str]]:
        feed = Feed(look)
        return await asyncio.gather(heard(feed), heard(feed))

    one, other = asyncio.run(both())
    assert one == other == [f'data: {{"round": {number}}}\n\n' for number in range(3)]


def test_more_streams_than_allowed_are_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_STREAMS", 0)
    assert client.get("/events", headers={"authorization": f"Bearer {SECRET}"}).status_code == 503


def test_a_token_is_made_once_readable_by_its_owner_only_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    token = read_token(tmp_path, SystemEntropy())
    assert len(token) == 64
    assert read_token(tmp_path, SystemEntropy()) == token
    assert (tmp_path / TOKEN).stat().st_mode & 0o077 == 0
    for damaged in (b"", b"short", b"\xff" * 64, b"two lines of it\n" * 4):
        (tmp_path / TOKEN).write_bytes(damaged)
        with refused(TrustError, TOKEN):
            read_token(tmp_path, SystemEntropy())


def test_other_machines_are_served_over_tls_only() -> None:
    assert all(map(is_loopback, ["127.0.0.1:9500", "localhost:9500", "[::1]:9500"]))
    for address in ("0.0.0.0:9500", "[::]:9500", "fleet.example:9500"):
        assert not is_loopback(address)
        with refused(ConfigError, "--listen", value=address):
            serve(lambda: VIEW, SECRET, address, None)
