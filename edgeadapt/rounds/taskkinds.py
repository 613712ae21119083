"""The kinds of round, and the task of a plan, which is of one of them. A new kind is a module and a line here."""

from aggregation.vector import VectorSpec
from edgeadapt.rounds.analytic import AnalyticTask
from edgeadapt.rounds.discovery import DiscoveryTask
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.observation import ObservationTask
from edgeadapt.rounds.roundtask import RoundTask, names_in
from edgeadapt.rounds.task import Task

KINDS: tuple[type[RoundTask], ...] = (Task, AnalyticTask, EvaluationTask, ObservationTask, DiscoveryTask)


def decode(raw: bytes) -> RoundTask:
    """Read the task of a plan: of the kind whose fields it has. Law: ``decode(t.encode()) == t``. Raises ProtocolError
    if it is of no kind, or a field is missing, unknown or out of range."""
    names = names_in(raw)
    kind = min(KINDS, key=lambda kind: len(names.symmetric_difference(kind.names())))
    return kind.read(raw, names)


def kind_of(spec: VectorSpec) -> type[RoundTask]:
    first = spec.segments[0].name
    return next((kind for kind in KINDS if first in (kind.SEGMENT, kind.EXACT_SEGMENT)), Task)
