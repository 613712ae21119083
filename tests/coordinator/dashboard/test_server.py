"""The dashboard without a network: who gets in, what is served, and that hostile requests get nothing."""

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from coordinator import runstate
from coordinator.dashboard import server
from coordinator.dashboard.server import COOKIE, TOKEN, Feed, application, read_token, serve
from coordinator.dashboard.view import ChannelsView, Viewer, exposition
from coordinator.runstate import GatewaySnapshot, Need
from coordinator.settings import FederationSettings, is_loopback
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.releases.repository import ChannelRepository
from tests.support import FleetOf, refused
from tests.support.gateway import wait_until

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
        with refused(ConfigError, "--listen"):
            serve(lambda: VIEW, SECRET, address, None)


# What the dashboard shows of a fleet: the numbers of its records, as JSON and as metrics, and nobody's name.
def metrics(view: dict[str, Any]) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(exposition(view).decode())
    samples = (sample for family in families for sample in family.samples)
    return {(each.name.removeprefix("edgeadapt_"), *each.labels.values()): each.value for each in samples}


def test_a_new_coordinator_has_nothing_to_show(fleet_of: FleetOf, tmp_path: Path) -> None:
    authority = (fleet_of(3).out / "coordinator" / "authority.pem").read_bytes()
    made = CoordinatorStateDir.create(tmp_path / "new", authority, FederationSettings(rounds=7), SystemEntropy())
    view = Viewer(made).look()
    made.registry.close()
    assert (view["version"], view["rounds"], view["session"], view["gateway"]) == (None, [], None, None)
    assert metrics(view)["rounds_wanted",] == 7
    assert view["lease"] is None
    lease = {"epoch": 3, "leader": "east", "in_force": True, "own": True}
    assert metrics(view | {"lease": lease})["leads",] == 1
    assert metrics(view | {"lease": lease | {"own": False}})["leads",] == 0
    assert metrics(view | {"lease": lease})["lease_epoch",] == 3


def test_the_rounds_of_a_fleet_are_counted_and_nobody_is_named(fleet_of: FleetOf, tmp_path: Path) -> None:
    fleet = fleet_of(6, rounds=3, aggregation__session_rounds=2)
    ChannelRepository.create(tmp_path / "releases", SystemEntropy(), datetime.now(UTC))
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    viewer = Viewer(state_dir, ChannelsView(tmp_path / "releases"))
    assert viewer.look()["rounds_done"] == 0
    records = fleet.federate(fleet.grid(forced_dropouts=1))
    view = viewer.look()
    assert [(each["round"], each["version"], each["survivors"]) for each in view["rounds"]] == [
        (record.round, record.version, len(record.survivors)) for record in records
    ]
    assert view["dropouts_by_step"] == {"survivors": 1, "unmask": 1, "plan": 1}
    assert view["session"] == {
        "began": view["session"]["began"],
        "latest": view["session"]["latest"],
        "log": "session-000002.log",
        "devices": 6,
        "rounds": 1,
        "step": None,
        "closed": True,
    }
    assert view["channels"] == {"canary": None, "stable": None}
    shown = json.dumps(view)
    assert not [name for name in records[0].survivors if name in shown]
    found = metrics(view)
    assert found["rounds_total", "sum"] == 3
    assert found["round_timestamp_seconds",] == records[-1].ended
    assert found["session_timestamp_seconds",] <= found["round_timestamp_seconds",]
    assert found["dropouts_total", "plan"] == 1
    assert found["bytes_total", "up"] == sum(record.bytes_up for record in records)
    assert found["metric", "loss"] == records[-1].metrics["loss"]
    assert found["channel_release", "stable"] == 0
    assert found["channels_verified",] == 1
    assert viewer.look()["rounds"] is view["rounds"]  # nothing new is not read again
    state_dir.registry.close()


