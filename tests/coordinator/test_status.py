"""The status of a federation, before its first version, during and after its rounds."""

import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from coordinator import statedir
from coordinator.settings import FederationSettings
from coordinator.statedir import CoordinatorStateDir
from coordinator.status import lines_of, status_of
from edgeadapt.formats import storage
from edgeadapt.formats.jsontext import timestamp
from tests.support import FleetOf


def status(fleet: Any) -> dict[str, Any]:
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    found = status_of(state_dir)
    state_dir.registry.close()
    assert json.loads(json.dumps(found)) == found
    return found


def test_a_new_coordinator_has_no_version_and_no_round(fleet_of: FleetOf, tmp_path: Path) -> None:
    authority = (fleet_of(3).out / "coordinator" / "authority.pem").read_bytes()
    made = CoordinatorStateDir.create(tmp_path / "new", authority, FederationSettings(rounds=7), SystemEntropy())
    found = status_of(made)
    assert (found["versions"], found["rounds"], found["last_session"]) == ([], [], None)
    assert (found["rounds_done"], found["rounds_wanted"], found["running"]) == (0, 7, False)
    assert (found["key"], found["authority"]) == (made.key.public.key_id, made.root.fingerprint)
    assert any("coordinator publish" in line for line in lines_of(found))
    made.registry.close()


def test_the_status_lists_versions_rounds_dropouts_and_the_last_session(
    fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = fleet_of(6, rounds=3, aggregation__session_rounds=2)
    with caplog.at_level(logging.INFO, "edgeadapt"):
        records = fleet.federate(fleet.grid(forced_dropouts=1))
    ends = [each.getMessage().partition(": ")[2] for each in caplog.records if hasattr(each, "record")]
    assert ends == [
        *2 * ["6 of 6 devices are in the sum; dropouts: 1 after it"],
        "5 of 6 devices are in the sum; dropouts: 1 before it",
    ]
    found = status(fleet)
    assert [version["version"] for version in found["versions"]] == [0, 1, 2, 3]
    assert [(each["round"], each["version"]) for each in found["rounds"]] == [(1, 1), (2, 2), (3, 3)]
    assert found["dropouts_by_step"] == {"survivors": 1, "unmask": 1, "plan": 1}
    assert found["device_rounds"] == 18
    assert [each["dropped"] for each in found["rounds"]] == [record.dropped for record in records]
    session = {"log": "session-000002.log", "devices": 6, "rounds": 1, "step": None, "closed": True}
    times = [found["last_session"][name] for name in ("began", "latest")]
    assert found["last_session"] == session | {"began": times[0], "latest": times[1]}
    ended = [each["ended"] for each in found["rounds"]]
    assert ended == [timestamp(record.ended) for record in records]
    assert [*ended[:2], *times] == sorted([*ended[:2], *times])
    assert times[1] >= ended[2] >= times[0]
    text = "\n".join(lines_of(found))
    assert "rounds 3 of 3, 0 aborted" in text
    assert "dropouts 3 of 18 device-rounds: 1 at survivors, 1 at unmask, 1 at plan" in text
    assert f"last session session-000002.log, {times[0]} to {times[1]}: 6 devices, 1 rounds, closed" in text
    assert f"  {ended[2]}\n" in f"{text}\n"


def test_a_status_during_a_run_says_so_and_does_not_disturb_it(fleet_of: FleetOf) -> None:
    from client.node.app import app

    fleet, found = fleet_of(4, rounds=2), list[dict[str, Any]]()

    def look(message: Any, context: Any) -> Any:
        if message.metadata.message_type.endswith("unmask") and not found:
            found.append(status(fleet))
        return app(message, context)

    assert [record.version for record in fleet.federate(fleet.grid(app=look))] == [1, 2]
    assert (found[0]["running"], found[0]["rounds_done"], found[0]["last_session"]["closed"]) == (True, 0, False)
    assert found[0]["last_session"]["step"] == {"name": "unmask", "answered": 0}
    assert not status(fleet)["running"]


def test_a_run_that_begins_while_somebody_looks_whether_one_runs_is_not_refused(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statedir, "PATIENCE", 60.0)
    folder = fleet_of(3).out / "coordinator"
    state_dir, held, look = CoordinatorStateDir.open(folder), threading.Event(), threading.Event()

    def looking() -> None:
        with storage.locked(folder / statedir.LOCK):
            held.set()
            look.wait(0.3)

    with ThreadPoolExecutor(1) as pool:
        looked = pool.submit(looking)
        assert held.wait(60)
        with state_dir.locked():
            assert state_dir.in_use
        looked.result()
    state_dir.registry.close()
