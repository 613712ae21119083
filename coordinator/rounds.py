"""The rounds of a federation: drive the protocol core over a transport, step the adapter, commit each round.

This file holds the order of the steps; ``aggregation.server`` decides which is legal, and the kind of round
(``edgeadapt.rounds.roundtask``) what the next adapter is. A device that answers wrongly, late or not at all drops out
of the round and is asked again in the next one."""

import logging
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from aggregation import groups, server
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.groups import GroupSum
from aggregation.messages import Plan
from aggregation.server import AbortReason, Collecting, Confirming, Established, RoundAborted, RoundResult, Unmasking
from aggregation.spec import SessionSpec
from aggregation.steps import ADAPTER, Step
from coordinator import lastsum
from coordinator.lastsum import LastSum, names
from coordinator.registry import StoredAdapter, state_digest
from coordinator.runstate import Need
from coordinator.schedule import evaluations, next_evaluation
from coordinator.session import LOOK, Cohort, Exchange, SessionRequest, attachments, establish, obstacle
from coordinator.settings import FederationSettings
from coordinator.statedir import CoordinatorStateDir
from coordinator.transport import Transport
from edgeadapt import traces
from edgeadapt.auditing.account import Account, logged
from edgeadapt.formats import files
from edgeadapt.formats.cores import cores
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import GroupRecord, PrivacyBound, RoundRecord, VersionManifest
from edgeadapt.rounds import combination, optimizer
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.roundtask import RoundTask, ServerStep, SummedRound
from edgeadapt.rounds.taskkinds import kind_of
from edgeadapt.rounds.tasklimits import TaskLimits

log = logging.getLogger("edgeadapt.coordinator")
POLL = 30.0  # seconds between two looks whether an evaluation is due, when nothing else is to do
SLACK = 2.0**-30  # relative: as many rounds as the noise is calibrated to are within the epsilon, however it rounds


def federate(leader: CoordinatorStateDir, transport: Transport) -> Iterator[RoundRecord]:
    """Run the rounds that are still to do, and yield the record of each one once it is committed.

    The records of ``leader`` say which rounds are done; the revocation list is read for each session. Raises
    ConfigError: a setting differs from that of a sum without a result, or the optimizer from that of the registry; or
    the method shares what devices keep to themselves. Raises EdgeAdaptError: the registry is empty or failed or has no
    space, or no session could be made in ``settings.attempts`` attempts. Raises TrustError: the registry or a log was
    altered, or they contradict each other."""
    leader.transcripts.finish()  # before a device is asked: what a kill left is repaired, and other damage refused
    run = _Run(leader, transport, leader)
    try:
        run.last = _found(leader)
        if leader.settings.has_noise:
            run.account = _account(leader)
        number = len(leader.registry.rounds())
        while run.goes_on(number):
            number += 1
            yield run.round(number)
    finally:
        run.lifetime.end()
        leader.transcripts.finish()


