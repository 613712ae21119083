"""When sessions and rounds took place: what the coordinator signed about it, and what an audit concludes from that."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from aggregation.errors import TrustError
from aggregation.messages import Advert, Offer, Roster
from aggregation.pki import Root
from aggregation.pki.certificates import serial
from aggregation.pki.revocation import Revocation
from aggregation.transcript.entries import ENTRY, MAGIC, Checkpoint, Entry, record, write
from edgeadapt.auditing import AuditInput, AuditOptions, Check, Report, audit
from edgeadapt.auditing.auditor import chain
from edgeadapt.auditing.transcripts import require_logged
from tests.support import FleetOf, refused
from tests.support.sessions import AT, LoggedSession, failure, finding_of

HOUR = 3600


def untimed(entries: list[Entry]) -> list[Entry]:
    return [replace(entry, at=None) for entry in entries]


def later(seconds: int) -> Callable[[list[Entry]], list[Entry]]:
    def change(entries: list[Entry]) -> list[Entry]:
        return [entry if entry.at is None else replace(entry, at=entry.at + seconds) for entry in entries]

    return change


def revoking(logged: LoggedSession, at: int, until: int = 1000 * HOUR) -> Root:
    """The authority with a list that revokes a device of the session at that time."""
    since = datetime.fromtimestamp(at, UTC)
    revoked = {serial(logged.fleet.devices["device-002"].certificate): Revocation(since)}
    listed = logged.fleet.authority.revocations(3, revoked, since, since + timedelta(seconds=until))
    return logged.fleet.authority.root.with_revocations(listed.der)


def audited(logged: LoggedSession, root: Root, raw: bytes | None = None) -> Report:
    return audit(logged.raw if raw is None else raw, root, logged.fleet.key.public)


def test_a_report_has_the_times_of_its_session_and_rounds(logged: LoggedSession) -> None:
    report = logged.audit(logged.rewritten(later(HOUR)))
    assert not report.failed
    assert (report.began, report.latest) == (AT + HOUR, AT + HOUR)
    assert {(each.began, each.ended) for each in report.rounds} == {(AT + HOUR, AT + HOUR)}
    assert "valid on 2026-02-02" in finding_of(report, Check.IDENTITIES).text


@pytest.mark.parametrize("magic", [MAGIC.replace(b"3", b"2"), MAGIC.replace(b"3", b"4"), MAGIC.replace(b"3", b"03")])
def test_a_log_of_another_version_is_refused(logged: LoggedSession, magic: bytes) -> None:
    for change in (untimed, later(0)):
        report = logged.audit(magic + logged.rewritten(change)[len(MAGIC) :])
        assert report.failed[0].about == "log"
        with refused(TrustError, Check.LOG.value, value=MAGIC.decode().strip()):
            report.require()


def test_a_log_without_times_is_refused_even_if_the_coordinator_signed_it(logged: LoggedSession) -> None:
    report = logged.audit(logged.rewritten(untimed))
    assert failure(report, Check.LOG, "entry.at").index == 0


@pytest.mark.parametrize("at", [AT - 1, None, 0])
def test_an_entry_with_an_earlier_time_or_none_is_found(logged: LoggedSession, at: int | None) -> None:
    roster = logged.find(Roster)
    raw = logged.replaced(roster, replace(roster, at=at))
    assert failure(logged.audit(raw), Check.LOG, "entry.at").index == roster.index


@pytest.mark.parametrize("kind", [Advert, Checkpoint])
def test_a_time_that_the_coordinator_did_not_sign_is_found(logged: LoggedSession, kind: Any) -> None:
    entry = logged.find(kind)
    head, tail = logged.raw[: logged.ends()[entry.index - 1]], logged.raw[logged.ends()[entry.index] :]
    raw = head + record(ENTRY.encode(replace(entry, at=AT))) + tail
    assert logged.audit(raw).failed[0].about == "entry.at"


def test_a_time_that_is_changed_after_the_coordinator_signed_is_found(logged: LoggedSession) -> None:
    entries = later(HOUR)(list(logged.entries))
    report = logged.audit(write(entries))
    assert failure(report, Check.LOG, "checkpoint.root").kind == "checkpoint"


def test_a_device_that_was_revoked_after_its_session_still_counts_in_it(logged: LoggedSession) -> None:
    report = audited(logged, revoking(logged, AT + 1))
    assert not report.failed
    assert "not on its revocation list 3" in finding_of(report, Check.IDENTITIES).text


def test_a_device_that_was_revoked_before_its_session_does_not_count(logged: LoggedSession) -> None:
    assert failure(audited(logged, revoking(logged, AT)), Check.IDENTITIES, "certificate.revoked").kind == Offer.TAG


def test_a_list_that_had_ended_before_the_session_says_nothing_of_it(logged: LoggedSession) -> None:
    report = audited(logged, revoking(logged, AT - 2 * HOUR, HOUR))
    assert [finding.about for finding in report.failed] == ["revocations.next-update"]


def test_a_session_with_a_revoked_device_cannot_be_dated_before_one_that_devices_saw(logged: LoggedSession) -> None:
    """Its own log passes: that there is another session in between shows the lie."""
    root = revoking(logged, AT + HOUR)
    first = audited(logged, root)
    between = audited(logged, root, logged.rewritten(later(2 * HOUR), previous=first.last))
    assert [finding.about for finding in between.failed] == ["certificate.revoked"]
    back = logged.rewritten(later(HOUR // 2), previous=between.last)
    assert not audited(logged, root, back).failed
    starts = {"start": (0, ""), "newest": (0, "")}
    reports = {"a": first, "b": between, "c": audited(logged, root, back)}
    reports = {name: replace(report, **starts) for name, report in reports.items()}
    with refused(TrustError, "session.began", value="c"):
        chain(reports)
    chain(reports | {"c": replace(reports["c"], began=AT + 2 * HOUR)})  # without the lie


def test_the_record_of_a_round_is_from_between_its_plan_and_its_ending(fleet_of: FleetOf) -> None:
    fleet = fleet_of(3, rounds=1)
    (recorded,) = fleet.federate(fleet.grid())
    checked = AuditInput.open(fleet.out / "coordinator", AuditOptions())
    reports = checked.audit(unfinished=False)
    ((summary,),) = (report.rounds for report in reports.values())
    assert summary.began is not None
    assert summary.ended is not None
    assert recorded.ended is not None
    assert summary.began <= recorded.ended <= summary.ended
    for ended in (summary.began, summary.ended, None):  # None: of an earlier version
        changed = (replace(recorded, ended=ended),)
        require_logged(changed, changed, reports, unfinished=False)
    for ended in (summary.began - 1, summary.ended + 1):
        changed = (replace(recorded, ended=ended),)
        with refused(TrustError, "record", value=1):
            require_logged(changed, changed, reports, unfinished=False)
