"""The verdict on a federation, as a pure function of the record, of what is around it, and of the time."""

from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.errors import EdgeAdaptError
from coordinator import health
from coordinator.cli import coordinator_group
from coordinator.health import FAILURES, HUNG, Condition, Problem, Surroundings, Verdict, seen, verdict
from coordinator.runstate import Ending, Need, RunProcess, RunRecord, RunState, StepUnderWay, read
from coordinator.settings import SERVICES, SETTINGS, ServiceSettings
from coordinator.statedir import LOCK, SERVICES_LOCK, CoordinatorStateDir
from coordinator.status import StuckError, operation_of, require_health
from edgeadapt.formats import storage
from edgeadapt.formats.jsontext import timestamp
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from tests.support import FleetOf, refused
from tests.support.gateway import authority_of, certify

NOW = datetime(2026, 12, 1, 12, tzinfo=UTC)
TICKS = 50_000.0
PATIENCE = 900.0
ALIVE = RunProcess(4711, "2026-12-01T08:00:00Z", timestamp(NOW.timestamp()), TICKS)
AROUND = Surroundings(running=True, supervised=True, left=3, patience=PATIENCE)
GONE = replace(AROUND, running=False, supervised=False)


def ago(seconds: float) -> str:
    return timestamp(NOW.timestamp() - seconds)


def state(seconds: float = 0.0, need: Need | None = None, **facts: Any) -> RunState:
    """A run whose process lives, in which nothing has moved for so many seconds."""
    return replace(RunState(need, ago(seconds), TICKS - seconds, process=ALIVE), **facts)


def judge(found: RunState, around: Surroundings = AROUND, after: float = 0.0) -> Verdict:
    return verdict(found, around, NOW + timedelta(seconds=after), TICKS + after)


def ended(ending: Ending | None, seconds: float, **facts: Any) -> RunState:
    """A run that ended, or was killed, so many seconds ago."""
    over = None if ending is None else ago(seconds)
    return state(process=replace(ALIVE, beat=ago(seconds), ended=over, ending=ending, **facts), seconds=seconds)


PLAN = StepUnderWay("plan", 7, asked=4, needed=3, answered=1, allowed=600.0)
STALLED = {"need": Need.ANSWERS, "step": PLAN}


def test_a_step_of_a_round_is_stuck_after_the_patience_and_says_how_many_answered() -> None:
    assert judge(state(PATIENCE - 1, **STALLED)).condition is Condition.MOVING
    found = judge(state(PATIENCE + 1, **STALLED))
    assert (found.condition, found.healthy, found.since, found.left) == (Condition.STUCK, False, ago(PATIENCE + 1), 3)
    assert found.text == "waits for answers to plan of round 7: 1 answered, 3 are needed, 4 were asked"
    assert found.remedy
    assert not found.restart  # which brings no device back


def test_devices_have_their_time_for_an_answer_however_short_the_patience() -> None:
    slow = {**STALLED, "step": replace(PLAN, allowed=3600.0)}
    assert judge(state(3599, **slow)).healthy
    assert not judge(state(3601, **slow)).healthy
    assert not judge(state(PATIENCE + 1, **slow), replace(AROUND, deadlines=False)).healthy  # --stuck-after


@pytest.mark.parametrize("need", [Need.DEVICES, Need.SESSION, Need.REVOCATIONS])
def test_a_wait_for_somebody_is_healthy_for_the_patience(need: Need) -> None:
    assert judge(state(PATIENCE - 1, need, attempt=2)).condition is Condition.WAITING
    assert judge(state(PATIENCE + 1, need, attempt=2)).condition is Condition.STUCK
    night = replace(AROUND, patience=20 * 3600.0)  # stuck_after where devices take part at night
    assert judge(state(16 * 3600, need, attempt=2), night).healthy


@pytest.mark.parametrize("need", [Need.LEASE, Need.INTERVAL, Need.EVALUATION])
def test_a_wait_that_is_as_it_should_be_is_healthy_for_ever_while_its_process_lives(need: Need) -> None:
    assert judge(state(1e6, need)).condition is Condition.IDLE
    assert judge(state(1e6, need), after=HUNG + 1).condition is Condition.HUNG


def test_a_run_that_computes_for_too_long_is_stuck() -> None:
    assert judge(state(PATIENCE - 1)).condition is Condition.MOVING
    assert judge(state(PATIENCE + 1)).condition is Condition.STUCK


def test_a_process_without_a_sign_of_life_hangs_and_another_one_would_help() -> None:
    assert judge(state(), after=HUNG - 1).healthy
    found = judge(state(), after=HUNG + 1)
    assert (found.condition, found.healthy, found.restart) == (Condition.HUNG, False, True)
    assert "4711" in found.text