@dataclass(slots=True)
class _Run:
    """State between the rounds of a run. ``cohort`` and ``session`` are those of the last round: None before the first,
    ``session`` also where the next round needs another."""

    given: CoordinatorStateDir  # with the settings of the file
    transport: Transport
    leader: CoordinatorStateDir  # with those of the next round
    last: LastSum | None = None  # binds devices
    pair: tuple[str, ...] = ()  # contents of the releases that the schedule compared last
    earliest: datetime | None = None  # of the next evaluation by schedule; None: at any time
    account: Account = field(default_factory=Account)  # what sums have revealed so far
    cohort: Cohort | None = None
    session: Established | None = None
    lifetime: traces.Span = traces.NO_SPAN  # span of the session

    def goes_on(self, done: int) -> bool:
        """Check that there is another round, or wait for it, and set what it is; settings are read again if asked."""
        while True:
            self.given = self.given.reloaded()
            settings = self._scheduled(done) if self.given.settings.evaluation.every else self.given.settings
            self.leader, self.transport.deadline = replace(self.given, settings=settings), settings.deadline
            if self.cohort is not None:
                self.cohort.leader = self.leader
            if done < settings.rounds or not settings.evaluation.every:
                return done < settings.rounds
            self.leader.run.waits(Need.EVALUATION)
            self.transport.clock.sleep(POLL)

    def _scheduled(self, done: int) -> FederationSettings:
        """Let the next round be the evaluation that is due; otherwise what is to do besides evaluations."""
        settings, last, records = self.given.settings, self.last, self.given.registry.rounds()
        if last is not None and last.adapter == self.given.registry.head().newest[1]:  # the same sum again
            if last.kind is EvaluationTask:
                pair = self.pair or [str(last.terms[f"evaluation.{name}"]) for name in ("newest", "previous")]
                return settings.evaluating(done, *pair)
        elif self.earliest is None or self.earliest <= datetime.now(UTC):
            following, now = next_evaluation(self.given.folder, settings.evaluation, records), datetime.now(UTC)
            if following.due and following.due <= now:  # one that is aborted waits as well
                self.pair, self.earliest = following.pair, now + timedelta(hours=settings.evaluation.every)
                return settings.evaluating(done, *following.pair)
        return settings.model_copy(update={"rounds": settings.rounds + evaluations(records)})

    def round(self, number: int) -> RoundRecord:
        begin, registry, settings = time.perf_counter(), self.leader.registry, self.leader.settings
        log.info("round %d of %d begins", number, settings.rounds, extra={"round": number})
        adapter = registry.newest_adapter()
        if self.cohort is None:
            self._check(number, adapter)
        task = self._task(number, adapter)
        # Whatever can fail after a sum was unmasked fails before: devices help to few sums from an adapter.
        rule, begins = settings.rule(task), adapter.manifest.plan is None
        kept = {} if begins else registry.optimizer_state()  # a state is of one base
        state = optimizer.restore(rule, kept, task.state_size(adapter.layout))
        cohort, session = self._devices(number, adapter, task)
        current = _Round(cohort, number, adapter, task)
        with traces.span("round", within=self.lifetime, round=number, devices=len(session.devices)) as span:
            cohort.dropped.clear()
            cohort.round = number
            spec = session.session.spec
            _require_budget(self.account, session, self.leader)
            dealt = self.last.dealt if self.last else session.devices if spec.grouping else ()
            with registry.reserved(adapter.blob, dict(state)):
                ended = current.aggregate(session, self.last)
            self.last = current.last_sum(ended, dealt) or self.last
            self.account = self.account.after(spec, _named(ended))
            epsilon, stepped = self.account.epsilon(spec), None
            if isinstance(ended, RoundAborted):
                self.session = self._after_abort(ended)
            else:
                self.session = ended.session
                stepped = current.step(ended, ServerStep(rule, state, settings.aggregation.combination), epsilon)
            outcome = RoundOutcome(current, ended, stepped, epsilon, time.perf_counter() - begin)
            record = outcome.commit()
            cohort.recorder.end(record)  # after the registry: a start after a kill writes it from the record
            _measure(span, record)
        self.leader.run.moved()
        return record

    def _check(self, number: int, adapter: StoredAdapter) -> None:
        """Check before the first session what devices would refuse for good, and warn of what hardly moves them."""
        leader = self.leader
        lastsum.warn_of_stillness(adapter, leader.settings)
        if leader.settings.training_rounds >= number:
            lastsum.check_unshared(leader.transcripts, leader.settings.task(adapter.manifest), adapter.layout)

    def _task(self, number: int, adapter: StoredAdapter) -> RoundTask:
        """All sums from one adapter have the same task."""
        settings, last = self.leader.settings, self.last
        repeats = last is not None and last.adapter == adapter.manifest.sha256
        kind = last.kind if last is not None and repeats else settings.kind_of(number)
        task = settings.task_of(kind, adapter.manifest)
        if self.cohort is None:
            _warn_of_limits(task)
        if last is not None and not repeats:
            self.last = last = lastsum.binding(last, self.leader.registry, adapter, task, settings)
        if last is not None and last.kind is kind:
            _require_same_terms(last, task, adapter, self.leader)
        return task

    def _devices(self, number: int, adapter: StoredAdapter, task: RoundTask) -> tuple[Cohort, Established]:
        """Keep the devices and the session of the last round, or choose others where that session is over."""
        settings, kind = self.leader.settings, type(task)
        if self.cohort is None or self.session is None or self._is_over(self.cohort, self.session, kind):
            left = sum(settings.kind_of(each) is kind for each in range(number, settings.rounds + 1))
            rounds = max(1, min(left, settings.aggregation.session_rounds))
            self.lifetime.end()
            self.transport.keep(self.last.survivors if self.last else ())
            self._await_turn()
            self.transport.await_turns()
            self.lifetime = traces.begin("session", first_round=number, rounds=rounds)
            with traces.span("establish", within=self.lifetime):
                wanted = SessionRequest(adapter, task, rounds, f"session-{number}", self.last)
                self.cohort, self.session = establish(self.leader, self.transport, wanted)
            self.lifetime.set(devices=len(self.session.devices))
        return self.cohort, self.session

    def _await_turn(self) -> None:
        """Wait until the last sum, also one of a run before, is as long ago as the settings, read again, demand."""
        clock, sums = self.transport.clock, [each for each in self.leader.registry.rounds() if each.reason is None]
        if sums and (ended := sums[-1].ended) is not None and self.given.settings.interval:
            begin = clock.now() - max(0.0, time.time() - ended)
            while (left := begin + self.given.settings.interval - clock.now()) > 0:
                self.leader.run.waits(Need.INTERVAL)
                clock.sleep(min(LOOK, left))
                self.given = self.given.reloaded()

    def _is_over(self, cohort: Cohort, session: Established, kind: type[RoundTask]) -> bool:
        """Whether the next round needs another session, as for a task with other sums. A survivor of the last sum that
        is not in this session can only join another, and only another session leaves out a survivor whose certificate
        was revoked since."""
        revoked = self.leader.await_root(self.transport.clock.sleep).revoked if self.last else cohort.revoked
        now = datetime.now(UTC)
        if kind_of(session.session.spec.vector) is not kind:
            return True
        if session.is_over(now) or obstacle(session, self.last, cohort.revoked):
            return True
        return revoked != cohort.revoked

    def _after_abort(self, aborted: RoundAborted) -> Established | None:
        """Choose the session of the next round; None if another one is better. A session that lost so many devices
        while it was made that each round needs all of the others is given up, if there are more. Where the next round
        is bound to the survivors of a sum, other devices do not help."""
        session = aborted.session
        if session is None or self.last is not None or len(session.devices) >= len(self.transport.nodes()):
            return session
        few = server.too_few(session.session.spec, len(session.devices) - 1, "devices", None)
        return session if few is None else None


