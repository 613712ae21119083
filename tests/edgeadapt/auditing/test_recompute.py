"""The step from the sum to the adapter, recomputed by an auditor: after real runs, and after each forgery of them."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation import envelope
from aggregation.errors import ConfigError, TrustError
from aggregation.groups import GroupSum
from aggregation.messages import MaskedInput
from aggregation.pki.identity import IdentityKey
from aggregation.transcript.entries import ENTRY, LENGTH, Checkpoint, Result, read
from coordinator.settings import SETTINGS
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing import (
    AuditInput,
    AuditOptions,
    Check,
    Finding,
    ProducedAdapter,
    Recomputation,
    Report,
    Status,
    transcripts,
)
from edgeadapt.auditing.transcripts import VECTORS, log_name, logs, vector_path
from edgeadapt.formats.manifest import PeftConfig, PrivacyBound, RoundRecord, ServerRule, VersionManifest, digest_of
from edgeadapt.formats.registryfiles import BLOBS, DATABASE, SIGNING_KEY, RegistryFiles
from edgeadapt.formats.registryreader import open_registry_files
from edgeadapt.rounds.optimizer import FedAdam, FedAvg, ServerOptimizer, to_rule
from edgeadapt.rounds.task import Task
from tests.support import refused

FirstSession = tuple[Callable[[], Callable[[tuple[ProducedAdapter, ...]], Finding]], tuple[ProducedAdapter, ...]]


def adapters(state_dir: Path) -> list[Finding]:
    """The finding about the adapters of each session."""
    reports = AuditInput.open(state_dir, AuditOptions()).audit(unfinished=False)
    return [finding for report in reports.values() for finding in report.findings if finding.check is Check.ADAPTERS]


def outcome(finding: Finding) -> tuple[Status, str]:
    return finding.status, finding.about


@contextmanager
def database(state_dir: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(state_dir / DATABASE)) as connection, connection:
        yield connection


def test_adapters_of_a_run_are_recomputed_bit_for_bit(state_dir_of: Callable[[str], Path]) -> None:
    first, second = adapters(state_dir_of("fedavg"))
    assert outcome(first) == outcome(second) == (Status.PASS, "")
    assert first.text == (
        "2 adapters published under the coordinator's signature and unaltered since. 2 of 2 recomputed from the sums, "
        "equal bit for bit (FedAvg(learning_rate=1.0))"
    )
    assert second.text.startswith("1 adapter published")


def test_fedadam_is_followed_from_version_zero_through_every_session(state_dir_of: Callable[[str], Path]) -> None:
    first, second = adapters(state_dir_of("fedadam"))
    assert outcome(first) == outcome(second) == (Status.PASS, "")
    assert "FedAdam(learning_rate=0.02" in second.text


def test_fedadam_without_its_first_sums_is_not_recomputed(state_dir_of: Callable[[str], Path]) -> None:
    state_dir = state_dir_of("fedadam")
    (state_dir / "transcript" / log_name(1)).unlink()
    (only,) = adapters(state_dir)
    assert outcome(only) == (Status.SKIPPED, "optimizer")


def test_without_the_masked_updates_only_the_publishing_is_checked(state_dir_of: Callable[[str], Path]) -> None:
    first, _ = adapters(state_dir_of("digests"))
    assert outcome(first) == (Status.SKIPPED, "vectors")
    assert first.text == (
        "2 adapters published under the coordinator's signature and unaltered since. 2 of 2 not recomputed: only "
        "digests of the masked updates were kept"
    )


def resign(state_dir: Path, version: int, **changes: Any) -> None:
    """Change the manifest of a version, signed by the coordinator."""
    key = IdentityKey.from_pem((state_dir / SIGNING_KEY).read_bytes())
    manifest = open_registry_files(state_dir, [key.public]).manifest(version)
    assert manifest is not None
    with database(state_dir) as connection:
        raw = replace(manifest, **changes).sign(key)
        connection.execute("UPDATE edgeadapt_versions SET manifest = ? WHERE version = ?", (raw, version))


@pytest.mark.parametrize("settings", [FedAdam(), FedAvg(1.0000001)], ids=["rule", "rate"])
def test_another_optimizer_than_the_coordinator_used_is_found(
    state_dir_of: Callable[[str], Path], settings: ServerOptimizer
) -> None:
    state_dir = state_dir_of("fedavg")
    resign(state_dir, 1, rule=to_rule(settings))
    first, _ = adapters(state_dir)
    assert outcome(first) == (Status.FAIL, "result.adapter")
    assert first.place is not None
    assert (first.place.kind, first.place.round) == ("result", 1)


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"plan": "0" * 64}, "manifest.plan"),
        ({"plan": None}, "manifest.plan"),
        ({"survivors": ("device-00",)}, "manifest.survivors"),
        ({"base_digest": "0" * 64}, "manifest.base_digest"),
        ({"layout_digest": "0" * 64}, "manifest.layout_digest"),
        ({"labels": ("Music", "Light", "Timer")}, "manifest.labels"),
        ({"peft_config": PeftConfig("LORA", 2, 99, ("query", "value"))}, "manifest.peft_config"),
        ({"round": 0}, "manifest.round"),
        ({"rule": None}, "manifest.rule"),
        ({"rule": ServerRule("Sgd", {})}, "manifest.rule"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_signed_manifest_that_contradicts_the_log_or_the_adapter_before_is_found(
    state_dir_of: Callable[[str], Path], changes: dict[str, Any], about: str
) -> None:
    """Also without the vectors: what a device would do with the adapter is in its manifest."""
    state_dir = state_dir_of("digests")
    resign(state_dir, 1, **changes)
    first, _ = adapters(state_dir)
    assert outcome(first) == (Status.FAIL, about)


def test_the_settings_of_the_coordinator_are_not_read(state_dir_of: Callable[[str], Path]) -> None:
    state_dir = state_dir_of("fedavg")
    (state_dir / SETTINGS).write_bytes(b"[")
    assert {finding.status for finding in adapters(state_dir)} == {Status.PASS}


def test_a_changed_bit_of_a_published_file_is_found(state_dir_of: Callable[[str], Path]) -> None:
    state_dir = state_dir_of("fedavg")
    for number, blob in enumerate(sorted((state_dir / BLOBS).iterdir())):
        sound = blob.read_bytes()
        damaged = bytearray(sound)
        damaged[len(sound) * (number + 1) // 5] ^= 1
        blob.write_bytes(damaged)
        failed = [finding for finding in adapters(state_dir) if finding.status is Status.FAIL]
        assert (failed[0].about, f"{blob} was altered" in failed[0].text) == ("blob", True)
        blob.unlink()
        failed = [finding for finding in adapters(state_dir) if finding.status is Status.FAIL]
        assert (failed[0].about, f"{blob} is missing" in failed[0].text) == ("blob", True)
        blob.write_bytes(sound)
    assert {finding.status for finding in adapters(state_dir)} == {Status.PASS}


def test_a_manifest_that_is_altered_or_of_another_version_is_found(state_dir_of: Callable[[str], Path]) -> None:
    state_dir = state_dir_of("fedavg")
    with database(state_dir) as connection:
        rows = dict(connection.execute("SELECT version, manifest FROM edgeadapt_versions"))
        update = "UPDATE edgeadapt_versions SET manifest = ? WHERE version = ?"
        connection.execute(update, (rows[1][:-1] + b" ", 1))
    first, _second = adapters(state_dir)
    assert outcome(first) == (Status.FAIL, "manifest")
    assert f"{state_dir / DATABASE}, manifest of version 1" in first.text
    with database(state_dir) as connection:
        connection.execute(update, (rows[2], 3))
    with refused(TrustError, "manifest", value=3):
        AuditInput.open(state_dir, AuditOptions())


def test_a_missing_last_session_is_found_by_its_published_adapter(state_dir_of: Callable[[str], Path]) -> None:
    state_dir = state_dir_of("digests")
    (state_dir / "transcript" / log_name(2)).unlink()
    checked = AuditInput.open(state_dir, AuditOptions())
    for unfinished in (False, True):
        with refused(TrustError, "session", value=3):
            checked.require(checked.audit(unfinished=unfinished), unfinished=unfinished)


def test_an_empty_or_damaged_registry_does_not_pass_for_one_without_a_missing_session(
    state_dir_of: Callable[[str], Path],
) -> None:
    state_dir = state_dir_of("digests")
    with database(state_dir) as connection:
        connection.execute("DELETE FROM edgeadapt_versions")
    with refused(TrustError, DATABASE):
        AuditInput.open(state_dir, AuditOptions())
    (state_dir / DATABASE).write_bytes(b"no database")
    with refused(TrustError, DATABASE):
        AuditInput.open(state_dir, AuditOptions())


def test_an_adapter_of_the_open_round_of_a_session_under_way_is_not_missed(state_dir_of: Callable[[str], Path]) -> None:
    """It is published before its result is logged; one that names another plan is no such adapter."""
    state_dir = state_dir_of("digests")
    path = state_dir / "transcript" / log_name(2)
    raw = path.read_bytes()
    result = next(entry for entry in read(raw).entries if entry.kind == Result.TAG)
    path.write_bytes(raw[: raw.index(ENTRY.encode(result)) - LENGTH])
    checked = AuditInput.open(state_dir, AuditOptions())
    checked.require(checked.audit(unfinished=True), unfinished=True)
    resign(state_dir, 3, plan="0" * 64)
    checked = AuditInput.open(state_dir, AuditOptions())
    with refused(TrustError, "session", value=3):
        checked.require(checked.audit(unfinished=True), unfinished=True)


def test_a_registry_of_another_schema_ends_the_audit(state_dir_of: Callable[[str], Path]) -> None:
    state_dir = state_dir_of("digests")
    with database(state_dir) as connection:
        connection.execute("UPDATE edgeadapt_schema SET version_num = '99'")
    with refused(ConfigError, "database.schema", value="99"):
        adapters(state_dir)


def test_a_sum_that_was_not_kept_is_reported_with_those_that_were(state_dir_of: Callable[[str], Path]) -> None:
    state_dir = state_dir_of("fedavg")
    log = read((state_dir / "transcript" / log_name(1)).read_bytes()).entries
    for header in (entry for entry in log if (entry.kind, entry.round) == (MaskedInput.TAG, 1)):
        signed = MaskedInput.decode(envelope.unverified_body(header.message))
        vector_path(state_dir / "transcript" / VECTORS, signed.vector).unlink()
    first, _ = adapters(state_dir)
    assert outcome(first) == (Status.SKIPPED, "vectors")
    assert "1 of 2 recomputed from the sums" in first.text
    assert "1 of 2 not recomputed" in first.text


def test_an_adapter_that_was_never_published_is_found(state_dir_of: Callable[[str], Path]) -> None:
    """An adapter is published before it is logged, so that no kill explains it."""
    state_dir = state_dir_of("fedavg")
    with database(state_dir) as connection:
        connection.execute("DELETE FROM edgeadapt_versions WHERE version IN (1, 3)")
    first, second = adapters(state_dir)
    assert outcome(first) == outcome(second) == (Status.FAIL, "version")


@pytest.fixture
def first_session(state_dir_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> FirstSession:
    """Makes a new recomputation; and the adapters, with their sums, that the audit of the first session gives to it."""
    given: list[Report] = []

    class Spy(Recomputation):
        def check(self, report: Report) -> Finding:
            given.append(report)
            return super().check(report)

    monkeypatch.setattr("edgeadapt.auditing.transcripts.Recomputation", Spy)
    checked = AuditInput.open(state_dir_of("fedavg"), AuditOptions())
    checked.audit(unfinished=False)
    assert checked.registry is not None
    report, registry = given[0], checked.registry

    def new() -> Callable[[tuple[ProducedAdapter, ...]], Finding]:
        recomputation = Recomputation(registry)
        return lambda produced: recomputation.check(replace(report, produced=produced))

    assert new()(report.produced).status is Status.PASS
    return new, report.produced


def with_values(produced: ProducedAdapter, **changes: Any) -> tuple[GroupSum, ...]:
    """The one sum of a round, with other segments."""
    (one,) = produced.sums or ()
    return (replace(one, values={**one.values, **changes}),)


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"before": (0, "ab" * 32)}, "plan.adapter"),
        ({"survivors": ("someone",)}, "manifest.survivors"),
        ({"spec": {"layout_digest": "0" * 64}}, "manifest.layout_digest"),
        ({"spec": {"base_digest": "0" * 64}}, "manifest.base_digest"),
        ({"sums": {"held_out": np.array([99.0])}}, "manifest.metrics"),
        ({"sums": {"delta": np.zeros(3)}}, "shape"),
    ],
    ids=["start", "survivors", "layout", "base", "metrics", "size"],
)
def test_a_log_that_contradicts_the_registry_is_found(
    first_session: FirstSession, changes: dict[str, Any], about: str
) -> None:
    new, (first, second) = first_session
    if "spec" in changes:
        changes = {"spec": replace(first.spec, **changes["spec"])}
    elif "sums" in changes:
        changes = {"sums": with_values(first, **changes["sums"])}
    finding = new()((replace(first, **changes), second))
    assert outcome(finding) == (Status.FAIL, about)
    assert finding.place == first.place


def test_a_manifest_of_another_file_than_the_log_names_is_found(
    first_session: FirstSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, (first, second) = first_session
    honest = RegistryFiles.manifest
    for name, value in {"sha256": "c" * 64, "parent": "c" * 64}.items():

        def forged(files: RegistryFiles, version: int | None = None, **changes: str) -> VersionManifest | None:
            found = honest(files, version)
            return replace(found, **changes) if found and version == 1 else found

        monkeypatch.setattr(RegistryFiles, "manifest", partialmethod(forged, **{name: value}))
        assert outcome(new()((first, second))) == (Status.FAIL, f"manifest.{name}")


def test_an_adapter_that_was_exchanged_after_the_last_sum_of_a_session_is_found(first_session: FirstSession) -> None:
    new, (first, _) = first_session
    finding = new()((replace(first, after=(1, "ab" * 32)),))
    assert outcome(finding) == (Status.FAIL, "manifest.sha256")


def test_a_change_of_one_step_of_one_number_of_the_sum_is_found(first_session: FirstSession) -> None:
    new, (first, second) = first_session
    assert first.sums is not None
    delta, vector = first.sums[0].values["delta"].copy(), first.spec.vector
    delta[np.abs(delta).argmin()] += vector.step(vector.segments[0])
    finding = new()((replace(first, sums=with_values(first, delta=delta)), second))
    assert outcome(finding) == (Status.FAIL, "result.adapter")


def test_another_task_than_that_of_the_plan_makes_another_mean(first_session: FirstSession) -> None:
    """Its learning rate is in the noise, if it is above the step of the sum."""
    new, (first, second) = first_session
    task = Task.decode(first.training)
    other = replace(task, learning_rate=1.0).encode()
    finding = new()((replace(first, training=other), second))
    assert outcome(finding) == (Status.FAIL, "result.adapter")


def test_metrics_that_are_not_those_of_the_sum_are_found(state_dir_of: Callable[[str], Path]) -> None:
    state_dir = state_dir_of("fedavg")
    resign(state_dir, 1, metrics={"accuracy": 0.99, "loss": 0.01})
    first, _ = adapters(state_dir)
    assert outcome(first) == (Status.FAIL, "manifest.metrics")


def test_a_session_without_a_result_has_no_adapter(first_session: FirstSession) -> None:
    finding = first_session[0]()(())
    assert (finding.status, finding.text) == (Status.PASS, "no adapter was produced")


# The records of the rounds against the logs


Change = Callable[[list[RoundRecord]], Sequence[RoundRecord]]


def require(state_dir: Path, *, unfinished: bool = False) -> None:
    """Audit everything, as the command does it."""
    checked = AuditInput.open(state_dir, AuditOptions())
    checked.require(checked.audit(unfinished=unfinished), unfinished=unfinished)


def sign(state_dir: Path, change: Change) -> None:
    """Put other records in the place of a coordinator's, numbered, chained and signed by it."""
    key = CoordinatorStateDir.open(state_dir).key
    found, previous, rows = change(list(open_registry_files(state_dir, [key.public]).rounds())), None, []
    for number, record in enumerate(found, 1):
        rows.append((number, replace(record, round=number, previous=previous).sign(key)))
        previous = digest_of(rows[-1][1])
    with closing(sqlite3.connect(state_dir / DATABASE)) as database, database:
        database.execute("DELETE FROM edgeadapt_rounds")
        database.executemany("INSERT INTO edgeadapt_rounds (round, record) VALUES (?, ?)", rows)


