"""Distribute an adapter that no logged round made, and pass the audit all the same.

The coordinator signs an adapter of its own making (a backdoor), puts it into its registry, and runs a session on top;
runs a session from an old adapter again, so that one version has two results; or asks for updates of an old adapter in
a round that it then aborts. Each log is sound by itself. The devices of these sessions join for the first time and have
seen nothing that contradicts the coordinator. An audit of all sessions follows the adapters from version 0 on, through
aborted rounds too, and finds each; without the check it passes.
"""

import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message

from aggregation.errors import TrustError
from aggregation.steps import Step
from aggregation.transcript.logstate import LogState
from client.node.app import app as client_app
from client.node.statedir import LOG_STATE
from coordinator import transcripts
from coordinator.registry import Registry
from coordinator.settings import Aggregation, FederationSettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt import program
from edgeadapt.auditing import Check, Finding, Recomputation, Status, recompute, rules
from edgeadapt.auditing.transcripts import logs
from edgeadapt.formats import files
from edgeadapt.formats.registryfiles import BLOBS, DATABASE, SIGNING_KEY, RegistryFiles, blob_name
from edgeadapt.rounds.task import Task
from tests.support import FleetOf, refused
from tests.support.hostile import continues_from_anything
from tests.support.trial import call

Audit = Callable[[Path], tuple[int, dict[str, Any]]]