@dataclass(frozen=True, slots=True)
class Summed:
    session: Established
    result: RoundResult


@dataclass(frozen=True, slots=True)
class NextAdapter:
    manifest: VersionManifest
    blob: bytes
    state: Tensors
    groups: tuple[GroupRecord, ...]


@dataclass(frozen=True, slots=True)
class _Round:
    cohort: Cohort
    number: int
    adapter: StoredAdapter
    task: RoundTask

    def aggregate(self, session: Established, last: LastSum | None) -> Summed | RoundAborted:
        """Do steps 5–8 of the protocol: from the plan to the sum of the survivors, and the session after it. ``last``:
        plan for the survivors of this sum, and name no others as survivors: devices would refuse."""
        manifest, group = self.adapter.manifest, str(self.number)
        planned = session.plan(
            adapter_version=manifest.version,
            adapter_digest=manifest.sha256,
            training=self.task.encode(),
            cohort=last.survivors if last else None,
            dealt=last.dealt if last else (),
            at=datetime.now(UTC),
        )
        if isinstance(planned, RoundAborted):
            return planned
        state, plans = planned
        self.cohort.recorder.begin(state.plan)
        extra = attachments(self.cohort.recorder.receipts(plans), {ADAPTER: self.adapter.blob})

        spec = session.session.spec
        least = len(plans) if last else _needed(spec, state.plan, max(spec.threshold, spec.minimum_survivors))

        def inputs(state: Collecting, silent: Collection[str]) -> bool:
            few = not _enough(spec, state.plan, state.vectors, least)
            return few and _enough(spec, state.plan, {*state.vectors, *silent}, least)

        asked = Exchange(Step.PLAN, Collecting.add, plans, extra, state.check, inputs, least)
        collecting = self.cohort.exchange(state, asked, group)
        dropped = [device for device in collecting.plan.members if device not in collecting.vectors]
        if last is not None and dropped:
            text = f"no update of {names(dropped)}, and devices help to another sum with all of the last one only"
            return RoundAborted(AbortReason.TOO_FEW, text, collecting.established)
        collected = collecting.close()
        if isinstance(collected, RoundAborted):
            return collected
        confirming, bodies = collected
        if isinstance(confirming, Confirming):
            needed = max(least, _needed(spec, state.plan, spec.quorum))
            signing = Exchange(
                Step.SURVIVORS, Confirming.on_consistency_signature, bodies, awaits=_signatures, needed=needed
            )
            confirmed = self.cohort.exchange(confirming, signing, group).close()
            if isinstance(confirmed, RoundAborted):
                return confirmed
            confirming, bodies = confirmed
        needed = min(least, len(bodies))
        revealing = Exchange(Step.UNMASK, Unmasking.on_unmask_response, bodies, awaits=_responses, needed=needed)
        unmasking = self.cohort.exchange(confirming, revealing, group)
        with traces.span("sum"):
            unmasked = unmasking.close(cores(), self.cohort.corrupt)
        return unmasked if isinstance(unmasked, RoundAborted) else within_reach(*unmasked)

    def last_sum(self, ended: Summed | RoundAborted, dealt: tuple[str, ...]) -> LastSum | None:
        """The sum of the round, if it binds devices. The adapter made from a sum may have the same bytes."""
        if isinstance(ended, RoundAborted):
            survivors = ended.unmasked
            spoilers = ended.blamed if ended.reason is AbortReason.UNRECOVERABLE else ()
        else:
            survivors, spoilers = ended.result.survivors, ()
        serials = {name: self.cohort.serials[name] for name in survivors}
        digest = self.adapter.manifest.sha256
        return LastSum(digest, serials, frozenset(spoilers), type(self.task), dealt) if survivors else None

    def step(self, ended: Summed, how: ServerStep, epsilon: float | None) -> NextAdapter:
        parent, plan, result = self.adapter.manifest, self.cohort.recorder.log.plan or b"", ended.result
        spec, survivors = ended.session.session.spec, result.survivors
        with traces.span("combine"):
            summed = SummedRound(spec, self.adapter.tensors, bytes.fromhex(parent.sha256), result.sums)
            state, tensors = self.task.next_adapter(summed, how)
            far = self.task.distances(summed, how)
            blob = files.encode(tensors)
        manifest = replace(
            parent,
            version=parent.version + 1,
            sha256=files.sha256(blob),
            size=len(blob),
            parent=parent.sha256,
            round=self.number,
            plan=plan.hex(),
            rule=optimizer.to_rule(how.rule),
            combination=combination.to_rule(how.combination) if how.combination else None,
            survivors=survivors,
            metrics=self.task.metrics(spec, result.values, len(survivors), summed.digest),
            privacy=PrivacyBound(epsilon, spec.privacy.delta) if spec.privacy and epsilon is not None else None,
        )
        records = (GroupRecord(each.survivors, distance) for each, distance in zip(result.sums, far, strict=bool(far)))
        return NextAdapter(manifest, blob, dict(state), tuple(records))


