"""The rounds of evaluation of a coordinator: which releases they compared, what they found, and what follows from it.
The signed record of a round names its plan by digest. So the plan that a log has under that digest is the one that the
devices had, no matter who keeps the log."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from aggregation import envelope
from aggregation.errors import ConfigError, DataError, ProtocolError, TrustError
from aggregation.messages import Assignment, Plan
from aggregation.transcript.entries import read
from edgeadapt.auditing.transcripts import logs
from edgeadapt.formats import storage
from edgeadapt.formats.registryfiles import TRANSCRIPT, RegistrySettings
from edgeadapt.formats.release import Release
from edgeadapt.releases.drift import JudgedDrift, compare, observations
from edgeadapt.releases.history import audit_repository, rollback_after
from edgeadapt.releases.lineage import GovernedVersion, Lineage
from edgeadapt.releases.prepared import RollbackCondition
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.releases.rollback import note_evaluation, publish_prepared
from edgeadapt.releases.verdict import JudgedEvaluation, verdict
from edgeadapt.rounds.evaluation import EvaluationTask, is_evaluation


class NoVerdictError(ConfigError):
    """Is raised when no round of evaluation gives a verdict on the two releases yet."""


@dataclass(frozen=True, slots=True)
class WatchStep:
    """Says what a check of a rollout led to: an outcome, a text for a person, and maybe a verdict and a new release."""

    outcome: Literal["no rollout", "no verdict", "kept", "rolled back"]
    text: str
    evaluation: JudgedEvaluation | None = None
    release: Release | None = None


def act(repository: ChannelRepository, state_dir: Path, trust: Path | None, channel: str, adapter: str) -> WatchStep:
    """Publish the prepared rollback of a channel if the last evaluation found its newest release worse; or a drift did,
    if that is signed, too.

    A verdict after which the release stays is noted in the repository's log, once. An evaluation that led to a rollback
    already gives no verdict: the same adapter, promoted again, is compared again. The repository needs the key of
    snapshot and timestamp only; ``state_dir`` and ``trust`` are as for ``Lineage.read``. Raises ConfigError: a rollout
    is under way without a prepared rollback, or as ``compared`` and ``publish_prepared``; DataError, TrustError: the
    registry or the repository is damaged, or does not pass its audit."""
    if channel in repository.channels and repository.rollout(channel) is None:
        return WatchStep("no rollout", f"channel {channel} rolls nothing out")
    repository.compared(channel, adapter)
    current = repository.released(channel)
    condition = repository.prepared.accept(channel, current).condition
    if condition.began is not None and (drift := _drift(state_dir, trust, condition)):
        new = publish_prepared(repository, channel, drift).release
        text = f"{compare(drift.before, drift.after)}\nchannel {channel} is rolled back: "
        return WatchStep("rolled back", f"{text}release {new.number} is release {condition.again} again", None, new)
    try:
        judged, noted = judge(repository, state_dir, trust, channel, adapter, condition.margin)
    except NoVerdictError as error:
        return WatchStep("no verdict", str(error))
    if judged.worse:
        new = publish_prepared(repository, channel, judged).release
        text = f"{judged}; channel {channel} is rolled back: release {new.number} is release {condition.again} again"
        return WatchStep("rolled back", text, judged, new)
    if not noted:
        note_evaluation(repository, channel, judged)
    return WatchStep("kept", f"{judged}; release {current.number} of channel {channel} stays", judged)


def judge(
    repository: ChannelRepository, state_dir: Path, trust: Path | None, channel: str, adapter: str, margin: float
) -> tuple[JudgedEvaluation, bool]:
    """Return the verdict of the last round that compared a channel's two releases, and whether the log has it already.

    ``margin`` says how far the accuracy of the newest may be below. Raises NoVerdictError: no round compared them, or
    it counted too few examples of one of them; or that release was taken back for it, and is compared again where it
    was promoted again; otherwise as ``act``."""
    newest, previous = repository.compared(channel, adapter)
    records = audit_repository(repository.folder, None).records
    add_one = f"add one with 'edgeadapt coordinator evaluate {state_dir}', and run it"
    version = last_evaluation(Lineage.read(state_dir, trust, None), newest, previous)
    if version is None or version.record is None:
        reason = f"no round has compared the two releases of {channel}: {add_one}"
        raise NoVerdictError(reason, about="evaluation")
    number, metrics = version.record.round, version.manifest.metrics
    judged = verdict(metrics, margin)
    if judged is None:
        reason = f"round {number} counted too few of a release, or both far from the adapter on offer: raise the share"
        raise NoVerdictError(reason, about="evaluation")
    survivors = len(version.manifest.survivors)
    figures = (adapter, newest, previous, dict(metrics), judged, judged.worse)
    evaluation = JudgedEvaluation(number, version.manifest.sha256, survivors, *figures)
    if (before := rollback_after(evaluation, records)) is not None:
        led = f"release {before.action.release} of channel {before.action.subject}"
        reason = f"the evaluation of round {number} led to a rollback already ({led}): {add_one}"
        raise NoVerdictError(reason, about="evaluation")
    return evaluation, any(record.action.evaluation == evaluation for record in records)


def _drift(state_dir: Path, trust: Path | None, condition: RollbackCondition) -> JudgedDrift | None:
    """Return a drift that meets a condition; None if there is none."""
    versions = [version.manifest for version in Lineage.read(state_dir, trust, None).versions]
    try:
        before, after = observations(versions)
        judged = JudgedDrift(before, after, compare(before, after).worse)
        condition.require(judged)
    except (ConfigError, DataError, TrustError):  # too few observations, or nothing that is worse since the release
        return None
    return judged


def last_evaluation(lineage: Lineage, newest: str, previous: str) -> GovernedVersion | None:
    """Return the version of the last round that compared two adapters (``AdapterManifest.content``), or None. Raises
    TrustError if the plan of an evaluation is in no log, or is not one of an evaluation."""
    for version in reversed(lineage.versions):
        if version.record is None or version.record.plan is None or not is_evaluation(version.manifest.metrics):
            continue
        plan = find_plan(lineage.state_dir, version.record.plan)
        try:
            task = EvaluationTask.decode(plan.training)
        except ProtocolError:
            reason = f"round {version.record.round} has metrics of an evaluation, and its plan is of another kind"
            raise TrustError(reason, about="plan") from None
        if (task.newest, task.previous) == (newest, previous):
            return version
    return None


def find_plan(state_dir: Path, digest: str) -> Plan:
    """Find the plan of a round in the log of its session. Raises TrustError if no log has it. The state directory is
    only read: where the database has the logs, its copy of them is not used."""
    with closing(_newest_logs(state_dir)) as logs:
        for log in logs:
            for entry in read(log).entries:
                if entry.kind != Assignment.TAG:
                    continue
                try:
                    plan = Assignment.decode(envelope.unverified_body(entry.message)).plan
                except ProtocolError:  # only the first one of a round is kept complete
                    continue
                if plan.digest().hex() == digest:
                    return plan
    raise TrustError(f"no log of {state_dir} has the plan {digest[:16]}: restore it from a copy", about="plan")


def _newest_logs(state_dir: Path) -> Generator[bytes, None, None]:
    if not RegistrySettings.of(state_dir).database:
        yield from (storage.read(path) for path in reversed(logs(state_dir / TRANSCRIPT)))
        return
    from coordinator.statedir import transcript_table  # takes the extra of such a registry

    with transcript_table(state_dir) as table:
        yield from (table.log(session) for session in sorted(table.sizes(), reverse=True))
