"""Audit a coordinator from its files: ``AuditInput`` reads them, ``audit`` checks a session and returns a ``Report``.

An auditor needs the bare install only. In reading order: ``transcripts`` (files), ``history`` (a log, message by
message), ``rules`` and ``sums`` (the checks on a history), ``auditor`` (all checks of a session in their order),
``repeats`` (several sums from one adapter), ``recompute`` (the published adapters), ``findings`` (what is reported),
``formatting`` (how it is printed).
"""

from coordinator.audit.auditor import audit, chain
from coordinator.audit.findings import (
    Check,
    Finding,
    Problem,
    ProducedAdapter,
    Report,
    RoundSummary,
    Status,
)
from coordinator.audit.history import checkpoints
from coordinator.audit.recompute import Recomputation
from coordinator.audit.transcripts import AuditInput, AuditOptions

__all__ = [
    "AuditInput",
    "AuditOptions",
    "Check",
    "Finding",
    "Problem",
    "ProducedAdapter",
    "Recomputation",
    "Report",
    "RoundSummary",
    "Status",
    "audit",
    "chain",
    "checkpoints",
]