@dataclass(frozen=True, slots=True)
class RoundOutcome:
    of: _Round
    ended: Summed | RoundAborted  # its sum, or why there is none
    stepped: NextAdapter | None
    epsilon: float | None  # what all sums so far have revealed of the device that spent most
    seconds: float

    def commit(self) -> RoundRecord:
        leader, stepped, record = self.of.cohort.leader, self.stepped, self.record()
        for device in record.blamed:
            of = {"device": device}
            log.warning(
                "%s dealt or revealed a wrong share: let the authority revoke its certificate", device, extra=of
            )
        if record.spoiled:
            what = "a sum of round" if record.groups else "round"
            log.warning("%s %d counts as zero, for a device lied: %s", what, record.round, record.spoiled)
        with traces.span("commit"):
            if stepped is None:
                leader.registry.record_round(record, leader.key)
            else:
                leader.registry.commit_round(record, stepped.manifest, stepped.blob, stepped.state, leader.key)
        _report(record, leader.settings.rounds)
        return record

    def record(self) -> RoundRecord:
        """Describe the round, whose ending the log does not have yet."""
        cohort, stepped, head = self.of.cohort, self.stepped, self.of.cohort.leader.registry.head()
        log, last, carried = cohort.recorder.synced(), head.round, cohort.transport.take_carried()
        abort, result = (self.ended, None) if isinstance(self.ended, RoundAborted) else (None, self.ended.result)
        unchanged = last.optimizer if last else None
        return RoundRecord(
            round=last.round + 1 if last else 1,
            previous=head.digest,
            offer=log.offer.hex(),
            plan=log.plan.hex() if log.plan else None,
            entries=log.tree.size,
            root=log.tree.root().hex(),
            survivors=result.survivors if result else (),
            groups=stepped.groups if stepped else (),
            dropped=dict(cohort.dropped),
            blamed=abort.blamed if abort else result.blamed if result else (),
            reason=abort.reason.value if abort else None,
            aborted=abort.detail if abort else None,
            spoiled=groups.spoiled(result.sums) if result else None,
            sum=result.digest.hex() if result else None,
            version=stepped.manifest.version if stepped else None,
            adapter=stepped.manifest.sha256 if stepped else None,
            optimizer=state_digest(stepped.state) if stepped else unchanged,
            bytes_up=carried.up,
            bytes_down=carried.down,
            seconds=self.seconds,
            epsilon=self.epsilon,
            metrics=stepped.manifest.metrics if stepped else {},
            ended=cohort.recorder.now(),
        )