def resign_newest(state_dir: Path, survivors: tuple[str, ...] | None) -> None:
    """Sign the newest manifest again, over these survivors if there are some to put in."""
    key = CoordinatorStateDir.open(state_dir).key
    manifest = open_registry_files(state_dir, [key.public]).manifest()
    assert manifest is not None
    signed = replace(manifest, survivors=manifest.survivors if survivors is None else survivors).sign(key)
    with closing(sqlite3.connect(state_dir / DATABASE)) as database, database:
        database.execute("UPDATE edgeadapt_versions SET manifest = ? WHERE version = ?", (signed, manifest.version))


def cut(state_dir: Path, kind: str, round_: int) -> None:
    """Cut the log before the first entry of this kind in a round."""
    (path,) = logs(state_dir / "transcript")
    raw = path.read_bytes()
    first = next(entry for entry in read(raw).entries if (entry.kind, entry.round) == (kind, round_))
    path.write_bytes(raw[: raw.index(ENTRY.encode(first)) - LENGTH])


def test_the_records_of_a_run_are_those_that_its_log_has(state_dir: Path) -> None:
    require(state_dir)
    sign(state_dir, lambda found: found)
    require(state_dir)


@pytest.mark.parametrize(
    "changes",
    [
        {"sum": "0" * 64},
        {"adapter": "0" * 64},
        {"survivors": ()},
        {"entries": 1},
        {"root": "0" * 64},
        {"sum": None, "version": None, "adapter": None, "reason": "too-few", "aborted": "too few"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_record_that_says_something_else_than_the_log_is_found(
    state_dir: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sign(state_dir, lambda found: [found[0], replace(found[1], **changes)])
    with refused(TrustError, "record", value=2):
        require(state_dir)
    monkeypatch.setattr(transcripts, "_agrees", lambda record, logged: True)
    monkeypatch.setattr(transcripts, "require_published", lambda *_: None)
    require(state_dir)


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        (0, {"parent": "0" * 64}),
        (0, {"plan": "0" * 64}),
        (0, {"survivors": ("device-00",)}),
        (0, {"metrics": {"accuracy": 1.0}}),
        (0, {"privacy": PrivacyBound(1.0, 1e-6)}),
        (2, {"round": 3}),
        (2, {"privacy": PrivacyBound(1.0, 1e-6)}),
        (2, {"metrics": {"accuracy": 1.0}}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else str(value),
)
def test_a_manifest_that_says_something_else_than_the_records_is_found(
    state_dir: Path, version: int, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = CoordinatorStateDir.open(state_dir).key
    manifest = open_registry_files(state_dir, [key.public]).manifest(version)
    assert manifest is not None
    with closing(sqlite3.connect(state_dir / DATABASE)) as database, database:
        row = (replace(manifest, **changes).sign(key), version)
        database.execute("UPDATE edgeadapt_versions SET manifest = ? WHERE version = ?", row)
    with refused(TrustError, "record" if version else "manifest", value=version):
        require(state_dir)
    monkeypatch.setattr(transcripts, "require_published", lambda *_: None)
    require(state_dir)


@pytest.mark.parametrize(
    "change", [lambda found: [*found, found[1]], lambda found: found[::-1]], ids=["twice", "order"]
)
def test_a_record_that_is_signed_twice_or_in_another_order_is_found(state_dir: Path, change: Change) -> None:
    sign(state_dir, change)
    with pytest.raises(TrustError) as caught:
        require(state_dir)
    assert caught.value.about == "record"


def test_a_round_without_a_record_is_found_also_in_a_session_under_way(state_dir: Path) -> None:
    sign(state_dir, lambda found: found[:1])
    cut(state_dir, Checkpoint.TAG, 2)  # the round ended, and the log is not closed
    for unfinished in (False, True):
        with pytest.raises(TrustError):
            require(state_dir, unfinished=unfinished)


def test_a_round_under_way_may_have_a_record_or_not(state_dir: Path) -> None:
    """The record comes before the ending; and the adapter of the round with its record."""
    cut(state_dir, "result", 2)
    require(state_dir, unfinished=True)
    (report,) = AuditInput.open(state_dir, AuditOptions()).audit(unfinished=True).values()
    adapters = report.findings[-1]
    assert (adapters.check, adapters.status, adapters.about) == (Check.ADAPTERS, Status.WARNING, "round.open")
    with closing(sqlite3.connect(state_dir / DATABASE)) as database, database:
        database.execute("DELETE FROM edgeadapt_rounds WHERE round = 2")
    with refused(TrustError, "session", value=2):  # an adapter without a record is of no round
        require(state_dir, unfinished=True)


@pytest.mark.parametrize("kind", ["masked-input", "unmask-response"])
def test_a_log_that_was_cut_before_the_recorded_end_of_its_last_round_is_no_session_under_way(
    state_dir: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise an adapter that comes from no logged sum passes as that of a round under way."""
    cut(state_dir, kind, 2)
    for unfinished in (False, True):
        with refused(TrustError, "session.cut", value=2):
            require(state_dir, unfinished=unfinished)
    monkeypatch.setattr(transcripts, "_is_cut", lambda size, record: False)
    with refused(TrustError, "record", value=2):
        require(state_dir, unfinished=True)
    monkeypatch.setattr(transcripts, "_agrees_so_far", lambda record, logged: True)
    require(state_dir, unfinished=True)


@pytest.mark.parametrize("survivors", [None, ()], ids=["recorded survivors", "no survivors"])
def test_a_record_that_is_signed_again_for_a_cut_log_names_a_sum_that_was_not_unmasked(
    state_dir: Path, survivors: tuple[str, ...] | None
) -> None:
    cut(state_dir, "masked-input", 2)
    (report,) = AuditInput.open(state_dir, AuditOptions()).audit(unfinished=True).values()
    changes: dict[str, Any] = {"entries": report.entries, "root": report.rounds[-1].root}
    changes |= {} if survivors is None else {"survivors": survivors}
    resign_newest(state_dir, survivors)
    sign(state_dir, lambda found: [found[0], replace(found[1], **changes)])
    with refused(TrustError, "record", value=2):
        require(state_dir, unfinished=True)


def test_a_record_of_the_open_round_that_is_signed_twice_is_found(state_dir: Path) -> None:
    cut(state_dir, "result", 2)
    sign(state_dir, lambda found: [*found, found[1]])
    with refused(TrustError, "record", value=3):
        require(state_dir, unfinished=True)


def test_a_round_that_ends_while_the_logs_are_read_is_not_missed(state_dir: Path) -> None:
    """The audit began before the round was recorded; the log was read after that."""
    checked = AuditInput.open(state_dir, AuditOptions())
    early = replace(checked, records=checked.records[:1])
    early.require(early.audit(unfinished=True), unfinished=True)
