"""The status of a federation, before its first version, during and after its rounds."""

import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError
from aggregation.groups import deal
from aggregation.pki.identity import IdentityKey
from coordinator import runstate, statedir
from coordinator.cli import coordinator_group
from coordinator.runstate import FILE, Ending, GatewaySnapshot, Need, RunRecord, Stopped, read
from coordinator.settings import FederationSettings
from coordinator.statedir import LOCK, CoordinatorStateDir
from coordinator.status import device_lines, device_rows, farthest, lines_of, status_of
from edgeadapt.formats import storage
from edgeadapt.formats.jsontext import timestamp
from edgeadapt.formats.manifest import GroupRecord, RoundRecord
from tests.support import FleetOf
from tests.support.gateway import wait_until
from tests.support.registry import Rounds


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


# Which devices a federation's status names because of their groups.
NAMES = [f"device-{number:02d}" for number in range(30)]


def rounds(count: int, liar: str, seed: int = 1) -> list[RoundRecord]:
    """Rounds of five groups, of which that with the liar is the farthest."""
    record, rng = Rounds(IdentityKey(bytes(32))).record(1), np.random.default_rng(seed)
    found = []
    for number in range(count):
        dealt = deal(f"{number:064x}", NAMES, 5)
        members = [tuple(name for name in NAMES if dealt[name] == each) for each in range(5)]
        groups = tuple(GroupRecord(each, float(rng.uniform(1, 2)) + 9 * (liar in each)) for each in members)
        found.append(replace(record, round=number + 1, groups=groups))
    return found


def test_the_device_that_is_always_in_the_farthest_group_is_named_first() -> None:
    found = farthest(rounds(12, NAMES[7]))
    assert next(iter(found)) == NAMES[7]
    assert found[NAMES[7]] == {"rounds": 12, "farthest": 12, "chance": 0.2**12}
    assert len(found) <= 3  # by chance, some are often with it


def test_without_a_liar_as_many_are_named_as_chance_has_it() -> None:
    named = sum(len(farthest(rounds(40, "nobody", seed))) for seed in range(20))
    assert named < 20 * len(NAMES) * 0.01 * 2


def test_the_device_that_was_in_no_sum_for_the_longest_is_listed_first() -> None:
    one = replace(Rounds(IdentityKey(bytes(32))).record(1), aborted=None, survivors=("a", "b", "c"), dropped={})
    records = [
        replace(one, survivors=("a", "b"), dropped={"d": "plan"}, ended=60),
        replace(one, round=2, survivors=("a", "c"), dropped={"d": "plan", "b": "input"}, ended=120),
        replace(one, round=3, survivors=("a",), aborted="few", reason="few", version=None, adapter=None, sum=None),
    ]
    rows = device_rows(records)
    assert [(row["device"], row["sums"], row["round"], row["dropped"]) for row in rows] == [
        ("d", 0, None, {"plan": 2}),
        ("b", 1, 1, {"input": 1}),
        ("a", 2, 2, {}),
        ("c", 1, 2, {}),
    ]
    assert rows[1]["ended"] == "1970-01-01T00:01:00Z"
    assert list(device_lines(rows))[1:3] == [
        "d          0     -  -                     2 at plan",
        "b          1     1  1970-01-01T00:01:00Z  1 at input",
    ]


# What a run does and waits for, as it writes it down, and as everybody else reads it.
HOUR = timedelta(hours=1)


def waiting(folder: Path, need: Need = Need.DEVICES) -> RunRecord:
    record = RunRecord(folder)
    record.waits(need, 2, 3)
    return record


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets an hour pass, by both clocks of a run's record."""
    passed = [0.0]
    monkeypatch.setattr(runstate.time, "time", lambda now=time.time: now() + passed[0])
    monkeypatch.setattr(runstate.time, "monotonic", lambda now=time.monotonic: now() + passed[0])

    def pass_hour() -> None:
        passed[0] += HOUR.total_seconds()

    return pass_hour


def test_a_wait_begins_once_and_a_session_is_progress(tmp_path: Path, later: Callable[[], None]) -> None:
    record = waiting(tmp_path)
    since = read(tmp_path).since
    later()
    record.waits(Need.SESSION, 4, 3, 1, 20)
    record.failed("check-ins", "2 devices answered, 3 are needed")
    found = read(tmp_path)
    assert (found.since, found.waits_for, found.attempt, found.sessions) == (since, Need.SESSION, 1, {"check-ins": 1})
    assert found.wait == "makes a session: 4 devices are there, 3 are needed, attempt 1 of 20"
    (reason,) = runstate.lines(found.row())
    assert reason.endswith("2 devices answered, 3 are needed")
    record.made()
    found = read(tmp_path)
    assert (found.waits_for, found.reason, found.sessions) == (None, "", {"check-ins": 1, "made": 1})
    assert found.since != since
    assert [*runstate.lines(found.row())] == []


def test_answers_in_a_round_are_progress_and_those_in_an_attempt_at_a_session_are_not(
    tmp_path: Path, later: Callable[[], None]
) -> None:
    record = waiting(tmp_path, Need.SESSION)
    since = read(tmp_path).since
    for number, moved in ((0, False), (7, True)):
        later()
        record.asks("plan", number, 4, 3, 600.0)
        record.answered()
        record.refused("plan", "", "of kitchen", "of a device")
        record._update()  # as each sign of life does
        found = read(tmp_path)
        assert (found.since != since, found.step and found.step.answered) == (moved, 1)
    assert found.wait == "waits for answers to plan of round 7: 1 answered, 3 are needed, 4 were asked"


