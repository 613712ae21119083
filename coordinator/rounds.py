"""The rounds of a federation: drive the protocol core over a transport, step the adapter, commit each round.

``aggregation.server`` decides which step is legal, ``coordinator.optimizer`` what the next adapter is. This file holds
the order of the steps. A device that answers wrongly, late or not at all drops out of the round and is asked again in
the next one.
"""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TypeAlias

from adapters import files
from adapters.cores import cores
from adapters.layout import Tensors
from adapters.manifest import PrivacyBound, VersionManifest
from adapters.roundrecord import GroupRecord, RoundRecord
from adapters.task import Task
from adapters.taskkinds import AnyTask, kind_of, metrics_of, require_reach
from adapters.tasklimits import TaskLimits
from aggregation import groups, server
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.groups import GroupSum
from aggregation.messages import Plan
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey
from aggregation.server import AbortReason, Collecting, Confirming, Established, RoundAborted, RoundResult, Unmasking
from aggregation.spec import SessionSpec
from aggregation.steps import ADAPTER, Step
from aggregation.transcript import receipts
from coordinator import combination, lastsum, optimizer, privateparts, stillness, traces
from coordinator.audit.account import Account, logged
from coordinator.audit.transcripts import logs
from coordinator.lastsum import LastSum, names
from coordinator.nextadapter import distances_of, next_adapter, state_size
from coordinator.registry import Head, Registry, StoredAdapter, state_digest
from coordinator.session import Cohort, attachments, establish, obstacle
from coordinator.settings import FederationSettings
from coordinator.storedlog import StoredLog
from coordinator.transcripts import Transcripts
from coordinator.transport import Transport

log = logging.getLogger("edgeadapt.coordinator")
SLACK = 2.0**-30  # relative: as many rounds as the noise is calibrated to are within the epsilon, however it rounds
Outcome: TypeAlias = tuple[Established, RoundResult] | RoundAborted


def federate(
    transport: Transport,
    registry: Registry,
    *,
    key: IdentityKey,
    read_root: Callable[[datetime], Root],
    settings: FederationSettings,
    transcripts: Transcripts,
) -> Iterator[RoundRecord]:
    """Run the rounds that are still to do, and yield the record of each one once it is committed.

    Args:
        transport: Reaches the devices.
        registry: Holds the adapter; its records say which rounds are done.
        key: The coordinator's signing key.
        read_root: Now → the authority with its newest revocation list, read again for each session.
        settings: Of the federation.
        transcripts: Where each session's log is written.

    Raises:
        ConfigError: A setting differs from that of a sum without a result, or the optimizer from that of the registry;
            or the method shares what devices keep to themselves.
        EdgeAdaptError: The registry is empty or failed or has no space, or no session could be made in
            ``settings.attempts`` attempts.
        TrustError: The registry or a log was altered, or they contradict each other.
    """
    make_session = partial(
        establish, transport, key=key, read_root=read_root, settings=settings, transcripts=transcripts
    )
    cohort: Cohort | None = None
    session: Established | None = None
    lifetime = traces.NO_SPAN  # of the session
    transcripts.finish()  # before a device is asked: what a kill left is repaired, and other damage refused
    try:
        last = _found(transcripts, registry, key)
        account = _account(transcripts, key) if settings.has_noise else Account()
        for number in range(len(registry.rounds()) + 1, settings.rounds + 1):
            begin = time.perf_counter()
            adapter = registry.newest_adapter()
            if cohort is None:
                stillness.warn(adapter, settings)
                if settings.training_rounds >= number:
                    trained = settings.task(adapter.manifest)
                    privateparts.check_unshared(transcripts.folder, key.public, trained, adapter.layout)
            # Of all sums from an adapter, the task is the same.
            repeats = last is not None and last.adapter == adapter.manifest.sha256
            kind = last.kind if last is not None and repeats else settings.kind_of(number)
            task = settings.task_of(kind, adapter.manifest)
            if cohort is None:
                _warn_of_limits(task)
            if last is not None and not repeats:
                last = stillness.bound(last, registry, adapter, task, settings)
            if last is not None and last.kind is kind:
                _require_same_terms(last, task, adapter, settings)
            # Whatever can fail after a sum was unmasked fails before: devices help to few sums from an adapter.
            size = state_size(task, adapter.layout)
            state = optimizer.restore(settings.rule(task), registry.optimizer_state(), size)
            if cohort is None or session is None or _is_over(cohort, session, task, last, read_root):
                left = sum(settings.kind_of(each) is kind for each in range(number, settings.rounds + 1))
                rounds = max(1, min(left, settings.aggregation.session_rounds))
                lifetime.end()
                lifetime = traces.begin("session", first_round=number, rounds=rounds)
                with traces.span("establish", within=lifetime):
                    cohort, session = make_session(adapter, task, rounds, f"session-{number}", last)
                lifetime.set(devices=len(session.devices))
            with traces.span("round", within=lifetime, round=number, devices=len(session.devices)) as span:
                cohort.dropped.clear()
                spec = session.session.spec
                _require_budget(account, session, settings)
                dealt = last.dealt if last else session.devices if spec.grouping else ()
                with registry.reserved(adapter.blob, optimizer.to_tensors(state)):
                    outcome = _aggregate(cohort, session, adapter, task.encode(), number, last)
                last = _last_sum(cohort, adapter, kind, outcome, dealt) or last
                account = account.after(spec, _named(outcome))
                epsilon = account.epsilon(spec)
                if isinstance(outcome, RoundAborted):
                    session, made = _after_abort(outcome, last, transport), None
                else:
                    session, made = outcome[0], _step(cohort, adapter, task, state, outcome, number, settings, epsilon)
                seconds = time.perf_counter() - begin
                record = _record(cohort, registry.head(), outcome, made, seconds=seconds, epsilon=epsilon)
                _commit(registry, record, made, key)
                cohort.recorder.end(record)  # after the registry: a start after a kill writes it from the record
                _measure(span, record)
            yield record
    finally:
        lifetime.end()
        transcripts.finish()


