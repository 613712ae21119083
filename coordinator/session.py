"""Make a session: steps 1–4 of the protocol with the devices that checked in, which is step 0. This file holds the
order of the steps; ``aggregation.server`` decides which is legal, and ``coordinator.rounds`` continues with the
session."""

import logging
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from aggregation import checks, graph, groups, server
from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError, ProtocolError, TrustError
from aggregation.messages import DIGEST, Challenge, CheckIn
from aggregation.pki import Root
from aggregation.pki.certificates import DEVICE_ID, identity, load, same_name
from aggregation.pki.revocation import RevocationList
from aggregation.server import Established, Offering, RoundAborted, Sharing
from aggregation.spec import SessionSpec
from aggregation.steps import CONSENT, PROOF, REVOCATIONS, Step
from coordinator.lastsum import LastSum, names, serials
from coordinator.registry import StoredAdapter
from coordinator.runstate import Need
from coordinator.settings import CohortSettings
from coordinator.statedir import CoordinatorStateDir
from coordinator.transcripts import Recorder
from coordinator.transport import Enough, Reply, Transport
from edgeadapt import traces
from edgeadapt.formats.cores import ahead, cores
from edgeadapt.rounds.roundtask import RoundTask

_WORD = re.compile(DEVICE_ID)
CHECK_INS = 2  # challenges in an attempt, where a device is needed that did not answer the first


@dataclass(frozen=True, slots=True)
class CheckedIn:
    answers: Mapping[str, CheckIn]  # device → its answer to the challenge
    nodes: Mapping[str, int]  # device → Flower node, of the same devices
    at: datetime  # when all their certificates are valid

    def only(self, devices: Collection[str]) -> "CheckedIn":
        answers = {device: self.answers[device] for device in devices}
        return CheckedIn(answers, {device: self.nodes[device] for device in devices}, self.at)


def check_in(
    leader: CoordinatorStateDir, root: Root, transport: Transport, group: str, last: LastSum | None, consent: str = ""
) -> CheckedIn:
    """Challenge nodes; keep those that prove which certified device they are, one node for each device.

    Where a cohort has a size, the nodes are chosen at random, and the first devices that check in are kept. But while
    the next round is bound to the survivors of the ``last`` sum, every node is challenged: nobody else knows where they
    are. So it is where the owners have to ``consent`` (``RoundTask.CONSENT``): each device says so itself, when asked.

    A device at two nodes has its key at both, and so has one with two names. It takes part at the node that answers
    first. While a survivor of the ``last`` sum is absent, the nodes without a device are challenged again.

    Returns the devices whose certificates are still valid at its end."""
    listed, cohort = transport.nodes(), leader.settings.cohort
    sampled = bool(cohort.size) and last is None
    asked = choose(listed, cohort, group, all_of_them=bool(consent)) if sampled else listed
    enough = Enough(cohort.size, 0.0) if sampled else None
    if sampled:
        log.info("%d of %d nodes are asked to check in", len(asked), len(listed))
    present: dict[str, CheckIn] = {}
    admitted: dict[str, str] = {}  # name without case, and id of the key → device
    nodes: dict[str, int] = {}
    least = leader.settings.aggregation.fewest_devices
    leader.run.asks(Step.CHECK_IN.value, 0, len(asked), least, transport.deadline)
    for attempt in range(1, CHECK_INS + 1):
        known = {*nodes.values()}
        left = [node for node in (asked if sampled else transport.nodes()) if node not in known]
        challenges = {node: Challenge(SystemEntropy().bytes(DIGEST), node) for node in left}
        bodies = {node: leader.protocol.sign(challenge) for node, challenge in challenges.items()}
        name = group if attempt == 1 else f"{group}-{attempt}"
        extra = {node: {CONSENT: consent.encode()} for node in bodies} if consent else None
        for reply in transport.ask(Step.CHECK_IN, bodies, name, extra, enough):
            try:
                device, answer = checks.check_in(root, challenges[reply.node], reply.answer(), datetime.now(UTC))
            except ProtocolError as error:
                log.info("node %d is not admitted: %s", reply.node, error)
                _note(leader, Step.CHECK_IN, reply, error, nodes)
                continue
            names = same_name(device), identity(load(answer.certificate)).key_id
            if twin := admitted.get(names[0]) or admitted.get(names[1]):
                log.warning("node %d is not admitted: node %d checked in as %s before", reply.node, nodes[twin], twin)
                continue
            admitted |= dict.fromkeys(names, device)
            present[device], nodes[device] = answer, reply.node
            leader.run.answered()
        if last is None or not last.unmet(nodes, root.revoked):
            break
    return _still_valid(root, CheckedIn(present, nodes, datetime.now(UTC)))


