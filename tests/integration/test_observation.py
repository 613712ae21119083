"""Rounds of observation with the real apps: what devices counted on past days is summed, and a change is found.

The devices have bundles of a channel, as those that are evaluated. The base is tiny, and so is the noise.
"""

import json
import tomllib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import CliRunner

from aggregation.errors import ConfigError, EdgeAdaptError
from client.inference.usage import Usage, today
from client.node.privacyledger import PrivacyLedger
from client.node.statedir import SETTINGS
from coordinator.dashboard.view import Viewer, exposition
from coordinator.settings import CohortSettings, FederationSettings
from coordinator.statedir import CoordinatorStateDir
from coordinator.status import lines_of, status_of
from edgeadapt.bases.base import Base
from edgeadapt.program import cli
from edgeadapt.promotion.gates import GateError
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.rollback import prepare
from edgeadapt.rounds.observation import DEVICES, NOISE, keys
from export.bundle.sources import from_registry
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from tests.support import refused
from tests.support.hostile import audit_failures
from tests.support.rollout import MARGIN, StagedFleet, louder, run
from tests.support.rollout import NOISE as BARE

FLEET, ANSWERS, WEEK = 8, 40, 7
# First days of two weeks, of which the second ended yesterday; between them is the day of a release.
BEFORE, AFTER = today() - 2 * WEEK - 1, today() - WEEK


def answered(bundle: Path, first: int, doubtful: int, adapter: str) -> None:
    """Count 40 answers a week, so many of them with a low probability, on the days from ``first`` on."""
    found = Usage.read(bundle) or Usage()
    for number in range(ANSWERS):
        probability = 0.2 if number < doubtful else 0.97
        found = found.plus(first + number % WEEK, keys("on", probability, 0.0, 0.01, adapter))
    found.write(bundle)


@pytest.fixture
def staged(app_fleet_of: Callable[..., Any], tiny_base: Base) -> StagedFleet:
    exported = export_classifier(with_mean_head(tiny_base, ["query", "value"]), tiny_base, Profile.FP32, training=True)
    settings = {"observation__noise_multiplier": BARE, "aggregation__keep_masked_inputs": True, "attempts": 1}
    found = StagedFleet.of(app_fleet_of(FLEET, rounds=1, **settings, aggregation__ring_bits=32), exported)
    found.publish("stable", from_registry(found.fleet.out / "coordinator", 0, None), 1)
    found.join()
    found.update()
    return found


def agree(staged: StagedFleet, devices: Sequence[str]) -> None:
    for device in devices:
        file = staged.fleet.state_dir(device).folder / SETTINGS
        settings = tomllib.loads(file.read_text())
        settings["policy"] |= {"observations": True}
        file.write_text(tomli_w.dumps(settings))


def released(staged: StagedFleet, at: datetime) -> None:
    """Roll a release out as if it was then, with a rollback that is prepared for a drift."""
    repository = staged.repository = replace(staged.repository, now=at)
    staged.publish("canary", louder(from_registry(staged.fleet.out / "coordinator", 0, None)), 2)
    repository.promote("canary", 1, "stable", (), share=50)
    prepare(repository, "stable", staged.key, MARGIN, drift=True)