@pytest.mark.parametrize("hours", [-48, 48])
def test_a_calendar_that_jumps_makes_no_running_fleet_stuck_or_hung_and_hides_no_stuck_one(hours: int) -> None:
    jumped = NOW + timedelta(hours=hours)
    assert verdict(state(10, **STALLED), AROUND, jumped, TICKS).condition is Condition.MOVING
    found = verdict(state(PATIENCE + 1, **STALLED), AROUND, jumped, TICKS)
    assert (found.condition, found.seconds) == (Condition.STUCK, PATIENCE + 1)


def test_a_killed_run_is_down_at_once_unless_up_starts_it_again() -> None:
    found = judge(ended(None, 3), GONE)
    assert (found.condition, found.healthy, found.restart) == (Condition.DOWN, False, True)
    again = replace(GONE, supervised=True)
    assert judge(ended(None, 3), again).condition is Condition.WAITING
    late = judge(ended(None, PATIENCE + 1), again)
    assert (late.condition, late.restart) == (Condition.HUNG, True)  # ``up`` itself


def test_a_run_of_before_a_reboot_is_down_and_not_hung_whoever_has_its_number_now() -> None:
    old = ended(None, 3600)
    before = replace(old, since_ticks=9e9, process=replace(ALIVE, beat=ago(3600), ticks=9e9))
    found = judge(before, GONE)
    assert (found.condition, found.seconds) == (Condition.DOWN, 3600)


def test_a_run_that_failed_is_down_at_once_with_its_error() -> None:
    found = judge(ended(Ending.FAILED, 3, error="no session after 20 attempts"), GONE)
    assert (found.condition, found.error) == (Condition.DOWN, "no session after 20 attempts")
    assert "20 attempts" not in found.text  # it may name devices, and pages show the text


@pytest.mark.parametrize("ending", [Ending.STOPPED, Ending.DONE])
def test_a_run_that_was_stopped_on_purpose_with_rounds_left_is_down_after_the_patience(ending: Ending) -> None:
    assert judge(ended(ending, PATIENCE - 1), GONE).condition is Condition.STOPPED
    assert judge(ended(ending, PATIENCE + 1), GONE).condition is Condition.DOWN
    added = replace(GONE, since=NOW - timedelta(seconds=5))  # rounds, a moment ago
    assert judge(ended(ending, 1e6), added).condition is Condition.STOPPED


def test_a_finished_federation_is_done_whatever_became_of_its_process() -> None:
    full = (Problem("disk", "full"),)
    for found in (ended(None, 1e6), ended(Ending.FAILED, 1e6), state(1e6)):
        assert judge(found, replace(GONE, left=0, problems=full)).condition is Condition.DONE
    assert judge(ended(None, 1e6), replace(GONE, left=0, scheduled=True)).condition is Condition.DOWN


def test_a_federation_of_which_no_run_has_begun_is_new() -> None:
    assert judge(RunState(), GONE).condition is Condition.NEW
    assert judge(RunState(), replace(GONE, supervised=True)).condition is Condition.WAITING


def test_runs_that_fail_again_and_again_are_stuck_although_each_of_them_lives() -> None:
    assert judge(state(process=replace(ALIVE, failures=FAILURES - 1))).healthy
    assert judge(state(process=replace(ALIVE, failures=FAILURES))).condition is Condition.STUCK
    between = ended(Ending.FAILED, 3, failures=FAILURES)
    assert judge(between, replace(GONE, supervised=True)).condition is Condition.STUCK


def test_rounds_that_abort_one_after_the_other_are_no_progress() -> None:
    assert judge(state(), replace(AROUND, aborted=health.ABORTS - 1, reason="too-few")).healthy
    found = judge(state(), replace(AROUND, aborted=health.ABORTS, reason="too-few"))
    assert (found.condition, "too-few" in found.text) == (Condition.STUCK, True)


def test_what_keeps_rounds_from_going_on_is_named_and_no_restart_is_asked_for() -> None:
    full = Problem("disk", "the disk is full")
    for found, around in ((state(), AROUND), (ended(None, 5), GONE)):
        judged = judge(found, replace(around, problems=(full,)), after=HUNG + 1)  # nor can a sign of life be written
        assert (judged.condition, judged.restart) == (Condition.STUCK, False)
        assert judged.text.startswith("the disk is full")


def test_a_verdict_that_is_not_healthy_is_an_error_about_its_condition() -> None:
    require_health(judge(state()).row())
    with refused(StuckError, "health.stuck"):
        require_health(judge(state(1e6, **STALLED)).row())


# What is around a record, as it is found.
@pytest.fixture
def state_dir(fleet_of: FleetOf) -> Any:
    opened = CoordinatorStateDir.open(fleet_of(3).out / "coordinator")
    yield opened
    opened.registry.close()


def condition(state_dir: CoordinatorStateDir) -> str:
    return str(operation_of(state_dir)["health"]["condition"])