def _note(
    leader: CoordinatorStateDir, step: Step, reply: Reply, error: ProtocolError, devices: Collection[str]
) -> None:
    """Count what a device refused, or what was refused of it. What it says is shown without the names of others."""
    if not reply.silent:
        cause = _WORD.sub(lambda word: "a device" if word[0] in devices else word[0], reply.reason)
        leader.run.refused(error.about or step.value, "", str(error), cause)


def choose(nodes: Sequence[int], cohort: CohortSettings, group: str, *, all_of_them: bool = False) -> tuple[int, ...]:
    """Choose the nodes that are asked to check in: all alike likely, ``size`` times ``over_selection`` of them; or put
    ``all_of_them`` in an order by chance. ``group``: of the session; with a seed, it and the nodes determine the
    choice."""
    count = len(nodes) if all_of_them else min(math.ceil(cohort.size * cohort.over_selection), len(nodes))
    seed = None if cohort.seed == "random" else [cohort.seed, zlib.crc32(group.encode())]
    chosen = np.random.default_rng(seed).choice(len(nodes), size=count, replace=False)
    return tuple(nodes[int(i)] for i in (chosen if all_of_them else sorted(chosen)))


def _still_valid(root: Root, present: CheckedIn) -> CheckedIn:
    """Keep the devices whose certificates did not expire while the others checked in."""
    valid: list[str] = []
    for device, node in present.nodes.items():
        try:
            root.verify(present.answers[device].certificate, present.at)
            valid.append(device)
        except TrustError as error:
            log.info("node %d is not admitted: %s", node, error)
    return present.only(valid)


log = logging.getLogger("edgeadapt.coordinator")
S = TypeVar("S")
FIRST_PAUSE = 15.0  # seconds before a second attempt at a session or an exchange
LOOK = 1.0  # seconds between two polls whether an absent node is back
Attachments = Mapping[str, Mapping[str, bytes]]  # device → field → what its message carries besides the body


@dataclass(frozen=True, slots=True)
class Exchange(Generic[S]):
    """One message to each device, and what is made of the answers.

    Args:
        accept: (state, device, answer or what ``check`` made of it) → next state; raises ``ProtocolError``.
        check: (device, answer) → what ``accept`` takes; raises ``ProtocolError``. For long answers: it runs on all
            cores, while other answers arrive and are accepted.
        awaits: (state, devices of which nothing was heard) → whether the step after this one needs their answers and
            could follow with them.
        needed: Fewest answers that the step after this one needs.
    """

    step: Step
    accept: Callable[[S, str, Any], S]
    bodies: Mapping[str, bytes]
    extra: Attachments = field(default_factory=dict)
    check: Callable[[str, bytes], Any] | None = None
    awaits: Callable[[S, Collection[str]], bool] = lambda state, silent: False
    needed: int = 0


