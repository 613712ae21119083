"""The verdict on a fleet of real processes: agents that hang in a round, a run that hangs, and processes that are
killed. Each surface says the same: the command and its exit code, what the page draws, and the metrics."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.steps import Step
from benchmarks.faults import measure
from benchmarks.faults.fleet import FaultFleet, running_fleet
from coordinator import health
from coordinator.cli import coordinator_group
from coordinator.dashboard.view import Viewer, exposition
from coordinator.settings import SETTINGS
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats.storage import kill_safe
from tests.support.gateway import wait_until

pytestmark = pytest.mark.slow

LONG = 300.0  # seconds, on a machine that has other work


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultFleet]:
    """Four devices, three of which a round needs; nothing may move for as long as devices have for an answer."""
    with kill_safe(), running_fleet(tmp_path_factory.mktemp("health") / "fleet", 4) as made:
        path = made.first.folder / SETTINGS
        text = path.read_text().replace("deadline = 60.0", "deadline = 8.0")
        path.write_text(text.replace("stuck_after = 900.0", "stuck_after = 8.0"))
        measure.attend(made)
        yield made


@contextmanager
def viewed(fleet: FaultFleet) -> Iterator[Viewer]:
    state_dir = CoordinatorStateDir.open(fleet.first.folder)
    try:
        yield Viewer(state_dir)
    finally:
        state_dir.registry.close()


def shows(viewer: Viewer, condition: str, code: int, *, restart: bool) -> dict[str, Any]:
    """Wait for a condition, and check that every surface has it."""
    wait_until(lambda: viewer.look()["health"]["condition"] == condition, LONG)
    called = CliRunner().invoke(coordinator_group, ["status", str(viewer.state_dir.folder)])
    view = viewer.look()
    found: dict[str, Any] = view["health"]
    assert (called.exit_code, found["condition"]) == (code, condition), called.output
    assert f"\n{condition}: {found['text']}" in called.stdout
    metrics = exposition(view).decode()
    assert f"edgeadapt_healthy {float(code == 0)}" in metrics
    assert f'edgeadapt_condition{{condition="{condition}"}} 1.0' in metrics
    probe = CliRunner().invoke(coordinator_group, ["status", str(viewer.state_dir.folder), "--liveness"])
    assert probe.exit_code == (7 if restart else 0), probe.output
    return found


def test_a_round_whose_devices_hang_is_stuck_and_one_whose_run_is_killed_is_down(
    fleet: FaultFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    with viewed(fleet) as viewer:
        shows(viewer, "new", 0, restart=False)
        fleet.start()
        fleet.await_version(0, "a round")
        assert viewer.look()["health"]["healthy"]

        fleet.await_step(fleet.names[0], Step.PLAN)
        hung = [fleet.agents[name].process for name in fleet.names[:3]]
        for process in hung:
            process.send_signal(signal.SIGSTOP)
        found = shows(viewer, "stuck", 7, restart=False)
        assert " 3 are needed, 4 were asked" in found["text"] or "makes a session" in found["text"]
        for process in hung:
            process.send_signal(signal.SIGCONT)
        done = len(fleet.records())
        fleet.await_version(done, "a round after that")
        wait_until(lambda: viewer.look()["health"]["healthy"], LONG)

        monkeypatch.setattr(health, "HUNG", 6.0)
        assert fleet.first.up is not None
        fleet.first.signal(signal.SIGSTOP)  # also ``up``, which would start it again
        shows(viewer, "hung", 7, restart=True)
        fleet.first.signal(signal.SIGCONT)
        fleet.first.kill()
        found = shows(viewer, "down", 7, restart=True)
        assert "killed" in found["text"]


def test_up_that_is_killed_ends_its_services_and_the_fleet_is_down_at_once(fleet: FaultFleet) -> None:
    with viewed(fleet) as viewer:
        fleet.first.start()
        fleet.await_version(len(fleet.records()), "a round")
        assert fleet.first.up is not None
        fleet.first.up.end()  # and nothing else
        fleet.first.up = None
        shows(viewer, "down", 7, restart=True)
        fleet.first.start()
        fleet.await_version(len(fleet.records()), "a round of the next run")
        wait_until(lambda: viewer.look()["health"]["condition"] == "moving", LONG)
        fleet.first.stop()
        assert viewer.look()["health"]["condition"] in ("stopped", "down")  # by the clock


def test_up_that_cannot_start_for_its_certificate_leaves_a_fleet_that_says_so(fleet: FaultFleet) -> None:
    path: Path = fleet.first.folder / "tls.pem"
    good = path.read_bytes()
    path.write_bytes(b"nonsense")
    with viewed(fleet) as viewer:
        fleet.first.start()
        assert fleet.first.up is not None
        assert fleet.first.up.process.wait(LONG) == 4
        found = shows(viewer, "stuck", 7, restart=True)  # a probe knows only that nothing runs
        assert [each["about"] for each in found["problems"]] == ["tls.pem"]
        path.write_bytes(good)
        shows(viewer, "down", 7, restart=True)