def _measure(span: traces.Span, record: RoundRecord) -> None:
    """Describe a round's span by what its record says of all devices together."""
    found = {"survivors": len(record.survivors), "dropouts": len(record.dropped)}
    span.set(
        outcome="sum" if record.version else "abort", **found, bytes_up=record.bytes_up, bytes_down=record.bytes_down
    )
    if record.version is not None:
        span.set(version=record.version)
    if record.epsilon is not None:
        span.set(epsilon=record.epsilon)
    if record.reason is not None:
        span.fail(record.reason)


def _is_over(
    cohort: Cohort,
    session: Established,
    task: AnyTask,
    last: LastSum | None,
    read_root: Callable[[datetime], Root],
) -> bool:
    """Whether the next round needs another session, as for a task with other sums.

    A survivor of the last sum that is not in this one can only join another, and only another one leaves out a survivor
    whose certificate was revoked since.
    """
    now = datetime.now(UTC)
    if kind_of(session.session.spec.vector) is not type(task):
        return True
    if session.is_over(now) or obstacle(session, last, cohort.revoked):
        return True
    return last is not None and read_root(now).revoked != cohort.revoked


def _after_abort(aborted: RoundAborted, last: LastSum | None, transport: Transport) -> Established | None:
    """The session of the next round; None if another one is better.

    One that lost so many devices while it was made that each round needs all of the others is given up, if there are
    more. Where the next round is bound to the survivors of a sum, other devices do not help.
    """
    session = aborted.session
    if session is None or last is not None or len(session.devices) >= len(transport.nodes()):
        return session
    return session if server.too_few(session.session.spec, len(session.devices) - 1, "devices", None) is None else None


def _found(transcripts: Transcripts, registry: Registry, key: IdentityKey) -> LastSum | None:
    """The last sum from the newest adapter, or else that which made it."""
    number, digest = registry.head().newest
    parent, records = registry.version(number).manifest.parent, registry.rounds()
    found = lastsum.find(transcripts.folder, key.public, digest, records)
    return found or (lastsum.find(transcripts.folder, key.public, parent, records) if parent else None)


