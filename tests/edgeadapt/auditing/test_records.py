"""The records of the rounds against the logs: a coordinator signs both, and both must say the same."""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import TrustError
from aggregation.transcript import ENTRY, LENGTH, Checkpoint, read
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing import AuditInput, AuditOptions, Check, Status, records, transcripts
from edgeadapt.auditing.transcripts import logs
from edgeadapt.formats.manifest import PrivacyBound
from edgeadapt.formats.registryfiles import DATABASE, RegistryFiles
from edgeadapt.formats.roundrecord import RoundRecord, digest_of
from tests.support import refused

Change = Callable[[list[RoundRecord]], Sequence[RoundRecord]]


def require(state_dir: Path, *, unfinished: bool = False) -> None:
    """Audit everything, as the command does it."""
    checked = AuditInput.open(state_dir, AuditOptions())
    checked.require(checked.audit(unfinished=unfinished), unfinished=unfinished)


def sign(state_dir: Path, change: Change) -> None:
    """Put other records in the place of a coordinator's, numbered, chained and signed by it."""
    key = CoordinatorStateDir.open(state_dir).key
    found, previous, rows = change(list(RegistryFiles.open(state_dir, [key.public]).rounds())), None, []
    for number, record in enumerate(found, 1):
        rows.append((number, replace(record, round=number, previous=previous).sign(key)))
        previous = digest_of(rows[-1][1])
    with closing(sqlite3.connect(state_dir / DATABASE)) as database, database:
        database.execute("DELETE FROM edgeadapt_rounds")
        database.executemany("INSERT INTO edgeadapt_rounds (round, record) VALUES (?, ?)", rows)


def resign_newest(state_dir: Path, survivors: tuple[str, ...] | None) -> None:
    """Sign the newest manifest again, over these survivors if there are some to put in."""
    key = CoordinatorStateDir.open(state_dir).key
    manifest = RegistryFiles.open(state_dir, [key.public]).manifest()
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
    monkeypatch.setattr(records, "_agrees", lambda record, logged: True)
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
    manifest = RegistryFiles.open(state_dir, [key.public]).manifest(version)
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
    with refused(TrustError, "record", value=2):
        require(state_dir, unfinished=True)
    monkeypatch.setattr(records, "_agrees_so_far", lambda record, logged: True)
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