def test_the_step_under_way_is_read_from_a_log_that_grows(fleet_of: FleetOf) -> None:
    from client.node.app import app

    fleet, seen = fleet_of(4, rounds=2), list[dict[str, Any]]()
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    viewer = Viewer(state_dir)

    def look(message: Any, context: Any) -> Any:
        seen.append(viewer.look())
        return app(message, context)

    fleet.federate(fleet.grid(app=look))
    steps = [each["session"]["step"]["name"] for each in seen if each["session"] and each["session"]["step"]]
    assert set(steps) >= {"roster", "plan", "survivors", "unmask"}
    assert all(each["running"] for each in seen)
    whole, afresh = viewer.look(), Viewer(state_dir).look()
    state_dir.registry.close()
    assert whole == afresh
    assert whole["session"]["closed"]
    assert whole["session"]["rounds"] == 2


def test_what_a_run_waits_for_is_shown_and_measured_without_a_devices_name(fleet_of: FleetOf) -> None:
    state_dir = CoordinatorStateDir.open(fleet_of(3).out / "coordinator")
    with state_dir.leading(), state_dir.run.observing(lambda: GatewaySnapshot("127.0.0.1:1", 2)):
        state_dir.run.waits(Need.SESSION, 2, 3, 4, 20)
        state_dir.run.refused("certificate.revoked", "0.1.0", "certificate of kitchen is revoked")
        state_dir.run.failed("last-sum", "waits for kitchen")
        state_dir.run.agreed("observations", 2, 8, 3)
        viewer = Viewer(state_dir)
        wait_until(lambda: viewer.look()["gateway"] is not None)
        view = viewer.look()
        assert viewer.look() == view  # nothing is sent while nothing changes
    state_dir.registry.close()
    assert "kitchen" not in json.dumps(view)
    found = metrics(view)
    assert (found["waits", "session"], found["waits", "devices"], found["gateway_devices",]) == (1, 0, 2)
    assert (found["consent_devices", "observations"], found["consent_needed", "observations"]) == (2, 3)
    assert (found["wait_devices",], found["wait_devices_needed",], found["wait_attempt",]) == (2, 3, 4)
    assert found["wait_timestamp_seconds",] == datetime.fromisoformat(view["run"]["since"]).timestamp()
    assert found["progress_timestamp_seconds",] == found["wait_timestamp_seconds",]
    assert (found["healthy",], found["condition", "waiting"], found["condition", "stuck"]) == (1, 1, 0)
    assert found["sessions_total", "last-sum"] == found["refusals_total", "certificate.revoked", "0.1.0"] == 1


def test_a_stalled_round_is_stuck_on_the_page_and_in_the_metrics_and_says_who_refused_what_without_names(
    fleet_of: FleetOf,
) -> None:
    state_dir = CoordinatorStateDir.open(fleet_of(3).out / "coordinator")
    with state_dir.leading():
        state_dir.run.asks("plan", 7, 4, 3, 600.0)
        state_dir.run.answered()
        state_dir.run.refused("offer", "", "kitchen: cohort of 3", "cohort of 3 is below this device's minimum of 8")
        stalled = runstate.read(state_dir.folder)
        viewer = Viewer(state_dir)
        wait_until(lambda: viewer.look()["run"]["step"] is not None)
        assert viewer.look()["health"]["condition"] == "moving"
        state_dir.run._update(since_ticks=stalled.since_ticks - 901)
        view = viewer.look()
    state_dir.registry.close()
    assert (view["health"]["condition"], view["health"]["healthy"]) == ("stuck", False)
    assert view["run"]["refusals"][0]["cause"] == "cohort of 3 is below this device's minimum of 8"
    assert "kitchen" not in json.dumps(view)
    found = metrics(view)
    assert (found["healthy",], found["condition", "stuck"], found["waits", "answers"]) == (0, 1, 1)
    assert (found["step_asked", "plan"], found["step_answers_needed", "plan"], found["step_answers", "plan"]) == (
        4,
        3,
        1,
    )
    assert ("wait_timestamp_seconds",) in found