def _require_same_terms(last: LastSum, task: AnyTask, adapter: StoredAdapter, settings: FederationSettings) -> None:
    """Return if devices would have the task of the last sum: they help to no other sum from its adapter.

    Raises:
        ConfigError: A setting has changed.
    """
    bounds = settings.aggregation
    now = lastsum.terms(task, settings.clip_norm(task), settings.weight_cap(task), bounds.groups)
    for name, before in last.terms.items():
        if now[name] != before:
            why, until = "has no result", "made the next adapter"
            if last.still:
                why, until = "hardly moved the adapter", "moved it"
            text = f"{name} is {now[name]}, and the last sum before adapter {adapter.manifest.version}, with {before}, "
            text += f"{why}: set it back to {before} until a round has {until}"
            raise ConfigError(text, about=name, value=now[name])


def _last_sum(
    cohort: Cohort, adapter: StoredAdapter, kind: type[AnyTask], outcome: Outcome, dealt: tuple[str, ...]
) -> LastSum | None:
    """The sum of a round, if it binds devices. The adapter made from a sum may have the same bytes."""
    if isinstance(outcome, RoundAborted):
        survivors = outcome.unmasked
        spoilers = outcome.blamed if outcome.reason is AbortReason.UNRECOVERABLE else ()
    else:
        survivors, spoilers = outcome[1].survivors, ()
    serials = {name: cohort.serials[name] for name in survivors}
    digest = adapter.manifest.sha256
    return LastSum(digest, serials, frozenset(spoilers), kind, dealt) if survivors else None


def _aggregate(
    cohort: Cohort, session: Established, adapter: StoredAdapter, task: bytes, number: int, last: LastSum | None
) -> Outcome:
    """Steps 5–8 of the protocol: from the plan to the sum of the survivors, and the session after it.

    ``last``: plan for the survivors of this sum, and name no others as survivors: devices would refuse.
    """
    manifest, group = adapter.manifest, str(number)
    planned = session.plan(
        adapter_version=manifest.version,
        adapter_digest=manifest.sha256,
        training=task,
        cohort=last.survivors if last else None,
        dealt=last.dealt if last else (),
        at=datetime.now(UTC),
    )
    if isinstance(planned, RoundAborted):
        return planned
    state, plans = planned
    cohort.recorder.begin(state.plan)
    extra = attachments(receipts(cohort.recorder.log, plans), {ADAPTER: adapter.blob})

    spec = session.session.spec
    least = len(plans) if last else _needed(spec, state.plan, max(spec.threshold, spec.minimum_survivors))

    def inputs(state: Collecting, silent: Collection[str]) -> bool:
        few = not _enough(spec, state.plan, state.vectors, least)
        return few and _enough(spec, state.plan, {*state.vectors, *silent}, least)

    collecting = cohort.exchange(state, Collecting.add, Step.PLAN, plans, group, extra, state.check, inputs, least)
    dropped = [device for device in collecting.plan.members if device not in collecting.vectors]
    if last is not None and dropped:
        text = f"no update of {names(dropped)}, and devices help to another sum with all of the last one only"
        return RoundAborted(AbortReason.TOO_FEW, text, collecting.established)
    collected = collecting.close()
    if isinstance(collected, RoundAborted):
        return collected
    confirming, bodies = collected
    if isinstance(confirming, Confirming):
        confirmed = cohort.exchange(
            confirming,
            Confirming.on_consistency_signature,
            Step.SURVIVORS,
            bodies,
            group,
            awaits=_signatures,
            needed=max(least, _needed(spec, state.plan, spec.quorum)),
        ).close()
        if isinstance(confirmed, RoundAborted):
            return confirmed
        confirming, bodies = confirmed
    unmasking = cohort.exchange(
        confirming,
        Unmasking.on_unmask_response,
        Step.UNMASK,
        bodies,
        group,
        awaits=_responses,
        needed=min(least, len(bodies)),
    )
    with traces.span("sum"):
        unmasked = unmasking.close(cores(), cohort.corrupt)
    return unmasked if isinstance(unmasked, RoundAborted) else within_reach(*unmasked)


