"""A log as it is written, message by message, and resumed after a stop."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregation import envelope, messages
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from aggregation.transcript.entries import (
    ENTRY,
    EVERYONE,
    Abort,
    AdapterId,
    Checkpoint,
    Entry,
    Result,
    Stage,
    record,
)
from aggregation.transcript.merkle import EMPTY, Tree

NO_SESSION = bytes(32)  # in place of the last checkpoint, for the first session

REQUESTS: dict[Step, type[messages.Message]] = {
    Step.OFFER: messages.Offer,
    Step.ROSTER: messages.Roster,
    Step.PLAN: messages.Assignment,
    Step.SURVIVORS: messages.Survivors,
    Step.UNMASK: messages.Unmask,
}
ANSWERS: dict[Step, type[messages.Message]] = {
    Step.OFFER: messages.Advert,
    Step.ROSTER: messages.Shares,
    Step.PLAN: messages.MaskedInput,
    Step.SURVIVORS: messages.ConsistencySignature,
    Step.UNMASK: messages.UnmaskResponse,
}


@dataclass(slots=True)
class Transcript:
    """A log as it is written. Each method returns the records to append; the log begins with ``MAGIC``."""

    offer: bytes  # digest of the session's offer
    start: AdapterId  # the adapter that the session starts from
    previous: bytes = NO_SESSION  # digest of the last checkpoint of the previous session, or ``NO_SESSION``
    tree: Tree = field(default_factory=Tree, repr=False)  # of the entries so far
    latest: int = 0  # the greatest time of an entry; a new one has no earlier time
    round: int = 0  # of the last plan, or 0
    plan: bytes | None = None  # digest of the plan of the current round; None between rounds
    produced: AdapterId | None = None  # the adapter of the last ``Result``; None before the first
    # Round → index and leaf of its ``Result`` or ``Abort``.
    endings: dict[int, tuple[int, bytes]] = field(default_factory=dict, repr=False)
    # Number of entries that a checkpoint covers → the checkpoint, signed.
    checkpoints: dict[int, bytes] = field(default_factory=dict, repr=False)
    # Device → its last round, and index and leaf of its masked input and consistency signature.
    contributions: dict[str, tuple[int, tuple[tuple[int, bytes], ...]]] = field(default_factory=dict, repr=False)

    @property
    def newest(self) -> AdapterId:
        return self.produced or self.start

    def begin(self, plan: messages.Plan) -> None:
        """The entries that follow belong to the round of ``plan``."""
        self.round, self.plan = plan.round, plan.digest()

    def sent(self, step: Step, bodies: Mapping[str, bytes], at: int) -> bytes:
        """Log the coordinator's requests, sent ``at`` that time (``Entry.at``), or ``latest`` if that is later. A
        message that all devices receive alike is one entry. So is an assignment without encrypted shares that several
        devices receive."""
        kind, alike = REQUESTS[step].TAG, Counter(bodies.values())
        if len(alike) == 1 and (len(bodies) > 1 or step is not Step.PLAN):
            return self._append(kind, EVERYONE, next(iter(alike)), at)
        shared = [body for body, count in alike.items() if count > 1 and step is Step.PLAN]
        records: list[bytes] = []
        for device, body in bodies.items():
            if body not in shared:
                repeats = step is Step.PLAN and bool(records) and not _without_shares(body)
                records.append(self._append(kind, device, envelope.with_body(body, b"") if repeats else body, at))
        return b"".join([*records, *(self._append(kind, EVERYONE, body, at) for body in shared)])

    def received(self, step: Step, device: str, body: bytes) -> bytes:
        return self._append(ANSWERS[step].TAG, device, logged_part(step, body))

    def ended(self, key: IdentityKey, ending: Result | Abort, at: int) -> bytes:
        """Log the end of the round, signed, and a checkpoint. ``at``: as of ``sent``."""
        return self._append(ending.TAG, EVERYONE, envelope.sign(key, ending), at) + self.checkpoint(key)

    def checkpoint(self, key: IdentityKey, stage: Stage = Stage.OPEN) -> bytes:
        signed = Checkpoint(self.offer, self.tree.size, self.tree.root(), self.previous, *self.newest, stage)
        return self._append(Checkpoint.TAG, EVERYONE, envelope.sign(key, signed))

    def start_checkpoint(self, key: IdentityKey) -> bytes:
        """A signed checkpoint of no entries, which shows that this session follows the previous one. It is sent with
        the offer and is not an entry."""
        return envelope.sign(key, Checkpoint(self.offer, 0, EMPTY, self.previous, *self.start, Stage.OPEN))

    def add(self, entry: Entry) -> bytes:
        """Append the next entry; returns its leaf. Raises ProtocolError: it is an assignment or a result that cannot be
        decoded."""
        leaf, index = ENTRY.encode(entry), self.tree.size
        if entry.kind == Checkpoint.TAG:
            self.checkpoints[index] = entry.message
        elif entry.kind in (Result.TAG, Abort.TAG):
            self.plan, self.endings[entry.round] = None, (index, leaf)
            if entry.kind == Result.TAG:
                self.produced = Result.decode(envelope.unverified_body(entry.message)).produced
        elif entry.kind == messages.MaskedInput.TAG:
            self.contributions[entry.peer] = (entry.round, ((index, leaf),))
        elif entry.kind == messages.ConsistencySignature.TAG:
            round_, leaves = self.contributions.get(entry.peer, (entry.round, ()))
            self.contributions[entry.peer] = (round_, (*leaves, (index, leaf)))
        elif entry.kind == messages.Assignment.TAG and entry.round > self.round:
            self.plan = messages.Assignment.decode(envelope.unverified_body(entry.message)).plan.digest()
        self.round, self.latest = entry.round, max(self.latest, entry.at or 0)
        self.tree.append(leaf)
        return leaf

    def _append(self, kind: str, peer: str, message: bytes, at: int | None = None) -> bytes:
        time = None if at is None else max(at, self.latest)
        return record(self.add(Entry(self.tree.size, kind, self.round, peer, message, time)))


def _without_shares(assignment: bytes) -> bool:
    """Whether the last field is empty. A digest that ends in four zeros looks the same; then too much is kept."""
    return envelope.unverified_body(assignment).endswith(bytes(4))


def logged_part(step: Step, body: bytes) -> bytes:
    """The part of a device's answer that is logged: all of it except the vector."""
    return bytes(envelope.split_vector(body)[1]) if step is Step.PLAN else body


def packed_vector(body: bytes) -> bytes:
    """The packed vector of a masked input; the log holds only its digest."""
    return bytes(envelope.split_vector(body)[0])


def resume(entries: tuple[Entry, ...], start: AdapterId, previous: bytes = NO_SESSION) -> Transcript:
    """The transcript that wrote ``entries``, ready to append to. ``entries``: of the log; the first is the offer.
    ``start``: the adapter that the session started from. ``previous``: digest of the last checkpoint of the previous
    session. Raises ProtocolError: the first entry is not an offer, or as ``Transcript.add``."""
    log = Transcript(messages.Offer.decode(envelope.unverified_body(entries[0].message)).digest(), start, previous)
    for entry in entries:
        log.add(entry)
    return log
