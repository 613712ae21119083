"""What a run waits for, as it writes it down, and as everybody else reads it."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.errors import EdgeAdaptError
from coordinator import runstate
from coordinator.cli import coordinator_group
from coordinator.runstate import FILE, GatewaySnapshot, Need, RunRecord, read
from coordinator.statedir import LOCK, CoordinatorStateDir, Stopped
from coordinator.status import status_of
from edgeadapt.formats import jsontext
from tests.support import FleetOf
from tests.support.gateway import wait_until

HOUR = timedelta(hours=1)


def waiting(folder: Path, need: Need = Need.DEVICES) -> RunRecord:
    record = RunRecord(folder)
    record.waits(need, 2, 3)
    return record


def test_a_wait_begins_once_and_ends_with_a_session(tmp_path: Path) -> None:
    record = waiting(tmp_path)
    since = read(tmp_path).since
    record.waits(Need.SESSION, 3, 3, 1, 20)
    record.failed("check-ins", "2 devices answered, 3 are needed")
    found, later = read(tmp_path), datetime.now(UTC) + HOUR
    assert (found.since, found.waits_for, found.attempt, found.sessions) == (since, Need.SESSION, 1, {"check-ins": 1})
    assert found.row(later)["waited"] == pytest.approx(3600, abs=60)
    first, reason = runstate.lines(found.row(later))
    assert "waits for a session" in first
    assert "60 minutes: 3 of 3 devices are there, attempt 1 of 20" in first
    assert reason.endswith("2 devices answered, 3 are needed")
    record.made()
    found = read(tmp_path)
    assert (found.waits_for, found.reason, found.sessions) == (None, "", {"check-ins": 1, "made": 1})
    assert (found.row(later)["waited"], [*runstate.lines(found.row(later))]) == (0, [])


def test_a_run_after_one_that_failed_waits_since_then_and_after_one_that_was_stopped_since_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting(tmp_path).failed("check-ins", "why")
    before = read(tmp_path)

    monkeypatch.setattr(runstate, "timestamp", lambda seconds: jsontext.timestamp(seconds + HOUR.seconds))
    waiting(tmp_path)
    assert (read(tmp_path).since, read(tmp_path).sessions) == (before.since, {"check-ins": 1})
    RunRecord(tmp_path).stopped()
    waiting(tmp_path)
    assert read(tmp_path).since != before.since


def test_a_coordinator_that_waits_for_the_lease_waits_for_no_device(tmp_path: Path) -> None:
    record = waiting(tmp_path)
    since = read(tmp_path).since
    record.leads()
    assert read(tmp_path).since == since  # it did not wait for the lease
    waiting(tmp_path, Need.LEASE)
    assert read(tmp_path).row(datetime.now(UTC) + HOUR)["waited"] == 0
    RunRecord(tmp_path).leads()
    assert read(tmp_path).waits_for is None
    waiting(tmp_path)
    assert read(tmp_path).row(datetime.now(UTC) + HOUR)["waited"] == pytest.approx(3600, abs=60)


def test_refusals_are_counted_by_kind_and_version_and_made_up_versions_push_out_no_other_kind(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    record.refused("offer", "", "first")
    for number in range(2 * runstate.KINDS):
        record.refused("certificate.revoked", f"0.{number}", "certificate of kitchen is revoked")
    record.refused("offer", "", "second")
    assert not (tmp_path / FILE).exists()  # what strangers do makes the disk no work
    record.waits(Need.DEVICES)
    first, second, *others = read(tmp_path).refusals
    assert (first.kind, first.count, first.text) == ("offer", 2, "second")
    assert (second.version, len(others)) == (f"0.{2 * runstate.KINDS - 1}", runstate.VERSIONS - 1)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"waits_for": "bread"}', b'{"devices": "2"}', bytes(2**18)])
def test_a_damaged_record_says_nothing_and_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content)
    assert read(tmp_path) == runstate.RunState()
    waiting(tmp_path)
    assert read(tmp_path).devices == 2


def test_a_record_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    record = waiting(tmp_path / "missing")
    (tmp_path / "missing").mkdir()
    record.waits(Need.DEVICES, 2, 3)
    assert read(tmp_path / "missing").devices == 2


def test_a_gateway_is_in_the_record_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runstate, "EVERY", 0.01)
    now, record = [GatewaySnapshot("127.0.0.1:1")], RunRecord(tmp_path)
    with record.observing(lambda: now[0]):
        wait_until(lambda: read(tmp_path).gateway == now[0])
        now[0] = GatewaySnapshot("127.0.0.1:1", 3, 2, {"0.1.0": 3}, {"admitted": 3})
        wait_until(lambda: read(tmp_path).gateway == now[0])
        assert read(tmp_path).row(datetime.now(UTC), running=False)["gateway"] is None  # as after a kill
    assert read(tmp_path).gateway is None


def test_the_status_of_a_stuck_fleet_says_why_and_is_not_green(fleet_of: FleetOf) -> None:
    from client.node.app import app

    fleet, seen = fleet_of(6, attempts=2, rounds=2), list[dict[str, Any]]()
    folder = fleet.out / "coordinator"

    def refusing(message: Any, context: Any) -> Any:
        state_dir = CoordinatorStateDir.open(folder)
        seen.append(status_of(state_dir))
        state_dir.registry.close()
        return app(message, context)

    def called(*options: str) -> Any:
        return CliRunner().invoke(coordinator_group, ["status", str(folder), *options])

    assert called("--stuck-after", "0").exit_code == 0  # no run has waited
    (folder / LOCK).unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert called().exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before  # it only reads

    fleet.nodes = {node: name for node, name in fleet.nodes.items() if node <= 3}
    with pytest.raises(EdgeAdaptError, match="no session"):
        fleet.federate(fleet.grid(app=refusing))
    run = seen[0]["run"]
    assert seen[0]["running"]
    assert (run["waits_for"], run["devices"], run["needed"], run["attempt"], run["attempts"]) == ("session", 2, 3, 1, 2)
    stuck = called("--stuck-after", "0")
    assert stuck.exit_code == 7
    assert "2 of 3 devices are there, attempt 2 of 2" in stuck.stdout
    assert "2 devices answered, 3 are needed" in stuck.stdout
    assert "the fleet is stuck" in stuck.stderr
    as_json = called("--stuck-after", "0", "--json")
    assert (as_json.exit_code, json.loads(as_json.stdout)["run"]["sessions"]) == (7, {"check-ins": 2})
    assert called().exit_code == 0  # a quarter of an hour is normal


def test_a_run_that_is_stopped_on_purpose_waits_no_more(fleet_of: FleetOf) -> None:
    state_dir = CoordinatorStateDir.open(fleet_of(3).out / "coordinator")
    for kind, waits_for in ((Stopped, None), (KeyboardInterrupt, None), (EdgeAdaptError, Need.DEVICES)):
        state_dir.run.waits(Need.DEVICES, 2, 3)
        with pytest.raises(kind), state_dir.leading():
            raise kind("")
        assert read(state_dir.folder).waits_for == waits_for
    state_dir.registry.close()
