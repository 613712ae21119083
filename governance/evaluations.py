"""The rounds of evaluation of a coordinator: which releases they compared, and what they found.

The signed record of a round names its plan by digest, and the log of the session has the plan. So the plan that is
found under that digest is the one that the devices had, whoever keeps the log.
"""

from adapters import storage
from adapters.evaluation import EvaluationTask, is_evaluation
from adapters.registryfiles import RegistrySettings
from adapters.taskkinds import decode
from aggregation import envelope, transcript
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Assignment, Plan
from coordinator.audit.transcripts import logs
from governance.lineage import GovernedVersion, Lineage

TRANSCRIPT = "transcript"  # in a state directory; ``coordinator.statedir`` has the name too, and needs SQLAlchemy


def last_evaluation(lineage: Lineage, newest: str, previous: str) -> GovernedVersion | None:
    """The version of the last round that compared two adapters; None if there was none.

    Args:
        lineage: Of a coordinator.
        newest, previous: ``AdapterManifest.content`` of them.

    Raises:
        DataError: A log is too large.
        TrustError: The plan of an evaluation is in no log, or is not one of an evaluation.
    """
    for version in reversed(lineage.versions):
        if version.record is None or version.record.plan is None or not is_evaluation(version.manifest.metrics):
            continue
        task = decode(_plan(lineage, version.record.plan).training)
        if not isinstance(task, EvaluationTask):
            reason = f"round {version.record.round} has metrics of an evaluation, and its plan is of another kind"
            raise TrustError(reason, about="plan", value=version.record.round)
        if (task.newest, task.previous) == (newest, previous):
            return version
    return None


def _plan(lineage: Lineage, digest: str) -> Plan:
    if RegistrySettings.of(lineage.state_dir).database:
        from coordinator.statedir import update_transcript  # takes the extra of such a registry

        update_transcript(lineage.state_dir)
    for path in reversed(logs(lineage.state_dir / TRANSCRIPT)):
        for entry in transcript.read(storage.read(path)).entries:
            if entry.kind != Assignment.TAG:
                continue
            try:
                plan = Assignment.decode(envelope.unverified_body(entry.message)).plan
            except ProtocolError:  # only the first one of a round is kept complete
                continue
            if plan.digest().hex() == digest:
                return plan
    reason = f"no log in {lineage.state_dir / TRANSCRIPT} has the plan {digest[:16]}: restore it from a copy"
    raise TrustError(reason, about="plan", value=digest)
