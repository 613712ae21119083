"""A coordinator without the checks by which an honest one refuses its own files: a hostile one leaves them out.

And what an auditor finds of what it did.
"""

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from coordinator import lastsum, rounds, transcripts
from coordinator.registry import Head, Registry, database
from edgeadapt.auditing import AuditInput, AuditOptions, Status
from edgeadapt.formats.manifest import RoundRecord, digest_of
from tests.support.verified import forget_verified


def unchecked_head(registry: Registry) -> Head:
    """``Registry.head``, whether or not versions and rounds agree."""
    query = select(database.rounds.c.record).order_by(database.rounds.c.round.desc()).limit(1)
    with registry.engine.connect() as connection:
        raw: Any = connection.scalar(query)
    last = None if raw is None else RoundRecord.unverified(raw)
    return Head(registry.newest_adapter().manifest.id, last, None if raw is None else digest_of(raw))


def continues_from_anything(patch: pytest.MonkeyPatch) -> None:
    """Let the coordinator continue from an adapter that no log made, and sign logs that its registry contradicts."""
    patch.setattr(Registry, "head", unchecked_head)
    patch.setattr(transcripts, "require_agreement", lambda logs, head, key: False)


def audit_failures(path: Path, at: datetime | None = None) -> set[str]:
    """What the failed checks of an audit are about; empty if it passes.

    Args:
        path: The folder of a run, or one log.
        at: When the sessions took place, if the auditor knows.
    """
    forget_verified()  # the auditor has a process of its own
    checked = AuditInput.open(path, AuditOptions(at=at))
    reports = checked.audit(unfinished=False)
    findings = [finding for report in reports.values() for finding in report.findings]
    failures = {finding.about for finding in findings if finding.status is Status.FAIL}
    if not failures:
        checked.require(reports, unfinished=False)
    return failures


def plans_anything(patch: pytest.MonkeyPatch) -> None:
    """Let the coordinator share what its devices keep to themselves, as an honest one does not ask them to."""
    patch.setattr("coordinator.lastsum.check_unshared", lambda *given: None)


def plans_for_anyone(patch: pytest.MonkeyPatch) -> None:
    """Let the coordinator repeat a round over other devices, as an honest one does not."""
    patch.setattr(rounds._Round, "last_sum", lambda *given: None)
    patch.setattr(lastsum, "find", lambda *given: None)