def _signatures(state: Confirming, silent: Collection[str]) -> bool:
    """Whether the unmask request needs the consistency signatures of ``silent`` devices, and has enough with them."""
    spec, plan, found = state.survivor_set.session.spec, state.survivor_set.plan, state.consistency_signatures
    few = not _enough(spec, plan, found, spec.quorum)
    return few and _enough(spec, plan, {*found, *silent}, spec.quorum)


def _enough(spec: SessionSpec, plan: Plan, answered: Collection[str], least: int) -> bool:
    """Whether ``least`` devices have answered, and of each group its minimum."""
    try:
        groups.require_minimum(spec, plan, answered, "answers", about="group")
    except ProtocolError:
        return False
    return len(answered) >= least


def _needed(spec: SessionSpec, plan: Plan, least: int) -> int:
    """Fewest answers of the members of a plan with which each group has its minimum, whichever are missing."""
    if spec.grouping is None:
        return least
    smallest = min(map(len, groups.split(spec, plan, plan.members)))
    return max(least, len(plan.members) - smallest + spec.grouping.minimum)


def _responses(state: Unmasking, silent: Collection[str]) -> bool:
    """Whether the sum needs the shares of ``silent`` devices, and has enough with them if all shares are good."""
    session, members = state.survivor_set.session, state.survivor_set.plan.members

    def fewest(answered: Collection[str]) -> int:
        """Answers in the neighborhood of a member, itself included."""
        return min((member in answered) + len(session.neighbors(member, answered)) for member in members)

    return fewest(state.responses) < session.spec.threshold <= fewest({*state.responses, *silent})


def within_reach(session: Established, result: RoundResult) -> tuple[Established, RoundResult]:
    """Take a sum that honest survivors cannot have (``require_reach``) for zero, as if nobody had examples.

    A device lied, and nobody can tell which. If the round had no result, devices would help to a few more sums from the
    adapter only, all with the liar: it could use them up. So a next version is made, which has nothing of the sum.

    Survivors may have weight 0, and so may all of them: a device without usable examples answers as every other one.
    """
    spec = session.session.spec
    return session, replace(result, sums=tuple(_within_reach(spec, each) for each in result.sums))


def _within_reach(spec: SessionSpec, found: GroupSum) -> GroupSum:
    try:
        require_reach(spec, found.values, len(found.survivors))
    except DataError as error:
        return GroupSum(found.survivors, spec.vector.zeros(), found.spoiled or str(error))
    return found


@dataclass(frozen=True, slots=True)
class _NextAdapter:
    """What the server's step made of a sum: the next adapter, and the optimizer's state after it."""

    manifest: VersionManifest
    blob: bytes
    state: Tensors
    groups: tuple[GroupRecord, ...]


def _step(
    cohort: Cohort,
    adapter: StoredAdapter,
    task: AnyTask,
    state: optimizer.State,
    outcome: tuple[Established, RoundResult],
    number: int,
    settings: FederationSettings,
    epsilon: float | None,
) -> _NextAdapter:
    """From the sum to the next adapter."""
    parent, plan = adapter.manifest, cohort.recorder.log.plan or b""
    session, result = outcome
    rule, spec, how, sums = settings.rule(task), session.session.spec, settings.aggregation.combination, result.sums
    far: tuple[float, ...] = ()
    with traces.span("combine"):
        state, tensors = next_adapter(
            spec, task, rule, state, adapter.tensors, sums=sums, combination=how, digest=parent.sha256
        )
        if how is not None and isinstance(task, Task):
            far = distances_of(spec, task, how, adapter.tensors, sums, parent.sha256)
        blob = files.encode(tensors)
    manifest = replace(
        parent,
        version=parent.version + 1,
        sha256=files.sha256(blob),
        size=len(blob),
        parent=parent.sha256,
        round=number,
        plan=plan.hex(),
        rule=optimizer.to_rule(rule),
        combination=combination.to_rule(how) if how else None,
        survivors=result.survivors,
        metrics=metrics_of(spec, result.values, len(result.survivors), bytes.fromhex(parent.sha256)),
        privacy=_bound(spec, epsilon),
    )
    records = tuple(GroupRecord(each.survivors, distance) for each, distance in zip(sums, far, strict=bool(far)))
    return _NextAdapter(manifest, blob, optimizer.to_tensors(state), records)