def _report(record: RoundRecord, rounds: int) -> None:
    """Log how a round ended. A survivor may drop out too, after its update is in the sum."""
    survivors, late = len(record.survivors), len(record.dropped.keys() & set(record.survivors))
    early = len(record.dropped) - late
    text = f"{survivors} of {survivors + early} devices are in the sum"
    dropouts = [f"{count} {when} it" for count, when in ((early, "before"), (late, "after")) if count]
    text += f"; dropouts: {', '.join(dropouts)}" if dropouts else ""
    extra = {"record": record, "round": record.round, "rounds": rounds}
    level = logging.WARNING if record.aborted else logging.INFO
    ended = f"aborted: {record.aborted}" if record.aborted else text
    log.log(level, "round %d of %d: %s", record.round, rounds, ended, extra=extra)


def _measure(span: traces.Span, record: RoundRecord) -> None:
    counts = {"survivors": len(record.survivors), "dropouts": len(record.dropped)}
    sizes = {"bytes_up": record.bytes_up, "bytes_down": record.bytes_down}
    made = {"version": record.version, "epsilon": record.epsilon}
    known = {name: value for name, value in made.items() if value is not None}
    span.set(outcome="sum" if record.version else "abort", **counts, **sizes, **known)
    if record.reason is not None:
        span.fail(record.reason)


