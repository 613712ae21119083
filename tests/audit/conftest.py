"""Sessions of the small fleet of tests/aggregation with their transcripts."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from aggregation import envelope, transcript
from aggregation.messages import Assignment, Message
from aggregation.policy import Policy
from aggregation.server import Confirming, RoundAborted
from aggregation.spec import Adversary
from aggregation.steps import Step
from aggregation.transcript import MAGIC, Abort, Checkpoint, Entry, Result, Stage, Transcript
from coordinator.audit.auditor import Report, audit
from tests.support.fleet import ADAPTER, entropy, make_fleet, session_spec

__all__ = ["entropy"]
NEW_ADAPTER = "ab" * 32
METHODS = {
    Step.SURVIVORS: ("on_survivors", "on_consistency_signature"),
    Step.UNMASK: ("on_unmask", "on_unmask_response"),
}
Lost = Mapping[Step, Sequence[str]]
Change = Callable[[list[Entry]], list[Entry]]


@dataclass(slots=True, repr=False)
class Logged:
    """A session that is logged as it goes. ``raw`` is the log; ``vectors`` the masked vectors by digest."""

    fleet: Any
    log: Transcript = field(init=False)
    raw: bytes = MAGIC
    vectors: dict[bytes, bytes] = field(default_factory=dict)
    session: Any = None
    version: int = 1
    adapter: str = ADAPTER
    publish: Callable[[Any], str] = lambda result: NEW_ADAPTER

    def run(self, rounds: Sequence[Lost]) -> "Logged":
        """Steps 1–4, then a round for each of ``rounds``: step → devices lost there."""
        self._establish()
        for lost in rounds:
            self._round(lost)
        self.raw += self.log.checkpoint(self.fleet.key, Stage.CLOSED)
        return self

    @property
    def entries(self) -> tuple[Entry, ...]:
        return transcript.read(self.raw).entries

    def ends(self) -> list[int]:
        """Where the record of each entry ends."""
        sizes = [4 + len(transcript.ENTRY.encode(entry)) for entry in self.entries]
        return [len(MAGIC) + end for end in itertools.accumulate(sizes)]

    def audit(self, raw: bytes | None = None, *, kept: bool = True, unfinished: bool = False) -> Report:
        root, key = self.fleet.authority.root, self.fleet.key.public
        found = self.vectors.get if kept else lambda digest: None
        return audit(self.raw if raw is None else raw, root, key, found, unfinished=unfinished)

    def rewritten(self, change: Change) -> bytes:
        """The log with other entries, numbered anew and signed anew: what the coordinator itself can forge."""
        log, raw = Transcript(self.log.offer), MAGIC
        for entry in change(list(self.entries)):
            log.round = entry.round
            if entry.kind != Checkpoint.TAG:
                raw += log._append(entry.kind, entry.peer, entry.message)
            else:
                last = entry == self.entries[-1]
                raw += log.checkpoint(self.fleet.key, Stage.CLOSED if last else Stage.OPEN)
        return raw

    def find(self, kind: type[Message], round_: int = 0, peer: str | None = None) -> Entry:
        """The first such entry."""
        return next(
            entry
            for entry in self.entries
            if (entry.kind, entry.round) == (kind.TAG, round_) and peer in (None, entry.peer)
        )

    def resigned(self, entry: Entry, kind: type[Message], **changes: Any) -> Entry:
        """The entry with another message in it, signed by the same party: what that party itself can forge."""
        device = self.fleet.devices.get(entry.peer) if kind is not Assignment else None
        key = device.identity if device else self.fleet.key
        message = envelope.open_verified(kind, entry.message, key.public, entry.peer)
        return replace(entry, message=envelope.sign(key, replace(message, **changes)))

    def with_changed(self, kind: type[Message], round_: int = 0, peer: str | None = None, **changes: Any) -> bytes:
        """The log with one message changed by its own signer, and checkpoints that fit."""
        old = self.find(kind, round_, peer)
        new = self.resigned(old, kind, **changes)
        return self.rewritten(lambda entries: [new if entry == old else entry for entry in entries])

    def _establish(self) -> None:
        fleet = self.fleet
        offering, offer = fleet.offer()
        self.log = Transcript(offering.offer)
        names = sorted(fleet.devices)
        self.raw += self.log.sent(Step.OFFER, dict.fromkeys(names, offer))
        for name in names:
            offering = self._received(Step.OFFER, offering.on_advert, name, fleet.join(name, offer))
        sharing, roster = offering.close()
        self.raw += self.log.sent(Step.ROSTER, dict.fromkeys(names, roster))
        for name in names:
            sharing = self._received(Step.ROSTER, sharing.on_shares, name, fleet.share(name, roster))
        self.session = sharing.close()
        self.raw += self.log.checkpoint(fleet.key)

    def _received(self, step: Step, accept: Callable[[str, bytes], Any], name: str, body: bytes) -> Any:
        state = accept(name, body)
        self.raw += self.log.received(step, name, body)
        return state

    def _round(self, lost: Lost) -> None:
        state, plans = self.session.plan(
            adapter_version=self.version, adapter_digest=self.adapter, training=b"settings", cohort=None
        )
        self.log.begin(state.plan)
        self.raw += self.log.sent(Step.PLAN, plans)
        plan = state.plan.digest()
        for name in self._left(plans, lost, Step.PLAN):
            body = self.fleet.contribute(name, plans[name])
            state = self._received(Step.PLAN, state.on_masked_input, name, body)
            self.vectors[state.vectors[name]] = transcript.packed_vector(body)
        outcome = state.close()
        while not isinstance(outcome, RoundAborted) and isinstance(outcome[1], dict):
            state, bodies = outcome
            step = Step.SURVIVORS if isinstance(state, Confirming) else Step.UNMASK
            outcome = self._exchange(step, state, bodies, lost)
        if isinstance(outcome, RoundAborted):
            self.session = outcome.session
            self.raw += self.log.ended(self.fleet.key, Abort(plan, outcome.reason.value))
            return
        self.session, result = outcome
        self.version, self.adapter = self.version + 1, self.publish(result)
        ending = Result(plan, result.survivors, result.digest, self.version, self.adapter)
        self.raw += self.log.ended(self.fleet.key, ending)

    def _exchange(self, step: Step, state: Any, bodies: Mapping[str, bytes], lost: Lost) -> Any:
        ask, take = METHODS[step]
        self.raw += self.log.sent(step, bodies)
        for name in self._left(bodies, lost, step):
            state = self._received(step, getattr(state, take), name, self.fleet.answer(ask, name, bodies[name]))
        return state.close()

    def _left(self, names: Mapping[str, bytes], lost: Lost, step: Step) -> list[str]:
        return sorted(set(names) - set(lost.get(step, ())))


def make(
    rounds: Sequence[Lost],
    devices: int = 4,
    adversary: Adversary = Adversary.ACTIVE,
    policy: Policy | None = None,
    **changes: Any,
) -> Logged:
    return Logged(make_fleet(devices, spec=session_spec(devices, adversary=adversary, **changes), policy=policy)).run(
        rounds
    )


@pytest.fixture(scope="session")
def logged_of() -> Callable[..., Logged]:
    """Run and log a session: ``rounds`` lists, for each, step → devices lost there."""
    return make


@pytest.fixture(scope="session")
def logged() -> Logged:
    """Four devices; a round with one lost before its update, one with one lost after it, one without a sum."""
    lost = ({Step.PLAN: ["device-001"]}, {Step.UNMASK: ["device-002"]}, {Step.PLAN: ["device-000", "device-001"]})
    return make(lost)