@dataclass(slots=True)
class Cohort:
    """Devices of a session, and how to reach them. What is asked and answered goes into the session's log. ``dropped``:
    device → the step at which it dropped out of the round under way, or of the making of the session."""

    leader: CoordinatorStateDir
    transport: Transport
    nodes: Mapping[str, int]  # device → Flower node
    recorder: Recorder
    serials: Mapping[str, int]  # device → serial of its certificate
    revoked: RevocationList | None  # the revocation list that the session applies
    dropped: dict[str, str] = field(default_factory=dict)
    round: int = 0  # under way; 0 while the session is made

    @property
    def corrupt(self) -> int:
        return graph.count_of(len(self.nodes), self.leader.settings.aggregation.corrupt_fraction)

    def exchange(self, state: S, asked: Exchange[S], group: str) -> S:
        """Send each device its message, and accept each answer in the order of arrival.

        A device that does not answer, or whose answer is refused, drops out. So does one that is slower than a quorum
        and its grace time (``CohortSettings``). While the state awaits more answers, the devices of which nothing was
        heard get the same message again: some may not have had it.

        ``group``: Flower's group id, the round or the attempt at a session. Returns the state after the last answer, to
        be closed by the caller."""
        settings, step, bodies = self.leader.settings, asked.step, asked.bodies
        with traces.span(step.value, asked=len(bodies)) as span:
            self.leader.run.asks(step.value, self.round, len(bodies), asked.needed, self.transport.deadline)
            self.recorder.sent(step, bodies)
            left = list(bodies)
            for attempt in range(1, settings.attempts + 1):
                state, silent = self._ask(state, asked, left, group if attempt == 1 else f"{group}-{attempt}")
                if not silent or attempt == settings.attempts or not asked.awaits(state, silent):
                    break
                log.warning("waiting for %s at %s: too few devices have answered", names(silent), step.value)
                self.transport.clock.sleep(pause(attempt, self.transport.deadline))
                left = self._not_revoked(silent)
                if not asked.awaits(state, left):
                    break
            span.set(answered=sum(device not in self.dropped for device in bodies))
        return state

    def _not_revoked(self, devices: Collection[str]) -> list[str]:
        try:
            listed = self.leader.read_root(datetime.now(UTC)).revoked
        except EdgeAdaptError as error:  # ends the next session, not a round whose sum may be under way
            log.warning("the revocation list cannot be read: %s", error)
            listed = None
        return [device for device in devices if listed is None or self.serials[device] not in listed.revoked]

    def _ask(self, state: S, asked: Exchange[S], left: Collection[str], group: str) -> tuple[S, list[str]]:
        """Make one attempt at an ``exchange``. Returns the state after it, and the devices that were not heard."""
        devices = {self.nodes[device]: device for device in left}
        bodies = {self.nodes[device]: asked.bodies[device] for device in left}
        fields = {self.nodes[device]: asked.extra.get(device, {}) for device in left}
        settings, check, silent = self.leader.settings.cohort, asked.check, list[str]()
        enough = Enough(settings.fewest(len(left), asked.needed), settings.grace)

        def checked(reply: Reply) -> Any:
            return check(devices[reply.node], reply.answer()) if check else reply.answer()

        replies = self.transport.ask(asked.step, bodies, group, fields, enough)
        for reply, answer in ahead(checked, replies, cores() if check else 1):
            device = devices[reply.node]
            try:
                state = asked.accept(state, device, answer())
                self.recorder.received(asked.step, device, reply.answer())
                self.dropped.pop(device, None)
                self.leader.run.answered()
                log.debug("%s answered %s", device, asked.step.value, extra={"answered": asked.step.value})
            except ProtocolError as error:
                self.dropped[device] = asked.step.value
                silent += [device] if reply.silent else []
                log.info("%s dropped out at %s: %s", device, asked.step.value, error, extra={"device": device})
                _note(self.leader, asked.step, reply, error, self.nodes)
        return state, sorted(silent)


def pause(attempt: int, longest: float) -> float:
    """Seconds to wait after an attempt, from 1: twice as long each time, up to ``longest``.

    >>> pause(1, 600.0), pause(3, 600.0), pause(100, 600.0)
    (15.0, 60.0, 600.0)
    """
    return min(FIRST_PAUSE * 2.0 ** min(attempt - 1, 32), longest)


def attachments(proofs: Mapping[str, bytes], shared: Mapping[str, bytes]) -> Attachments:
    """Join what travels in the same message as the body: each device's own proof, and the fields for all devices."""
    return {device: {PROOF: proof, **shared} for device, proof in proofs.items()}


@dataclass(frozen=True, slots=True)
class SessionRequest:
    """A session to be made. ``last``: the last sum from the adapter, if there is one. If the next round is bound to its
    survivors, the session has all of them."""

    adapter: StoredAdapter  # its layout and base are those of the session
    task: RoundTask
    rounds: int
    group: str  # begins Flower's group id of each attempt
    last: LastSum | None = None


