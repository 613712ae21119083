"""The signed records of the rounds in the registry, compared with the logs: which rounds and sessions there were.

Logs name their predecessors, so a log that is left out is missed in the next one; the last one is not. Nor does a log
show that a round in it had another ending. Every record is written before its round's ending is logged, and names the
session and the plan, also of an aborted round.
"""

from collections.abc import Callable, Mapping, Sequence

from aggregation.errors import TrustError
from edgeadapt.auditing.findings import Report, RoundSummary
from edgeadapt.formats.manifest import PrivacyBound, VersionManifest
from edgeadapt.formats.roundrecord import INTERRUPTED, RoundRecord


def require_logged(
    before: Sequence[RoundRecord], after: Sequence[RoundRecord], reports: Mapping[str, Report], *, unfinished: bool
) -> None:
    """Check that the logs have each recorded round, once, in its order and as it was recorded, and no other round.

    A coordinator may continue while it is audited. It writes a record before the ending, so what was recorded before
    the logs were read is in them, and what ended in them is recorded after that. Only the round that is under way then
    may have a record and no ending. The log was synced before the record was written, and so ends where that says. A
    round in which the coordinator's process ended has no record: the next start logs it as interrupted.

    Args:
        before: All rounds, as the registry had them before the logs were read.
        after: As it had them after that.
        reports: Name → report of all logs.
        unfinished: The last session is under way.

    Raises TrustError: the log of a session, a round or its ending is missing, or a round has no record.
    """
    logged = {(report.offer, each.plan): each for report in reports.values() for each in report.rounds}
    *_, last = reports.values()
    open_round = {(last.offer, last.open_plan)} if unfinished else set()
    _require_recorded(before, {report.offer: report.entries for report in reports.values()}, logged)
    recorded = {(record.offer, record.plan) for record in after}
    for (offer, plan), each in logged.items():
        if (offer, plan) not in recorded | open_round and each.reason != INTERRUPTED:
            text = f"a round that the log says {each.ending} is not recorded in the registry"
            raise TrustError(text, about="record")


def require_published(
    records: Sequence[RoundRecord], manifest_of: Callable[[int], VersionManifest | None], reports: Mapping[str, Report]
) -> None:
    """Check that each record and the manifest of its version say the same, and version 0 is of no round.

    Args:
        records: All rounds whose logs are there.
        manifest_of: Version → its manifest.
        reports: Name → report of all logs. A record has the ε of a round, and the offer of its session the δ.

    Raises TrustError: they do not, or a manifest is missing.
    """
    seed = manifest_of(0)
    if seed is None or seed.round or seed.parent or seed.plan or seed.survivors or seed.metrics or seed.privacy:
        raise TrustError("adapter 0 is missing, or its manifest says that a round made it", about="manifest")
    deltas = {each.offer: each.spec.privacy.delta for each in reports.values() if each.spec and each.spec.privacy}
    for record in records:
        manifest = None if record.version is None else manifest_of(record.version)
        made = record.version is None or (manifest is not None and record.made(manifest))
        stated = (manifest.metrics, manifest.privacy) if manifest else ({}, None)
        bound = _bound(record, deltas.get(record.offer)) if manifest else None
        if not made or (record.metrics, bound) != stated:
            text = f"the record of round {record.round} and the manifest of its adapter contradict each other"
            raise TrustError(text, about="record")


def _bound(record: RoundRecord, delta: float | None) -> PrivacyBound | None:
    return None if record.epsilon is None or delta is None else PrivacyBound(record.epsilon, delta)


def _require_recorded(
    records: Sequence[RoundRecord], sizes: Mapping[str, int], logged: Mapping[tuple[str, str], RoundSummary]
) -> None:
    places, last = {key: place for place, key in enumerate(logged)}, -1
    for record in records:
        if record.offer not in sizes:
            text = f"round {record.round} was recorded, and the log of its session is missing"
            raise TrustError(text, about="session")
        if record.plan is None:
            continue
        summary = logged.get((record.offer, record.plan))
        if _is_cut(sizes[record.offer], record):
            text = f"round {record.round} was recorded, and the end of its session's log was cut off"
            raise TrustError(text, about="session.cut")
        if summary is None or not (_agrees_so_far if summary.open else _agrees)(record, summary):
            text = f"round {record.round} was recorded with another ending, or after other entries, than its log has"
            raise TrustError(text, about="record")
        place = places[record.offer, record.plan]
        if place <= last:
            text = f"round {record.round} was recorded twice, or in another order than the logs have"
            raise TrustError(text, about="record")
        last = place


def _is_cut(size: int, record: RoundRecord) -> bool:
    """Check whether a log of so many entries lacks some that a record names: so one that is open is not just open."""
    return size < record.entries


def _agrees(record: RoundRecord, logged: RoundSummary) -> bool:
    """Check whether a record and a log say the same of a round. Costs and dropouts are the record's only."""
    adapter = (record.version, record.adapter) if record.version is not None else None
    survivors = logged.survivors if logged.result else ()
    groups = logged.groups if logged.result and logged.dealt else ()
    if tuple(each.survivors for each in record.groups) != groups or not _in_time(record, logged):
        return False
    expected = logged.entries, logged.root, logged.reason, logged.result, logged.sum, survivors
    return (record.entries, record.root, record.reason, adapter, record.sum, record.survivors) == expected


def _in_time(record: RoundRecord, logged: RoundSummary) -> bool:
    """Check whether a record's time is between those of the round's plan and ending, where there are such."""
    if record.ended is None:
        return True
    return (logged.began or 0) <= record.ended and (logged.ended is None or record.ended <= logged.ended)


def _agrees_so_far(record: RoundRecord, logged: RoundSummary) -> bool:
    """Check whether an open round's log ends where its record says, and shows that the recorded sum was unmasked."""
    survivors = logged.unmasked if record.version is not None else ()
    return (
        _in_time(record, logged)
        and (record.entries, record.root, record.survivors) == (logged.entries, logged.root, survivors)
        and (record.version is None or len(survivors) > 0)
    )