@pytest.fixture
def audited(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Audit:
    """The real command: exit code and JSON."""

    def call(out: Path) -> tuple[int, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", ["edgeadapt", "audit", "verify", str(out), "--json"])
        with pytest.raises(SystemExit) as caught:
            program.main()
        return int(caught.value.code or 0), json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def fleet(app_fleet_of: FleetOf) -> Any:
    """A fleet after one session, of one round."""
    made = app_fleet_of(4, rounds=1, aggregation__session_rounds=1, aggregation__keep_masked_inputs=True)
    made.federate(made.grid())
    return made


def next_session(fleet: Any, app: Any = None) -> None:
    """One round more, in a session of its own, with devices that have seen nothing yet.

    The coordinator's own start does not refuse what its logs do not know.
    """
    for state_dir in fleet.nodes.values():
        (Path(state_dir) / LOG_STATE).unlink(missing_ok=True)
    fleet.configure({"rounds": len(fleet.registry().rounds()) + 1})
    with pytest.MonkeyPatch.context() as hostile:
        continues_from_anything(hostile)
        fleet.federate(fleet.grid(app=app))


def publish_by_hand(fleet: Any) -> int:
    """Put an adapter of the coordinator's own making into its registry, signed; returns its version."""
    state_dir, registry = CoordinatorStateDir.open(fleet.out / "coordinator"), fleet.registry()
    newest = registry.newest_adapter()
    blob = files.encode({name: value + np.float32(0.01) for name, value in newest.tensors.items()})
    version, digest = newest.manifest.version + 1, files.sha256(blob)
    forged = replace(newest.manifest, version=version, sha256=digest, size=len(blob), parent=newest.manifest.sha256)
    (state_dir.folder / BLOBS / blob_name(digest)).write_bytes(blob)
    with closing(sqlite3.connect(state_dir.folder / DATABASE)) as database, database:
        row = (version, digest, forged.sign(state_dir.key))
        database.execute("INSERT INTO edgeadapt_versions (version, sha256, manifest) VALUES (?, ?, ?)", row)
    return int(version)


def replace_by_hand(fleet: Any) -> int:
    """Exchange the newest version for an adapter of the coordinator's own making, signed; returns the version."""
    backdoor = publish_by_hand(fleet)
    state_dir, forged = CoordinatorStateDir.open(fleet.out / "coordinator"), fleet.registry().latest().manifest
    renumbered = replace(forged, version=backdoor - 1)
    with closing(sqlite3.connect(state_dir.folder / DATABASE)) as database, database:
        database.execute("DELETE FROM edgeadapt_versions WHERE version = ?", (backdoor,))
        database.execute(
            "UPDATE edgeadapt_versions SET sha256 = ?, manifest = ? WHERE version = ?",
            (renumbered.sha256, renumbered.sign(state_dir.key), renumbered.version),
        )
    return int(renumbered.version)


def no_answers(message: Message, context: Context) -> Message:
    """The real devices; their updates are withheld, so that the round is aborted."""
    if message.metadata.message_type.endswith(Step.PLAN.value):
        client_app(message, context)
        return Message(Error(7, "withheld"), reply_to=message)
    return client_app(message, context)


def test_a_session_on_top_of_an_adapter_that_was_published_by_hand_is_found(
    fleet: Any, audited: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert audited(fleet.out)[0] == 0
    backdoor = publish_by_hand(fleet)
    next_session(fleet)
    assert fleet.registry().latest().manifest.version == backdoor + 1
    code, printed = audited(fleet.out)
    assert (code, printed["ok"]) == (4, False)
    assert "session-000002.log starts from an adapter 2 that no session before it made" in printed["error"]
    monkeypatch.setattr("edgeadapt.auditing.transcripts.chain", lambda *given: None)
    assert audited(fleet.out)[0] == 0


def test_an_adapter_that_was_published_by_hand_before_the_first_session_is_found(
    app_fleet_of: FleetOf, audited: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = app_fleet_of(4, rounds=1)
    publish_by_hand(fleet)
    next_session(fleet)
    assert audited(fleet.out)[0] == 4
    monkeypatch.setattr("edgeadapt.auditing.transcripts._unmade", lambda *given: {})
    monkeypatch.setattr("edgeadapt.auditing.transcripts.chain", lambda *given: None)
    assert audited(fleet.out)[0] == 0


def test_an_adapter_that_was_published_by_hand_after_the_last_session_is_found(
    fleet: Any, audited: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    backdoor = publish_by_hand(fleet)
    code, printed = audited(fleet.out)
    assert (code, f"adapter {backdoor}" in printed["error"]) == (4, True)
    monkeypatch.setattr("edgeadapt.auditing.transcripts._require_logged", lambda *_, **__: None)
    assert audited(fleet.out)[0] == 0


@pytest.mark.parametrize("forge", [publish_by_hand, replace_by_hand])
def test_an_adapter_that_was_published_by_hand_is_not_exported(
    fleet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forge: Callable[[Any], int]
) -> None:
    """A device that opens a bundle does not see the logs."""
    backdoor = forge(fleet)
    registry, out = fleet.out / "coordinator", tmp_path / "out"
    to_peft = ("convert", "--format", "peft", "--out", out)
    for command in to_peft, ("add", "--key", registry / SIGNING_KEY, "--bundle", out):
        for version in (), ("--version", backdoor):
            with refused(TrustError, "record", value=backdoor):
                call("bundle", *command, "--registry", registry, *version)
    assert not out.exists()
    monkeypatch.setattr(RegistryFiles, "rounds", records_of_anything)
    call("bundle", *to_peft, "--registry", registry)
    assert (out / "adapter_model.safetensors").exists()


def records_of_anything(registry: RegistryFiles) -> Any:
    """In place of the records: one for every version."""
    return [SimpleNamespace(version=version, made=lambda manifest: True) for version in range(9)]


def test_a_round_of_an_old_adapter_that_is_then_aborted_is_found(
    fleet: Any, audited: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = newest_as_of(fleet, 0)
    with monkeypatch.context() as hostile:
        hostile.setattr(Registry, "newest_adapter", lambda registry: old)
        next_session(fleet, no_answers)
    assert fleet.registry().rounds()[-1].aborted
    code, printed = audited(fleet.out)
    assert (code, "session-000002.log starts from an adapter 0" in printed["error"]) == (4, True)
    monkeypatch.setattr("edgeadapt.auditing.transcripts.chain", lambda *given: None)
    assert audited(fleet.out)[0] == 0


def test_a_plan_of_another_adapter_than_its_checkpoint_names_is_found(
    app_fleet_of: FleetOf, audited: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the devices do not look at the checkpoint either."""
    fleet = app_fleet_of(4, rounds=2, aggregation__session_rounds=2)
    seed, honest = newest_as_of(fleet, 0), Registry.newest_adapter
    with monkeypatch.context() as hostile:
        hostile.setattr(LogState, "require_newest", lambda state, plan: None)
        hostile.setattr(Registry, "newest_adapter", lambda self: seed if self.rounds() else honest(self))
        fleet.federate(fleet.grid(app=aborting_second))
    code, printed = audited(fleet.out)
    failed = [check for check in printed["sessions"][0]["checks"] if check["status"] == "FAIL"]
    assert (code, failed[0]["check"], failed[0]["about"]) == (4, "results", "plan.adapter")
    assert failed[0]["place"]["round"] == 2
    monkeypatch.setattr(rules, "_named_adapters", lambda history, checkpoints: [])
    assert audited(fleet.out)[0] == 0


@pytest.mark.parametrize("forged", ["base_digest", "layout_digest"])
def test_a_session_without_a_result_for_another_base_or_layout_than_its_adapter_has_is_found(
    app_fleet_of: FleetOf, audited: Audit, monkeypatch: pytest.MonkeyPatch, forged: str
) -> None:
    """The coordinator signs the offer and the manifest, so it may sign something else in either."""
    fleet, honest = app_fleet_of(4, rounds=1), Aggregation.spec
    with monkeypatch.context() as hostile:
        if forged == "layout_digest":
            forge = lambda *given, **named: replace(honest(*given, **named), layout_digest="0" * 64)  # noqa: E731
            hostile.setattr(Aggregation, "spec", forge)
        fleet.federate(fleet.grid(app=no_answers))
    if forged == "base_digest":
        state_dir, seed = CoordinatorStateDir.open(fleet.out / "coordinator"), fleet.registry().version(0).manifest
        with closing(sqlite3.connect(state_dir.folder / DATABASE)) as database, database:
            row = (replace(seed, base_digest="0" * 64).sign(state_dir.key),)
            database.execute("UPDATE edgeadapt_versions SET manifest = ? WHERE version = 0", row)
    code, printed = audited(fleet.out)
    assert (code, f"differ in {forged}" in printed["error"]) == (4, True)
    monkeypatch.setattr(Recomputation, "_started", lambda self, report, start: self.registry.manifest(start[0]))
    assert audited(fleet.out)[0] == 0


def aborting_second(message: Message, context: Context) -> Message:
    return (no_answers if message.metadata.group_id == "2" else client_app)(message, context)


def newest_as_of(fleet: Any, version: int) -> Any:
    """What ``newest_adapter`` returned when this version was the newest."""
    registry = fleet.registry()
    newest = registry.newest_adapter()
    blob = registry.blob(version)
    return replace(newest, manifest=registry.version(version).manifest, blob=blob, tensors=files.decode(blob))


def test_a_second_result_for_a_version_is_found(fleet: Any, audited: Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The coordinator goes back to version 0, and makes version 1 again with other devices' updates in it."""
    first = fleet.registry().version(1).manifest.sha256
    with closing(sqlite3.connect(fleet.out / "coordinator" / DATABASE)) as database, database:
        database.execute("DELETE FROM edgeadapt_rounds WHERE round = 1")
        database.execute("DELETE FROM edgeadapt_versions WHERE version = 1")
    next_session(fleet)
    assert fleet.registry().version(1).manifest.sha256 != first
    code, printed = audited(fleet.out)
    assert (code, "the manifest of adapter 1 and the log differ in sha256" in printed["error"]) == (4, True)
    monkeypatch.setattr(Recomputation, "check", lambda *_: Finding(Check.ADAPTERS, Status.PASS, ""))
    code, printed = audited(fleet.out)
    assert (code, "session-000002.log starts from an adapter 0" in printed["error"]) == (4, True)
    monkeypatch.setattr("edgeadapt.auditing.transcripts.chain", lambda *given: None)
    code, printed = audited(fleet.out)
    assert (code, "is not recorded in the registry" in printed["error"]) == (4, True)
    monkeypatch.setattr("edgeadapt.auditing.transcripts.require_logged", lambda *_, **__: None)
    assert audited(fleet.out)[0] == 0


def test_a_last_session_that_is_left_out_is_found_although_all_its_rounds_were_aborted(
    fleet: Any, audited: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    next_session(fleet, no_answers)
    assert audited(fleet.out)[0] == 0
    logs(fleet.out / "coordinator" / "transcript")[-1].unlink()
    code, printed = audited(fleet.out)
    assert (code, "round 2 was recorded, and the log of its session is missing" in printed["error"]) == (4, True)
    monkeypatch.setattr("edgeadapt.auditing.transcripts.require_logged", lambda *_, **__: None)
    assert audited(fleet.out)[0] == 0


def test_a_round_with_another_ending_than_was_recorded_is_found(
    fleet: Any, audited: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator logs another reason than it recorded."""
    honest = transcripts.ending_of
    with monkeypatch.context() as hostile:
        hostile.setattr(transcripts, "ending_of", lambda record: replace(honest(record), reason="too-few-again"))
        next_session(fleet, no_answers)
    code, printed = audited(fleet.out)
    assert (code, "round 2 was recorded with another ending" in printed["error"]) == (4, True)
    monkeypatch.setattr("edgeadapt.auditing.transcripts._agrees", lambda record, logged: True)
    assert audited(fleet.out)[0] == 0


def test_a_task_that_lacks_a_label_of_the_adapter_is_found_although_its_round_was_aborted(
    app_fleet_of: FleetOf, audited: Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a device could train would depend on its labels."""
    fleet, honest = app_fleet_of(4, rounds=1), FederationSettings.task_of
    with monkeypatch.context() as hostile:
        hostile.setattr(FederationSettings, "task_of", lambda *given: fewer_labels(honest(*given)))
        fleet.federate(fleet.grid(app=no_answers))
    code, printed = audited(fleet.out)
    failed = [check for check in printed["sessions"][0]["checks"] if check["status"] == "FAIL"]
    assert (code, failed[0]["check"], failed[0]["about"]) == (4, "adapters", "task.labels")
    assert failed[0]["place"]["round"] == 1
    monkeypatch.setattr(recompute, "_require_task", lambda *_: None)
    assert audited(fleet.out)[0] == 0


def fewer_labels(task: Task) -> Task:
    return replace(task, labels=task.labels[:-1])
