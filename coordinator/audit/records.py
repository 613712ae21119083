"""The signed records of the rounds in the registry, compared with the logs: which rounds and sessions there were.

Logs name their predecessors, so a log that is left out is missed in the next one; the last one is not. Nor does a log
show that a round in it had another ending. Every record is written before its round's ending is logged, and names the
session and the plan, also of an aborted round.
"""

from collections.abc import Collection, Mapping, Sequence

from adapters.roundrecord import INTERRUPTED, RoundRecord
from aggregation.errors import TrustError
from coordinator.audit.findings import Report, RoundSummary


def require_logged(records: Sequence[RoundRecord], reports: Mapping[str, Report], *, unfinished: bool) -> None:
    """Return if the logs have each recorded round, with the ending that was recorded, and no other round.

    A round that was under way when the coordinator's process ended has no record. In a session under way the last round
    may have a record before it has an ending, and one that ended meanwhile is not among ``records``.

    Args:
        records: Of all rounds, as the registry had them before the logs were read.
        reports: Name → report of all logs.
        unfinished: The last session is under way.

    Raises:
        TrustError: The log of a session, a round or its ending is missing, or a round has no record.
    """
    logged = {(report.offer, each.plan): each for report in reports.values() for each in report.rounds}
    *_, last = reports.values()
    open_round = {(last.offer, last.open_plan)} if unfinished else set()
    _require_recorded(records, {report.offer for report in reports.values()}, logged, open_round)
    recorded = {(record.offer, record.plan) for record in records}
    for (offer, plan), each in logged.items():
        under_way = unfinished and offer == last.offer
        if (offer, plan) not in recorded and each.reason != INTERRUPTED and not under_way:
            text = f"a round that the log says {each.ending} is not recorded in the registry"
            raise TrustError(text, about="record", value=plan)


def _require_recorded(
    records: Sequence[RoundRecord],
    offers: Collection[str],
    logged: Mapping[tuple[str, str], RoundSummary],
    open_round: Collection[tuple[str, str | None]],
) -> None:
    for record in records:
        if record.offer not in offers:
            text = f"round {record.round} was recorded, and the log of its session is missing"
            raise TrustError(text, about="session", value=record.round)
        if record.plan is None or (record.offer, record.plan) in open_round:
            continue
        found = logged.get((record.offer, record.plan))
        if found is None or not _agrees(record, found):
            text = f"round {record.round} was recorded with another ending than its log has"
            raise TrustError(text, about="record", value=record.round)


def _agrees(record: RoundRecord, logged: RoundSummary) -> bool:
    if logged.result is None:
        return record.version is None and record.reason == logged.reason
    return (record.version, record.adapter, record.survivors) == (*logged.result, logged.survivors)