@pytest.mark.parametrize("ending", [EdgeAdaptError, "kill"])
def test_a_run_soon_after_one_that_failed_waits_since_then(tmp_path: Path, ending: Any, later: Any) -> None:
    patience = 2 * HOUR.total_seconds()

    def begun(patience: float) -> runstate.RunState:
        with RunRecord(tmp_path).living(patience):
            return read(tmp_path)

    if ending == "kill":
        RunRecord(tmp_path)._begin(patience)
    else:
        with pytest.raises(ending), RunRecord(tmp_path).living(patience):
            raise ending("why")
    before = read(tmp_path)
    later()
    found = begun(patience)
    assert (found.since, found.process and found.process.failures) == (before.since, 1)
    assert found.process is not None
    assert found.process.ticks - found.since_ticks == pytest.approx(HOUR.total_seconds(), abs=60)
    (tmp_path / FILE).write_bytes(json.dumps(asdict(before)).encode())
    assert begun(HOUR.total_seconds() / 2).since != before.since  # nobody waited meanwhile
    later()
    assert begun(patience).since != before.since  # the last one ended well


def test_a_reboot_between_two_runs_begins_the_monotonic_clock_again(tmp_path: Path) -> None:
    RunRecord(tmp_path)._begin(60.0)  # and is killed
    before = read(tmp_path)
    stale = replace(before, since_ticks=1e9, process=replace(before.process, ticks=1e9))
    (tmp_path / FILE).write_bytes(json.dumps(asdict(stale)).encode())
    with RunRecord(tmp_path).living(60.0):
        found = read(tmp_path)
    assert abs(found.since_ticks - before.since_ticks) < 60


def test_progress_forgets_the_failures_before_it(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    for _ in range(2):
        with pytest.raises(EdgeAdaptError), record.living(60.0):
            raise EdgeAdaptError("no space")
    found = read(tmp_path).process
    assert found is not None
    assert (found.failures, found.error, found.ending) == (2, "no space", Ending.FAILED)
    with record.living(60.0):
        record.moved()
        found = read(tmp_path).process
        assert found is not None
        assert (found.failures, found.error, found.ended) == (0, "", None)


def test_a_run_shows_signs_of_life_while_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runstate, "EVERY", 0.01)
    monkeypatch.setattr(runstate, "BEAT", 0.02)
    with RunRecord(tmp_path).living(60.0):
        first = read(tmp_path).process
        assert first is not None
        wait_until(lambda: (now := read(tmp_path).process) is not None and now.ticks > first.ticks)


def test_a_coordinator_that_waits_for_the_lease_waits_for_no_device(tmp_path: Path, later: Callable[[], None]) -> None:
    record = waiting(tmp_path)
    since = read(tmp_path).since
    later()
    record.leads()
    assert read(tmp_path).since == since  # it did not wait for the lease
    waiting(tmp_path, Need.LEASE)
    assert read(tmp_path).since != since
    since = read(tmp_path).since
    later()
    waiting(tmp_path, Need.LEASE)
    assert read(tmp_path).since == since
    RunRecord(tmp_path).leads()
    assert read(tmp_path).waits_for is None


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
    with record.living(60.0), record.observing(lambda: now[0]):
        wait_until(lambda: read(tmp_path).gateway == now[0])
        now[0] = GatewaySnapshot("127.0.0.1:1", 3, 2, {"0.1.0": 3}, {"admitted": 3})
        wait_until(lambda: read(tmp_path).gateway == now[0])
        assert read(tmp_path).row(running=False)["gateway"] is None  # as after a kill
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

    assert called("--stuck-after", "0").exit_code == 0  # no run has begun
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
    down = called()  # at once: nothing starts the run again
    assert down.exit_code == 7
    assert "nothing runs: the run failed" in down.stdout
    assert "2 devices answered, 3 are needed" in down.stdout
    assert "down: nothing runs" in down.stderr
    as_json = called("--json")
    found = json.loads(as_json.stdout)
    assert (as_json.exit_code, found["run"]["sessions"], found["health"]["condition"]) == (7, {"check-ins": 2}, "down")
    assert {each["health"]["condition"] for each in seen} == {"moving", "waiting"}  # the second attempt


def test_a_status_in_text_has_the_last_ten_rounds(fleet_of: FleetOf) -> None:
    fleet = fleet_of(3, rounds=12)
    fleet.federate(fleet.grid())
    listed = [line for line in lines_of(status(fleet)) if line.startswith("   ") and line.split()[0].isdigit()]
    assert [int(line.split()[0]) for line in listed] == [*range(3, 13)]
    assert any(line.startswith("2 rounds before these") for line in lines_of(status(fleet)))


def test_how_a_run_ended_is_noted(fleet_of: FleetOf) -> None:
    state_dir = CoordinatorStateDir.open(fleet_of(3).out / "coordinator")
    for kind, ending in (
        (Stopped, Ending.STOPPED),
        (KeyboardInterrupt, Ending.STOPPED),
        (SystemExit, Ending.STOPPED),
        (EdgeAdaptError, Ending.FAILED),
        (OSError, Ending.FAILED),
    ):
        with pytest.raises(kind), state_dir.leading():
            raise kind("")
        found = read(state_dir.folder)
        assert found.process is not None
        assert found.process.ending is ending
    state_dir.registry.close()