def test_what_devices_answered_is_summed_by_week_and_a_change_is_found(staged: StagedFleet) -> None:
    fleet, folder = staged.fleet, staged.fleet.out / "coordinator"
    fleet.federate(fleet.grid())
    agreeing = staged.devices[2:]
    agree(staged, agreeing)
    counting = agreeing[:-1]  # the last device counts nothing
    for device in counting:
        Usage.begin(staged.bundle(device))
        answered(staged.bundle(device), BEFORE, 4, "a" * 64)
        answered(staged.bundle(device), AFTER, 10, "b" * 64)
        answered(staged.bundle(device), today(), 40, "b" * 64)  # a day that is not over
    spent = {device: fleet.state_dir(device).load(PrivacyLedger) for device in staged.devices}

    last = datetime.now(UTC).date() - timedelta(days=WEEK + 2)
    ask = ("coordinator", "observe", folder, "--of", "doubt", "--of", "adapter", "--release", "b" * 64, "--days", WEEK)
    row = json.loads(run(*ask, "--until", last, "--json"))
    assert (row["round"], row["since"]) == (2, BEFORE)
    record = fleet.federate(fleet.grid())[-1]
    assert (set(record.survivors), record.dropped) == (set(agreeing), {})
    assert record.metrics[DEVICES] == pytest.approx(len(counting), abs=0.5)
    assert record.metrics["doubt.0"] == pytest.approx(0.1 * len(counting), abs=8 * record.metrics[NOISE])
    assert record.metrics["adapter.bbbbbbbbbbbb"] == pytest.approx(0.0, abs=8 * record.metrics[NOISE])
    with refused(ConfigError, "observation"):
        run("release", "drift", folder)

    run(*ask)
    record = fleet.federate(fleet.grid())[-1]
    assert record.metrics["doubt.0"] == pytest.approx(0.25 * len(counting), abs=8 * record.metrics[NOISE])
    assert record.metrics["adapter.bbbbbbbbbbbb"] == pytest.approx(0.3 * len(counting), abs=8 * record.metrics[NOISE])
    with refused(GateError, "drift"):
        run("release", "drift", folder)
    assert audit_failures(folder) == set()
    opened = CoordinatorStateDir.open(folder)
    told = "\n".join(lines_of(status_of(opened)))
    assert "observed doubt: probability below .5 0.2" in told
    assert "the answers have changed between rounds 2 and 3" in told
    assert b"edgeadapt_drift 1.0" in exposition(Viewer(opened).look())
    opened.registry.close()
    released(staged, datetime.now(UTC) - timedelta(days=WEEK + 1))
    watch = "release", "watch", folder, "stable", "--releases", staged.folder, "--once"
    assert "release 3 is release 1 again" in run(*watch)
    log = audit_repository(staged.folder, None).records
    assert (log[-1].action.kind, log[-1].action.drift.after.round) == ("rollback", 3)  # type: ignore[union-attr]
    for device in staged.devices:  # also one that agrees and counts nothing has spent
        assert (fleet.state_dir(device).load(PrivacyLedger) != spent[device]) == (device in agreeing)
    assert fleet.registry().version(3).manifest.rule.name == "Observation"
    with refused(ConfigError, "--until"):
        run(*ask, "--until", datetime.now(UTC).date())


def test_too_few_owners_who_agree_are_waited_for_and_the_status_counts_them(staged: StagedFleet) -> None:
    fleet, folder = staged.fleet, staged.fleet.out / "coordinator"
    fleet.federate(fleet.grid())
    agree(staged, staged.devices[:2])
    run("coordinator", "observe", folder)
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid())
    status = CliRunner().invoke(cli, ["coordinator", "status", str(folder)])
    assert f"2 of {FLEET} devices agreed to contribute observations" in status.output
    assert "3 are needed" in status.output
    agree(staged, staged.devices[2:7])
    settings = FederationSettings.read(folder / "federation.toml")
    cohort = {"cohort": CohortSettings(size=6, over_selection=1.0)}
    (folder / "federation.toml").write_text(settings.model_copy(update=cohort).to_toml())
    survivors = fleet.federate(fleet.grid())[-1].survivors  # a cohort is drawn from all who agree
    assert len(survivors) == 6
    assert {*survivors} < {*staged.devices[:7]}


def test_counts_of_a_session_are_those_of_its_begin(staged: StagedFleet) -> None:
    """An answer after it, or counts that are erased, change nothing that the device contributes to it."""
    device = staged.devices[0]
    agree(staged, [device])
    state = staged.fleet.state_dir(device)
    Usage.begin(staged.bundle(device))
    answered(staged.bundle(device), AFTER, 10, "b" * 64)
    state.take_snapshot(b"", b"k" * 32)
    before = state.load_snapshot(b"k" * 32)
    assert Usage(before.usage).counts(AFTER, WEEK) == Counter(Usage.read(staged.bundle(device)).counts(AFTER, WEEK))  # type: ignore[union-attr]
    run("device", "usage", "--bundle", staged.bundle(device), "--erase")
    assert state.load_snapshot(b"k" * 32) == before
    state.take_snapshot(b"", b"k" * 32)
    assert state.load_snapshot(b"k" * 32).usage == ()