def _bound(spec: SessionSpec, epsilon: float | None) -> PrivacyBound | None:
    return None if spec.privacy is None or epsilon is None else PrivacyBound(epsilon, spec.privacy.delta)


def _account(transcripts: Transcripts, key: IdentityKey) -> Account:
    """What sums have revealed so far, also those of rounds that a kill interrupted, which have no record."""
    account = Account()
    for path in logs(transcripts.folder):
        account = logged(account, StoredLog.read(path, key.public).entries)
    return account


def _named(outcome: Outcome) -> tuple[str, ...]:
    """The survivors that were named to devices."""
    return outcome.named if isinstance(outcome, RoundAborted) else outcome[1].survivors


def _require_budget(account: Account, session: Established, settings: FederationSettings) -> None:
    """Return if the smallest sum of a session may still be revealed. Repeats and aborted rounds count too.

    Raises:
        ConfigError: It would take the account beyond the epsilon of the settings.
    """
    limit, spec = settings.privacy.epsilon, session.session.spec
    if not limit:
        return
    epsilon = account.epsilon_of_next(spec, session.devices)
    if epsilon > limit * (1 + SLACK):
        text = f"after {account.noisy} sums, another could spend an epsilon of {epsilon:.3f}, above {limit:g}: the "
        text += "federation ends here, or raise privacy.epsilon, which devices may refuse"
        raise ConfigError(text, about="privacy.epsilon", value=limit)


def _record(
    cohort: Cohort,
    head: Head,
    outcome: Outcome,
    made: _NextAdapter | None,
    *,
    seconds: float,
    epsilon: float | None,
) -> RoundRecord:
    """The record of the round under way, whose ending the log does not have yet."""
    log, last, carried = cohort.recorder.synced(), head.round, cohort.transport.take_carried()
    ended = outcome if isinstance(outcome, RoundAborted) else outcome[1]
    abort, result = (ended, None) if isinstance(ended, RoundAborted) else (None, ended)
    unchanged = last.optimizer if last else None
    return RoundRecord(
        round=last.round + 1 if last else 1,
        previous=head.digest,
        offer=log.offer.hex(),
        plan=log.plan.hex() if log.plan else None,
        entries=log.tree.size,
        root=log.tree.root().hex(),
        survivors=result.survivors if result else (),
        groups=made.groups if made else (),
        dropped=dict(cohort.dropped),
        blamed=ended.blamed,
        reason=abort.reason.value if abort else None,
        aborted=abort.detail if abort else None,
        spoiled=groups.spoiled(result.sums) if result else None,
        sum=result.digest.hex() if result else None,
        version=made.manifest.version if made else None,
        adapter=made.manifest.sha256 if made else None,
        optimizer=state_digest(made.state) if made else unchanged,
        bytes_up=carried.up,
        bytes_down=carried.down,
        seconds=seconds,
        epsilon=epsilon,
        metrics=made.manifest.metrics if made else {},
    )


def _warn_of_limits(task: AnyTask) -> None:
    """Tell the operator if devices whose owners left the limits as they are will refuse the task."""
    try:
        TaskLimits().check(task, {})
    except ProtocolError as error:
        log.warning("devices with the default policy refuse these rounds (%s): change the setting, or theirs", error)


def _commit(registry: Registry, record: RoundRecord, made: _NextAdapter | None, key: IdentityKey) -> None:
    """Store how the round ended, with the adapter that it made, and tell the operator what went wrong."""
    for device in record.blamed:
        log.warning("%s dealt or revealed a wrong share: let the authority revoke its certificate", device)
    if record.spoiled:
        what = "a sum of round" if record.groups else "round"
        log.warning("%s %d counts as zero, for a device lied: %s", what, record.round, record.spoiled)
    with traces.span("commit"):
        if made is None:
            log.warning("round %d aborted: %s", record.round, record.aborted)
            registry.record_round(record, key)
        else:
            registry.commit_round(record, made.manifest, made.blob, made.state, key)
