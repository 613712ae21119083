"""Sessions of the small fleet, logged as they go, and logs that the coordinator or a device forged.

The fixtures are for the ``conftest.py`` files that need them.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from aggregation import envelope
from aggregation.messages import Assignment, Message
from aggregation.policy import Policy
from aggregation.server import Confirming, RoundAborted
from aggregation.spec import Adversary
from aggregation.steps import Step
from aggregation.transcript.entries import (
    ENTRY,
    MAGIC,
    Abort,
    AdapterId,
    Checkpoint,
    Entry,
    Result,
    Stage,
    read,
    record,
)
from aggregation.transcript.log import NO_SESSION, Transcript, packed_vector
from edgeadapt.auditing import Check, Finding, Report, audit
from tests.support.fleet import ADAPTER, Fleet, make_fleet, session_spec

AT = 1_770_000_000  # 2026-02-02, in seconds since 1970
NEW_ADAPTER = "ab" * 32
SEED: AdapterId = (0, ADAPTER)
METHODS = {
    Step.SURVIVORS: ("on_survivors", "on_consistency_signature"),
    Step.UNMASK: ("on_unmask", "on_unmask_response"),
}
Dropouts = Mapping[Step, Sequence[str]]
Change = Callable[[list[Entry]], list[Entry]]


def append(log: Transcript, entry: Entry) -> bytes:
    """Append an entry under the next number; the record to append to the file."""
    log.round = entry.round
    return record(log.add(replace(entry, index=log.tree.size)))


@dataclass(slots=True, repr=False)
class LoggedSession:
    """A session that is logged as it goes. ``raw`` is the log; ``vectors`` are the masked vectors by digest."""

    fleet: Fleet
    log: Transcript = field(init=False)
    raw: bytes = MAGIC
    vectors: dict[bytes, bytes] = field(default_factory=dict)
    session: Any = None
    at: int = AT

    def run(self, rounds: Sequence[Dropouts]) -> "LoggedSession":
        """Steps 1–4, then a round for each of ``rounds``: step → devices that drop out there."""
        self._establish()
        for dropouts in rounds:
            self._round(dropouts)
        self.raw += self.log.checkpoint(self.fleet.key, Stage.CLOSED)
        return self

    @property
    def entries(self) -> tuple[Entry, ...]:
        return read(self.raw).entries

    def ends(self) -> list[int]:
        """Where the record of each entry ends."""
        sizes = [len(record(ENTRY.encode(entry))) for entry in self.entries]
        return [len(MAGIC) + end for end in itertools.accumulate(sizes)]

    def audit(self, raw: bytes | None = None, *, vectors: bool = True, unfinished: bool = False) -> Report:
        """The audit of the log, or of another one. ``vectors``: the masked vectors were kept."""
        root, key = self.fleet.authority.root, self.fleet.key.public
        kept = (lambda digest, _: self.vectors.get(digest)) if vectors else lambda digest, _: None
        return audit(self.raw if raw is None else raw, root, key, kept, unfinished=unfinished)

    def signed_anew(
        self, change: Change = lambda entries: entries, *, offer: bytes | None = None, previous: bytes = NO_SESSION
    ) -> tuple[Transcript, bytes]:
        """The log with other entries, numbered and signed anew: what the coordinator itself can forge.

        Args:
            change: Of the entries.
            offer: The offer that the checkpoints name instead of the session's own.
            previous: The checkpoint of the session before that they name.
        """
        log, raw = Transcript(offer or self.log.offer, SEED, previous), MAGIC
        for entry in change(list(self.entries)):
            log.round = entry.round
            if entry.kind == Checkpoint.TAG:
                last = entry == self.entries[-1]
                raw += log.checkpoint(self.fleet.key, Stage.CLOSED if last else Stage.OPEN)
            else:
                raw += append(log, entry)
        return log, raw

    def rewritten(self, change: Change = lambda entries: entries, **names: bytes) -> bytes:
        return self.signed_anew(change, **names)[1]

    def without(self, *dropped: Entry) -> bytes:
        return self.rewritten(lambda entries: [entry for entry in entries if entry not in dropped])

    def replaced(self, old: Entry, *new: Entry) -> bytes:
        """The log with other entries in the place of one."""
        return self.rewritten(
            lambda entries: [each for entry in entries for each in (new if entry == old else (entry,))]
        )

    def find(self, kind: type[Message], round_: int = 0, peer: str | None = None) -> Entry:
        return next(
            entry
            for entry in self.entries
            if (entry.kind, entry.round) == (kind.TAG, round_) and peer in (None, entry.peer)
        )

    def message(self, kind: type[Message], round_: int = 0, peer: str | None = None) -> Any:
        """The message of the first such entry, verified."""
        entry = self.find(kind, round_, peer)
        return envelope.open_verified(kind, entry.message, self._key(entry, kind).public, entry.peer)

    def resigned(self, entry: Entry, kind: type[Message], **changes: Any) -> Entry:
        """The entry with another message in it, signed by the same party: what that party itself can forge."""
        key = self._key(entry, kind)
        message = envelope.open_verified(kind, entry.message, key.public, entry.peer)
        return replace(entry, message=envelope.sign(key, replace(message, **changes)))

    def with_changed(self, kind: type[Message], round_: int = 0, peer: str | None = None, **changes: Any) -> bytes:
        """The log with one message changed by its own signer, and checkpoints that match."""
        old = self.find(kind, round_, peer)
        return self.replaced(old, self.resigned(old, kind, **changes))

    def _key(self, entry: Entry, kind: type[Message]) -> Any:
        device = self.fleet.devices.get(entry.peer) if kind is not Assignment else None
        return device.identity if device else self.fleet.key

    def _establish(self) -> None:
        fleet = self.fleet
        offering, offer = fleet.offer()
        self.log = Transcript(offering.offer, SEED)
        names = sorted(fleet.devices)
        self.raw += self.log.sent(Step.OFFER, dict.fromkeys(names, offer), self.at)
        for name in names:
            offering = self._received(Step.OFFER, offering.on_advert, name, fleet.join(name, offer))
        sharing, roster = offering.close()
        self.raw += self.log.sent(Step.ROSTER, dict.fromkeys(names, roster), self.at)
        for name in names:
            sharing = self._received(Step.ROSTER, sharing.on_shares, name, fleet.share(name, roster))
        self.session = sharing.close()
        self.raw += self.log.checkpoint(fleet.key)

    def _received(self, step: Step, accept: Callable[[str, bytes], Any], name: str, body: bytes) -> Any:
        state = accept(name, body)
        self.raw += self.log.received(step, name, body)
        return state

    def _round(self, dropouts: Dropouts) -> None:
        version, digest = self.log.newest
        state, plans = self.session.plan(
            adapter_version=version, adapter_digest=digest, training=b"settings", cohort=None
        )
        self.log.begin(state.plan)
        self.raw += self.log.sent(Step.PLAN, plans, self.at)
        plan = state.plan.digest()
        for name in self._left(plans, dropouts, Step.PLAN):
            body = self.fleet.contribute(name, plans[name])
            state = self._received(Step.PLAN, state.on_masked_input, name, body)
            self.vectors[state.vectors[name]] = packed_vector(body)
        outcome = state.close()
        while not isinstance(outcome, RoundAborted) and isinstance(outcome[1], dict):
            state, bodies = outcome
            step = Step.SURVIVORS if isinstance(state, Confirming) else Step.UNMASK
            outcome = self._exchange(step, state, bodies, dropouts)
        if isinstance(outcome, RoundAborted):
            self.session = outcome.session
            self.raw += self.log.ended(self.fleet.key, Abort(plan, outcome.reason.value), self.at)
            return
        self.session, result = outcome
        ending = Result(plan, result.survivors, result.digest, version + 1, NEW_ADAPTER)
        self.raw += self.log.ended(self.fleet.key, ending, self.at)

    def _exchange(self, step: Step, state: Any, bodies: Mapping[str, bytes], dropouts: Dropouts) -> Any:
        ask, take = METHODS[step]
        self.raw += self.log.sent(step, bodies, self.at)
        for name in self._left(bodies, dropouts, step):
            state = self._received(step, getattr(state, take), name, self.fleet.answer(ask, name, bodies[name]))
        return state.close()

    def _left(self, names: Mapping[str, bytes], dropouts: Dropouts, step: Step) -> list[str]:
        return sorted(set(names) - set(dropouts.get(step, ())))


def run_session(
    rounds: Sequence[Dropouts],
    devices: int = 4,
    adversary: Adversary = Adversary.ACTIVE,
    policy: Policy | None = None,
    **changes: Any,
) -> LoggedSession:
    spec = session_spec(devices, adversary=adversary, **changes)
    return LoggedSession(make_fleet(devices, spec=spec, policy=policy)).run(rounds)


def failure(report: Report, check: Check, about: str) -> Any:
    """The place of the one failure, which is of this check and about this field."""
    (finding,) = report.failed
    assert (finding.check, finding.about) == (check, about), finding
    return finding.place


def finding_of(report: Report, check: Check) -> Finding:
    (finding,) = (each for each in report.findings if each.check is check)
    return finding


@pytest.fixture(scope="session")
def logged_of() -> Callable[..., LoggedSession]:
    """Run and log a session: ``rounds`` lists, for each, step → devices that drop out there."""
    return run_session


@pytest.fixture(scope="session")
def logged() -> LoggedSession:
    """Four devices; a round with a dropout before its update, one with a dropout after it, one without a sum."""
    return run_session(
        ({Step.PLAN: ["device-001"]}, {Step.UNMASK: ["device-002"]}, {Step.PLAN: ["device-000", "device-001"]})
    )