def _found(leader: CoordinatorStateDir) -> LastSum | None:
    """Find the last sum from the newest adapter, or else that which made it."""
    registry, transcripts = leader.registry, leader.transcripts
    number, digest = registry.head().newest
    parent, records = registry.version(number).manifest.parent, registry.rounds()
    last = lastsum.find(transcripts, digest, records)
    return last or (lastsum.find(transcripts, parent, records) if parent else None)


def _require_same_terms(last: LastSum, task: RoundTask, adapter: StoredAdapter, leader: CoordinatorStateDir) -> None:
    """Check that devices would have the task of the last sum: they help to no other sum from its adapter. Raises
    ConfigError: a setting has changed."""
    settings = leader.settings
    now = lastsum.terms(task, settings.clip_norm(task), settings.weight_cap(task), settings.aggregation.groups)
    for name, before in last.terms.items():
        if now[name] != before:
            why, until = "has no result", "made the next adapter"
            if last.still:
                why, until = "hardly moved the adapter", "moved it"
            text = f"{name} is {now[name]}, and the last sum before adapter {adapter.manifest.version}, with {before}, "
            text += f"{why}: set it back to {before} until a round has {until}"
            raise ConfigError(text, about=name)


def _signatures(state: Confirming, silent: Collection[str]) -> bool:
    """Whether the unmask request needs the consistency signatures of ``silent`` devices, and has enough with them."""
    spec, plan, signed = state.survivor_set.session.spec, state.survivor_set.plan, state.consistency_signatures
    few = not _enough(spec, plan, signed, spec.quorum)
    return few and _enough(spec, plan, {*signed, *silent}, spec.quorum)


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
        return min((member in answered) + len(session.neighbors(member, answered)) for member in members)

    return fewest(state.responses) < session.spec.threshold <= fewest({*state.responses, *silent})


def within_reach(session: Established, result: RoundResult) -> Summed:
    """Replace a sum that honest survivors cannot have (``RoundTask.check_sum``) by zero, as if nobody had examples.

    A device lied, and nobody can tell which. If the round had no result, devices would help to only a few more sums
    from the adapter, all with the liar, which could use them up. So a next version is made that has nothing of the sum.

    Survivors may have weight 0, and so may all of them: a device without usable examples answers as every other one."""
    spec = session.session.spec
    return Summed(session, replace(result, sums=tuple(_within_reach(spec, each) for each in result.sums)))


def _within_reach(spec: SessionSpec, found: GroupSum) -> GroupSum:
    try:
        kind_of(spec.vector).check_sum(spec, found.values, len(found.survivors))
    except DataError as error:
        return GroupSum(found.survivors, spec.vector.zeros(), found.spoiled or str(error))
    return found


def _account(leader: CoordinatorStateDir) -> Account:
    """Add up what sums have revealed so far, also those of rounds that a kill interrupted, which have no record."""
    account = Account()
    for entries in leader.transcripts.sessions():
        account = logged(account, entries)
    return account


def _named(ended: Summed | RoundAborted) -> tuple[str, ...]:
    return ended.named if isinstance(ended, RoundAborted) else ended.result.survivors


def _require_budget(account: Account, session: Established, leader: CoordinatorStateDir) -> None:
    """Check that the smallest sum of a session may still be revealed. Repeats and aborted rounds count too. Raises
    ConfigError: it would take the account beyond the epsilon of the settings."""
    limit, spec = leader.settings.privacy.epsilon, session.session.spec
    if not limit:
        return
    epsilon = account.epsilon_of_next(spec, session.devices)
    if epsilon > limit * (1 + SLACK):
        text = f"after {account.noisy} sums, another could spend an epsilon of {epsilon:.3f}, above {limit:g}: the "
        text += "federation ends here, or raise privacy.epsilon, which devices may refuse"
        raise ConfigError(text, about="privacy.epsilon")


def _warn_of_limits(task: RoundTask) -> None:
    """Tell the operator if devices whose owners left the limits as they are will refuse the task."""
    try:
        TaskLimits().check(task, {})
    except ProtocolError as error:
        log.warning("devices with the default policy refuse these rounds (%s): change the setting, or theirs", error)
