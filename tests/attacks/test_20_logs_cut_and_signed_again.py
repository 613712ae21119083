"""Cut the end off the newest log, and let the coordinator itself sign what is left.

A start closes a log that a kill left open: it aborts the round under way and signs. Whoever can write to the
coordinator's disk needs no key then. Cut the newest closed log in its last round, start the coordinator once, and the
completed round has become an interrupted one, under genuine signatures, with its adapter still in the registry. The
same for an old copy of the registry, and for a log that is gone. A start compares the logs with the signed records of
rounds first. Without that comparison each attack works.

The other way round, a device must not be able to stop a coordinator: a later checkpoint in the incomplete record of a
kill says that more than the last record was damaged, and devices know earlier checkpoints.
"""

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from aggregation.errors import EdgeAdaptError, TrustError
from aggregation.messages import Shares
from aggregation.transcript.entries import ENTRY, MAGIC, Checkpoint, record
from client.node.app import app as client_app
from coordinator.statedir import CoordinatorStateDir
from coordinator.transcripts import StoredLog
from edgeadapt.auditing import AuditInput, AuditOptions
from edgeadapt.auditing.transcripts import log_name, logs
from edgeadapt.formats.registryfiles import DATABASE
from tests.support import FleetOf, refused
from tests.support.fleet import make_fleet, session_spec
from tests.support.hostile import continues_from_anything
from tests.support.sessions import LoggedSession, run_session


@pytest.fixture
def fleet(app_fleet_of: FleetOf) -> Any:
    """A fleet after one session of two rounds, with a copy of its registry from before the second."""
    made = app_fleet_of(4, rounds=2, aggregation__session_rounds=2, aggregation__keep_masked_inputs=True)
    registry = made.out / "coordinator" / DATABASE

    def copying(message: Message, context: Context) -> Message:
        if message.metadata.group_id == "2" and not registry.with_suffix(".old").exists():
            shutil.copy(registry, registry.with_suffix(".old"))
        return client_app(message, context)

    made.federate(made.grid(app=copying))
    return made


def newest_log(fleet: Any) -> Path:
    return logs(fleet.out / "coordinator" / "transcript")[-1]


def endings(fleet: Any) -> list[str]:
    """How each round of all sessions ended, according to an audit that passes; empty if it does not."""
    checked = AuditInput.open(fleet.out, AuditOptions())
    reports = checked.audit(unfinished=False)
    try:
        checked.require(reports, unfinished=False)
    except TrustError:
        return []
    return [each.ending.partition(" (")[0] for report in reports.values() for each in report.rounds]


def assert_not_started(fleet: Any) -> None:
    """The coordinator refuses to start, and has signed nothing."""
    before = {path: path.read_bytes() for path in logs(fleet.out / "coordinator" / "transcript")}
    with refused(TrustError, "transcript") as caught:
        fleet.federate(fleet.grid())
    assert "restore both from one copy" in str(caught.value)
    assert {path: path.read_bytes() for path in logs(fleet.out / "coordinator" / "transcript")} == before


def assert_signed(fleet: Any) -> None:
    """Without the comparison it starts and signs."""
    with pytest.MonkeyPatch.context() as weakened:
        continues_from_anything(weakened)
        fleet.federate(fleet.grid())


def test_a_log_that_was_cut_is_not_signed_again(fleet: Any) -> None:
    assert endings(fleet) == ["produced adapter 1", "produced adapter 2"]
    log = newest_log(fleet)
    log.write_bytes(log.read_bytes()[:-3000])
    assert_not_started(fleet)
    assert_signed(fleet)
    checked = AuditInput.open(fleet.out, AuditOptions())
    (report,) = checked.audit(unfinished=False).values()
    assert not report.failed
    assert [each.ending.partition(" (")[0] for each in report.rounds] == ["produced adapter 1", "aborted"]


