"""Audit a coordinator from its files: ``AuditInput`` reads them, ``audit`` checks a session and returns a ``Report``.

An auditor needs the bare install only. In reading order: ``transcripts`` (files), ``history`` (a log, message by
message), ``rules`` (the checks on a history), ``auditor`` (all checks of a session in their order),
``weaknesses`` (warnings), ``recompute`` (the published adapters) and ``findings`` (what is reported)."""

from edgeadapt.auditing.auditor import audit, chain
from edgeadapt.auditing.findings import Check, Finding, Problem, ProducedAdapter, Report, RoundSummary, Status
from edgeadapt.auditing.history import checkpoints
from edgeadapt.auditing.recompute import Recomputation
from edgeadapt.auditing.transcripts import AuditInput, AuditOptions

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