class Lacked(Enum):
    CHECK_INS = "check-ins"
    ANSWERS = "answers"  # to the offer or the roster
    LAST_SUM = "last-sum"  # survivors of it


class FailedAttempt(NamedTuple):
    lacked: Lacked
    reason: str


def establish(leader: CoordinatorStateDir, transport: Transport, wanted: SessionRequest) -> tuple[Cohort, Established]:
    """Make a session with the devices that can be reached. Each attempt waits longer than the previous one
    (``FIRST_PAUSE``), or until a device that was absent is back. Raises EdgeAdaptError: no session came about in
    ``settings.attempts`` attempts, or a file could not be written."""
    settings, reason = leader.settings, ""
    least = settings.aggregation.fewest_devices
    for attempt in range(1, settings.attempts + 1):
        nodes = frozenset(transport.nodes())
        leader.run.waits(Need.SESSION, len(nodes), least, attempt, settings.attempts)
        attempted = _attempt(leader, transport, wanted, attempt)
        if not isinstance(attempted, FailedAttempt):
            cohort, outcome = attempted
            leader.run.made()
            log.info("session of %d devices for %d rounds", len(cohort.nodes) - len(cohort.dropped), wanted.rounds)
            if grouping := outcome.session.spec.grouping:
                log.info("rounds have %d sums: a device hides in one of %d or more", grouping.count, grouping.minimum)
            return cohort, outcome
        reason = attempted.reason
        leader.run.failed(attempted.lacked.value, reason)
        transport.keep(wanted.last.survivors if wanted.last else ())
        log.warning("session not made, attempt %d of %d: %s", attempt, settings.attempts, reason)
        if attempt < settings.attempts:
            _await_another(transport, nodes, pause(attempt, settings.deadline))
    raise EdgeAdaptError(f"no session after {settings.attempts} attempts: {reason}", about="session")


def _attempt(
    leader: CoordinatorStateDir, transport: Transport, wanted: SessionRequest, attempt: int
) -> tuple[Cohort, Established] | FailedAttempt:
    root, settings, last = leader.await_root(transport.clock.sleep), leader.settings, wanted.last
    group = f"{wanted.group}-{attempt}"
    consent, listed, least = wanted.task.CONSENT, len(transport.nodes()), settings.aggregation.fewest_devices
    with traces.span(Step.CHECK_IN.value, listed=listed, attempt=attempt) as span:
        present = check_in(leader, root, transport, group, last, consent)
        span.set(answered=len(present.nodes))
    if consent:
        leader.run.agreed(consent, len(present.nodes), listed, least)
    layout, base = wanted.adapter.layout, wanted.adapter.manifest.base_digest
    spec_of = partial(settings.session_spec, layout=layout, base_digest=base, rounds=wanted.rounds, task=wanted.task)
    if last is not None:
        if unmet := last.unmet(present.nodes, root.revoked):
            return FailedAttempt(Lacked.LAST_SUM, unmet)
        present = _around(last, present, lambda count: spec_of(count).minimum_survivors, settings.cohort.size)
    elif settings.cohort.size:
        present = present.only([*present.nodes][: settings.cohort.size])
    if (count := len(present.nodes)) < least:
        did = f"of {listed} devices agree to contribute {consent}" if consent else "devices answered"
        return FailedAttempt(Lacked.CHECK_INS, f"{count} {did}, {least} are needed")
    transport.keep(present.nodes)
    cohort, outcome = _offer(leader, transport, present, root, spec_of(count), last, group)
    if isinstance(outcome, RoundAborted):
        return FailedAttempt(Lacked.ANSWERS, outcome.detail)
    if what := obstacle(outcome, last, root.revoked):
        return FailedAttempt(Lacked.ANSWERS if last is None else Lacked.LAST_SUM, what)
    return cohort, outcome


def _await_another(transport: Transport, known: frozenset[int], seconds: float) -> None:
    """Wait until there is a node that is not ``known``, at most ``seconds``."""
    end = transport.clock.now() + seconds
    while (left := end - transport.clock.now()) > 0:
        transport.clock.sleep(min(LOOK, left))
        if not known.issuperset(transport.nodes()):
            break


