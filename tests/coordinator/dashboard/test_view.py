"""What the dashboard shows of a fleet: the numbers of its records, as JSON and as metrics, and nobody's name."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from aggregation.entropy import SystemEntropy
from coordinator.dashboard.view import ChannelsView, Viewer, exposition
from coordinator.runstate import GatewaySnapshot, Need
from coordinator.settings import FederationSettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.releases.repository import ChannelRepository
from tests.support import FleetOf
from tests.support.gateway import wait_until


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
    state_dir.run.waits(Need.SESSION, 2, 3, 4, 20)
    state_dir.run.refused("certificate.revoked", "0.1.0", "certificate of kitchen is revoked")
    state_dir.run.failed("last-sum", "waits for kitchen")
    with state_dir.locked(), state_dir.run.observing(lambda: GatewaySnapshot("127.0.0.1:1", 2)):
        viewer = Viewer(state_dir)
        wait_until(lambda: viewer.look()["gateway"] is not None)
        view = viewer.look()
        assert viewer.look() == view  # nothing is sent while nothing changes
    state_dir.registry.close()
    assert "kitchen" not in json.dumps(view)
    found = metrics(view)
    assert (found["waits", "session"], found["waits", "devices"], found["gateway_devices",]) == (1, 0, 2)
    assert (found["wait_devices",], found["wait_devices_needed",], found["wait_attempt",]) == (2, 3, 4)
    assert found["wait_timestamp_seconds",] == datetime.fromisoformat(view["run"]["since"]).timestamp()
    assert found["sessions_total", "last-sum"] == found["refusals_total", "certificate.revoked", "0.1.0"] == 1
