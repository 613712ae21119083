"""What a tracker has afterwards is what the suite found. Each tracker is the real one, where it is installed."""

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from aggregation.errors import ConfigError
from simulations.plan import SearchOutcome, Suite
from simulations.report.summary import Found
from simulations.report.track import MLFLOW_FILE, SERVER, TrackedRun, to_mlflow, to_tensorboard, tracked_runs
from simulations.result import RoundPoint, TrialResult
from tests.support import refused

CHOSEN = SearchOutcome({"personal.epochs": 2}, (({}, 0.5),), 1.0)


@pytest.fixture
def suite(suite_of: Callable[..., Suite]) -> Suite:
    arms = {"base": {"kind": "base"}, "personal": {"kind": "personal", "set": {"federation.rounds": 3}}}
    return suite_of(arms, set={"adapter.rank": 4})


@pytest.fixture
def found(result_of: Callable[..., TrialResult]) -> Found:
    points = (RoundPoint(1, None, 10.0), RoundPoint(2, 0.75, 20.0))
    personal = {s: replace(result_of(5 + s, 7, 9, unseen=1, bytes_up=20.0), rounds=points) for s in (0, 1)}
    return {
        "base": (SearchOutcome({}, (), 0.0), {s: result_of(1, 2, 3, unseen=1) for s in (0, 1)}),
        "personal": (CHOSEN, personal),
    }


def test_a_run_has_the_keys_figures_costs_and_rounds_of_its_arm_and_seed(suite: Suite, found: Found) -> None:
    runs = {run.name: run for run in tracked_runs(suite.settings, found)}
    assert list(runs) == ["base-seed-0", "base-seed-1", "personal-seed-0", "personal-seed-1"]
    run = runs["personal-seed-1"]
    assert run.settings == {
        "arm": "personal",
        "kind": "personal",
        "seed": "1",
        "adapter.rank": "4",
        "federation.rounds": "3",
        "personal.epochs": "2",
    }
    assert run.metrics["accuracy_mean"] == pytest.approx((0.6 + 0.7) / 2)
    assert run.metrics["accuracy_unseen"] == pytest.approx(0.9)
    assert run.metrics["bytes_up"] == 20
    assert run.by_round == ("round_accuracy", {2: 0.75})
    assert "bytes_up" not in runs["base-seed-0"].metrics


def test_mlflow_has_every_run(suite: Suite, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv(SERVER, raising=False)
    place = to_mlflow("mine", tracked_runs(suite.settings, found), tmp_path)
    assert place.endswith(MLFLOW_FILE)
    with sqlite3.connect(tmp_path / MLFLOW_FILE) as database:
        names = {name for (name,) in database.execute("select name from runs")}
        assert names == {run.name for run in tracked_runs(suite.settings, found)}
        wanted = "select value from latest_metrics join runs using (run_uuid) where name = ? and key = ?"
        assert database.execute(wanted, ("personal-seed-1", "accuracy_mean")).fetchone()[0] == pytest.approx(0.65)
        assert database.execute(wanted, ("personal-seed-1", "round_accuracy")).fetchone()[0] == 0.75
        keys = "select params.value from params join runs using (run_uuid) where name = ? and key = 'personal.epochs'"
        assert database.execute(keys, ("personal-seed-0",)).fetchone()[0] == "2"


def test_mlflow_that_does_not_answer_is_named(
    suite: Suite, found: Found, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv(SERVER, "http://127.0.0.1:9")  # the port of the discard service, which nobody runs
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with refused(ConfigError, SERVER):
        to_mlflow("mine", tracked_runs(suite.settings, found), tmp_path)


def test_tensorboard_has_every_run(suite: Suite, found: Found, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = Path(to_tensorboard("mine", tracked_runs(suite.settings, found), tmp_path))
    assert {path.name for path in place.iterdir()} == {run.name for run in tracked_runs(suite.settings, found)}
    events = EventAccumulator(str(place / "personal-seed-1"))
    events.Reload()
    assert events.Scalars("accuracy_mean")[0].value == pytest.approx(0.65)
    assert [(each.step, each.value) for each in events.Scalars("round_accuracy")] == [(2, 0.75)]


@pytest.mark.parametrize(("track", "module"), [(to_mlflow, "mlflow"), (to_tensorboard, "torch.utils.tensorboard")])
def test_a_tracker_that_is_not_installed_is_named_with_its_extra(
    track: Callable[..., str], module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, module, None)
    runs: list[TrackedRun] = []
    with refused(ConfigError, "--track"):
        track("mine", iter(runs), tmp_path)
    assert list(tmp_path.iterdir()) == []