@pytest.mark.parametrize("share", [0.2, 0.95])
def test_a_log_that_was_cut_anywhere_is_not_signed_again(fleet: Any, share: float) -> None:
    log = newest_log(fleet)
    whole = log.read_bytes()
    log.write_bytes(whole[: int(share * len(whole))])
    assert_not_started(fleet)
    assert_signed(fleet)
    assert endings(fleet) == []  # signed, and only the registry contradicts it
    assert StoredLog.read(log, CoordinatorStateDir.open(fleet.out / "coordinator").key.public).closed
    log.write_bytes(whole)
    fleet.federate(fleet.grid())
    assert log.read_bytes() == whole


def test_a_log_that_is_gone_is_not_replaced_by_a_new_one(fleet: Any) -> None:
    newest_log(fleet).unlink()
    fleet.configure({"rounds": 3, "attempts": 3})
    assert_not_started(fleet)
    with pytest.raises(EdgeAdaptError):
        assert_signed(fleet)  # the devices refuse it; it has signed a first session once more, for each attempt
    assert newest_log(fleet).name == "session-000003.log"


def test_an_old_registry_does_not_make_a_version_twice(fleet: Any) -> None:
    registry = fleet.out / "coordinator" / DATABASE
    shutil.copy(registry.with_suffix(".old"), registry)
    assert fleet.registry().latest().manifest.version == 1
    fleet.configure({"attempts": 3})
    assert_not_started(fleet)
    with pytest.raises(EdgeAdaptError):
        assert_signed(fleet)  # again it is the devices that refuse, and new ones would not
    assert newest_log(fleet).name == "session-000004.log"


def test_a_checkpoint_in_the_message_of_a_device_does_not_stop_a_coordinator_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device puts that of an earlier session where its encrypted shares belong, and a kill cuts that message."""
    known, path = ENTRY.encode(run_session([]).find(Checkpoint)), tmp_path / log_name(2)
    session = LoggedSession(make_fleet(4, spec=session_spec(4, rounds=8))).run([])
    old, dealt = session.find(Shares, 0, "device-003"), session.message(Shares, 0, "device-003").encrypted_shares
    hidden = known.ljust(len(dealt["device-000"].ciphertext), b"\0")
    forged = {**dealt, "device-000": replace(dealt["device-000"], ciphertext=hidden)}
    signed = session.resigned(old, Shares, encrypted_shares=forged)
    assert len(signed.message) == len(old.message)
    path.write_bytes(session.raw[: session.ends()[old.index - 1]] + record(ENTRY.encode(signed))[:-1])
    key = session.fleet.key.public
    log = StoredLog.read(path, key)
    assert (len(log.entries), known in log.rest) == (old.index, True)
    monkeypatch.setattr(StoredLog, "is_continued_in", lambda log, rest, key: known in rest)
    with refused(TrustError, path.name):
        StoredLog.read(path, key)


def test_only_a_later_checkpoint_of_the_same_log_shows_that_it_was_damaged(tmp_path: Path) -> None:
    session = run_session([{}])
    found = [entry for entry in session.entries if entry.kind == Checkpoint.TAG]
    path, key = tmp_path / log_name(1), session.fleet.key.public
    path.write_bytes(session.raw[: session.ends()[found[0].index]])
    log = StoredLog.read(path, key)
    assert [log.is_continued_in(ENTRY.encode(each), key) for each in found] == [False, True, True]


def test_a_damaged_record_before_the_end_is_not_taken_for_an_incomplete_one(tmp_path: Path) -> None:
    """Wherever the length of a record is damaged: a checkpoint of this log follows, or it is one."""
    session = run_session([{}])
    taken: list[int] = []
    path, starts = tmp_path / log_name(1), [len(MAGIC), *session.ends()[:-1]]
    for start in starts:
        damaged = bytearray(session.raw)
        damaged[start] ^= 0x40
        path.write_bytes(damaged)
        with refused(TrustError, path.name):
            StoredLog.read(path, session.fleet.key.public)
        with pytest.MonkeyPatch.context() as weakened, suppress(TrustError):
            weakened.setattr(StoredLog, "is_continued_in", lambda *given: False)
            taken.append(len(StoredLog.read(path, session.fleet.key.public).entries))
    assert len(taken) > len(starts) / 2
    assert max(taken) < len(starts)  # what follows the damage would be cut off