def obstacle(session: Established, last: LastSum | None, revoked: RevocationList | None) -> str:
    """Explain what keeps a session from another round, and what ends that; empty if nothing. ``revoked``: the
    revocation list that the session applies."""
    if last is not None and (unmet := last.unmet(session.devices, revoked)):
        return unmet
    members = [device for device in session.devices if last is None or device in last.survivors]
    spec = session.session.spec
    aborted = server.too_few(spec, len(members), "members of the next plan", session)
    if aborted or spec.grouping is None:
        return aborted.detail if aborted else ""
    group_of = groups.deal(last.adapter, last.dealt, spec.groups) if last else groups.deal("", members, spec.groups)
    sizes = Counter(group_of[device] for device in members)
    least = min(sizes[number] for number in range(spec.groups))
    text = f"a group has {least} members of the next plan, {spec.grouping.minimum} are needed"
    return text if least < spec.grouping.minimum else ""


def _around(last: LastSum, present: CheckedIn, minimum: Callable[[int], int], size: int) -> CheckedIn:
    """Choose the devices of a session in which the survivors of the last sum are enough for another one. ``minimum``:
    size of a cohort → fewest survivors of its rounds. ``size``: of a cohort, if it has one; all survivors of the last
    sum are in it all the same."""
    bound = [device for device in present.nodes if device in last.survivors]
    others = [device for device in present.nodes if device not in last.survivors]
    others = others[: max(size - len(bound), 0)] if size else others
    while others and minimum(len(bound) + len(others)) > len(bound):
        others.pop()
    return present.only([*bound, *others])


def _offer(
    leader: CoordinatorStateDir,
    transport: Transport,
    present: CheckedIn,
    root: Root,
    spec: SessionSpec,
    last: LastSum | None,
    group: str,
) -> tuple[Cohort, Established | RoundAborted]:
    """Begin the session's log, and offer the session to the devices that are ``present``. Survivors of the last sum
    that are present are needed: without them the session is of no use."""
    answers, nodes, transcripts = present.answers, present.nodes, leader.transcripts
    certificates = {device: answer.certificate for device, answer in answers.items()}
    offering, offer = server.open_session(leader.protocol, root, spec, certificates, SystemEntropy(), present.at)
    recorder = transcripts.begin(offering.offer, root.revoked)
    cohort = Cohort(leader, transport, nodes, recorder, serials(certificates.values()), root.revoked)
    last_offers = {device: answer.last_offer or b"" for device, answer in answers.items()}
    proofs = transcripts.session_chain_proofs(recorder, last_offers)
    extra = attachments(proofs, {REVOCATIONS: root.revoked.der} if root.revoked else {})
    due = frozenset(last.survivors if last else ()).intersection(nodes)
    offers = Exchange(Step.OFFER, Offering.on_advert, dict.fromkeys(nodes, offer), extra)
    return cohort, _negotiate(cohort, offering, offers, group, due)


def _negotiate(
    cohort: Cohort, offering: Offering, offers: Exchange[Offering], group: str, due: frozenset[str]
) -> Established | RoundAborted:
    """Do steps 1–4 of the protocol. ``due``: the devices without which the session is of no use."""

    def adverts(state: Offering, silent: Collection[str]) -> bool:
        return bool(due - state.adverts.keys()) and due <= {*state.adverts, *silent}

    def shares(state: Sharing, silent: Collection[str]) -> bool:
        return bool(due - state.encrypted_shares.keys()) and due <= {*state.encrypted_shares, *silent}

    least = len(cohort.nodes) if due else max(offering.spec.threshold, offering.spec.minimum_survivors)
    sharing = cohort.exchange(offering, replace(offers, awaits=adverts, needed=least), group).close()
    if isinstance(sharing, RoundAborted):
        return sharing
    state, roster = sharing
    rosters = {device: roster for device in cohort.nodes if device not in cohort.dropped}
    least = len(rosters) if due else least
    asked = Exchange(Step.ROSTER, Sharing.on_shares, rosters, awaits=shares, needed=least)
    session = cohort.exchange(state, asked, group).close()
    if not isinstance(session, RoundAborted):
        cohort.recorder.checkpoint()
    return session