def test_a_state_directory_is_judged_by_its_locks(state_dir: CoordinatorStateDir) -> None:
    assert condition(state_dir) == "new"
    with state_dir.leading():
        assert condition(state_dir) == "moving"
    assert condition(state_dir) == "stopped"
    state_dir.run._begin(PATIENCE)  # and is killed
    assert condition(state_dir) == "down"
    with storage.locked(state_dir.folder / SERVICES_LOCK):
        assert condition(state_dir) == "waiting"


def test_a_run_that_ends_while_somebody_looks_was_not_killed(
    state_dir: CoordinatorStateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = [True, False]  # what the lock says; it is free from then on
    monkeypatch.setattr(storage, "is_locked", lambda path: bool(looks) and path.name == LOCK and looks.pop(0))
    with state_dir.run.living(PATIENCE):
        pass
    found, running, _ = seen(state_dir.folder)
    assert found.process is not None
    assert (found.process.ending, running) == (Ending.DONE, False)


def test_a_certificate_with_which_the_services_would_not_start_is_a_problem(
    fleet_of: FleetOf, state_dir: CoordinatorStateDir
) -> None:
    folder, other = state_dir.folder, authority_of(fleet_of(3))
    good = certify(authority_of_folder(folder))
    (folder / SERVICES).write_text(ServiceSettings(gateway="127.0.0.1:9443").to_toml())
    over = datetime.now(UTC) - timedelta(hours=1)
    for key, certificate in (
        (good[0], b"nonsense"),
        certify(authority_of_folder(folder), not_after=over),
        (certify(other)[0], good[1]),
        certify(other),
    ):
        (folder / TLS_KEY).write_bytes(key)
        (folder / TLS_CERTIFICATE).write_bytes(certificate)
        with state_dir.leading():
            found = operation_of(state_dir)["health"]
        assert (found["condition"], [each["about"] for each in found["problems"]]) == ("stuck", [TLS_CERTIFICATE])
    (folder / TLS_KEY).write_bytes(good[0])
    (folder / TLS_CERTIFICATE).write_bytes(good[1])
    assert operation_of(state_dir)["health"]["problems"] == []


def test_a_full_disk_is_a_problem(state_dir: CoordinatorStateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    state_dir.run._begin(PATIENCE)
    monkeypatch.setattr(health, "LEAST_DISK", 2**62)
    found = operation_of(state_dir)["health"]
    assert (found["condition"], [each["about"] for each in found["problems"]]) == ("stuck", [health.DISK])


def test_settings_that_change_are_read_again(state_dir: CoordinatorStateDir) -> None:
    folder = state_dir.folder
    before = operation_of(state_dir)["rounds_wanted"]
    text = (folder / SETTINGS).read_text()
    (folder / SETTINGS).write_text(text.replace(f"rounds = {before}", f"rounds = {before + 5}", 1))
    assert operation_of(state_dir)["rounds_wanted"] == before + 5
    (folder / SETTINGS).write_text("rounds = nonsense")
    assert operation_of(state_dir)["rounds_wanted"] == before


def test_a_liveness_probe_fails_only_where_another_process_helps_and_reads_no_registry(
    state_dir: CoordinatorStateDir,
) -> None:
    def code(*options: str) -> int:
        words = ["status", str(state_dir.folder), *options]
        return CliRunner().invoke(coordinator_group, words).exit_code

    database = state_dir.folder / "registry.db"
    database.rename(state_dir.folder / "away")
    assert code("--liveness") == 0
    with state_dir.leading():
        state_dir.run.waits(Need.DEVICES, 0, 3)
        assert code("--liveness", "--json") == 0
    with pytest.raises(EdgeAdaptError), state_dir.run.living(PATIENCE):
        raise EdgeAdaptError("why")
    assert code("--liveness") == 7
    with storage.locked(state_dir.folder / SERVICES_LOCK):
        assert code("--liveness") == 0  # ``up`` starts it again
    assert code("--liveness", "--rounds") != 0


def test_a_run_whose_up_was_killed_has_failed(state_dir: CoordinatorStateDir) -> None:
    def killed(up: ExitStack) -> None:
        with state_dir.leading():
            up.close()  # as the kernel frees the lock
            raise SystemExit(143)

    with ExitStack() as up:
        up.enter_context(storage.locked(state_dir.folder / SERVICES_LOCK))
        with pytest.raises(SystemExit):
            killed(up)
    found = read(state_dir.folder).process
    assert found is not None
    assert found.ending is Ending.FAILED


def authority_of_folder(folder: Path) -> Any:
    from aggregation.pki import Authority

    return Authority.from_pem((folder.parent / "authority" / "authority.pem").read_bytes())


def test_a_record_cannot_be_newer_than_its_writer(tmp_path: Path) -> None:
    record = RunRecord(tmp_path)
    with record.living(PATIENCE):
        found = read(tmp_path)
        assert found.process is not None
        assert found.since_ticks <= found.process.ticks
