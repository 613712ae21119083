"""The transcript of a session: an append-only log of its signed messages, from which an outsider can check it later.

An entry holds a message as it travelled, with its place: index, kind, round and peer. Of a masked input it holds the
signed header, which names the vector by digest; vectors are kept beside the log, or not at all. Of plans that come with
boxes the first in a round is kept whole, and of the others the signature: their plan is that of the first, and their
boxes are in the messages of the dealers (``audit.history`` puts them together again). The log is the leaves of a Merkle
tree (``merkle``). The coordinator signs its root in *checkpoints*, which are entries too: one when the
session stands, one after each round, and one that closes the log, so that a log that was cut off shows it.

Nothing in it is secret: it says what the coordinator knows anyway, and nothing about a single device's update. It does
say who took part. This file opens no file: whoever keeps the log writes the records that it returns.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from aggregation import envelope, wire
from aggregation.certificates import DEVICE_ID
from aggregation.errors import ProtocolError
from aggregation.identity import IdentityKey
from aggregation.merkle import EMPTY, Tree
from aggregation.messages import (
    DEVICES,
    DIGESTS,
    MAX_COHORT,
    Advert,
    Agreement,
    Assignment,
    MaskedInput,
    Message,
    Offer,
    Opening,
    Plan,
    Roster,
    Shares,
    Survivors,
    Unmask,
)
from aggregation.steps import Step
from aggregation.wire import Codec

MAGIC = b"edgeadapt/transcript/1\n"
EVERYONE = "*"  # the peer of a message that all who were asked got alike
NO_SESSION = bytes(32)  # in place of an earlier session's last checkpoint
MAX_ENTRY = envelope.MAX_MESSAGE + 1024  # bytes
LENGTH = 4  # bytes before each entry

ASKED: dict[Step, type[Message]] = {
    Step.OFFER: Offer,
    Step.ROSTER: Roster,
    Step.PLAN: Assignment,
    Step.SURVIVORS: Survivors,
    Step.UNMASK: Unmask,
}
ANSWERED: dict[Step, type[Message]] = {
    Step.OFFER: Advert,
    Step.ROSTER: Shares,
    Step.PLAN: MaskedInput,
    Step.SURVIVORS: Agreement,
    Step.UNMASK: Opening,
}


@dataclass(frozen=True, slots=True)
class Result(Message):
    """Coordinator → log, step 9: the sum that came of a round, by digest, and the adapter that came of the sum.

    ``sum`` is the SHA-256 of the opened vector, packed as it travels; ``adapter`` that of the new adapter's file.
    """

    TAG: ClassVar = "result"
    LIMIT: ClassVar = Survivors.LIMIT
    FIELDS: ClassVar = {
        "plan": DIGESTS,
        "survivors": wire.sequence(DEVICES, MAX_COHORT),
        "sum": DIGESTS,
        "version": wire.uint(64),
        "adapter": wire.text(r"[0-9a-f]{64}"),
    }
    plan: bytes
    survivors: tuple[str, ...]
    sum: bytes
    version: int
    adapter: str


@dataclass(frozen=True, slots=True)
class Abort(Message):
    """Coordinator → log: a round that ended without a new adapter, and why."""

    TAG: ClassVar = "abort"
    LIMIT: ClassVar = 1024
    FIELDS: ClassVar = {"plan": DIGESTS, "reason": wire.text(r"[a-z-]{1,32}")}
    plan: bytes
    reason: str


class Stage(Enum):
    """What a checkpoint says about its log."""

    OPEN = "open"
    CLOSED = "closed"  # nothing follows


@dataclass(frozen=True, slots=True)
class Checkpoint(Message):
    """Coordinator → log: the root of the ``size`` entries before this one.

    ``offer`` is the digest of the session's offer; ``previous`` that of the last checkpoint of the coordinator's
    session before this one, so that no session can be left out in the middle.
    """

    TAG: ClassVar = "checkpoint"
    LIMIT: ClassVar = 1024
    FIELDS: ClassVar = {
        "offer": DIGESTS,
        "size": wire.uint(64),
        "root": DIGESTS,
        "previous": DIGESTS,
        "stage": wire.choice(Stage),
    }
    offer: bytes
    size: int
    root: bytes
    previous: bytes
    stage: Stage


@dataclass(frozen=True, slots=True)
class Place:
    """Where a message is in its log. ``round`` is 0 before the first; ``peer`` is the device, or ``EVERYONE``."""

    index: int
    kind: str
    round: int
    peer: str

    def __str__(self) -> str:
        who = "" if self.peer == EVERYONE else f" {'to' if self.kind == Assignment.TAG else 'of'} {self.peer}"
        return f"entry {self.index} ({self.kind}{who}{f', round {self.round}' if self.round else ''})"


@dataclass(frozen=True, slots=True)
class Entry:
    """A leaf of the log: a signed message and its place."""

    index: int
    kind: str
    round: int
    peer: str
    message: bytes

    @property
    def place(self) -> Place:
        """Without the message."""
        return Place(self.index, self.kind, self.round, self.peer)


ENTRY: Codec[Entry] = wire.record(
    Entry,
    {
        "index": wire.uint(64),
        "kind": wire.text(r"[a-z-]{1,32}"),
        "round": wire.uint(32),
        "peer": wire.text(rf"\*|{DEVICE_ID}"),
        "message": wire.blob(envelope.MAX_MESSAGE),
    },
)


@dataclass(slots=True)
class Transcript:
    """A log as it is written: each method returns the records to append to it, which begins with ``MAGIC``.

    Args:
        offer: Digest of the session's offer.
        previous: Digest of the last checkpoint of the session before, or ``NO_SESSION``.
        tree: Of the entries so far.
        round: That of the last plan, or 0.
        plan: Digest of the plan of the round under way, if one is.
        endings: Round → index and leaf of its ending.
        checkpoints: Entries that each checkpoint covers → the checkpoint, signed.
        own: Device → the last round to which it contributed, and index and leaf of its masked input and its agreement.
    """

    offer: bytes
    previous: bytes = NO_SESSION
    tree: Tree = field(default_factory=Tree, repr=False)
    round: int = 0
    plan: bytes | None = None
    endings: dict[int, tuple[int, bytes]] = field(default_factory=dict, repr=False)
    checkpoints: dict[int, bytes] = field(default_factory=dict, repr=False)
    own: dict[str, tuple[int, tuple[tuple[int, bytes], ...]]] = field(default_factory=dict, repr=False)

    def begin(self, plan: Plan) -> None:
        """What follows belongs to the round of ``plan``."""
        self.round, self.plan = plan.round, plan.digest()

    def sent(self, step: Step, bodies: Mapping[str, bytes]) -> bytes:
        """What the coordinator asks. What all get alike is one entry; so is a plan that several get without boxes."""
        kind, alike = ASKED[step].TAG, Counter(bodies.values())
        if len(alike) == 1 and (len(bodies) > 1 or step is not Step.PLAN):
            return self._append(kind, EVERYONE, next(iter(alike)))
        shared = [body for body, count in alike.items() if count > 1 and step is Step.PLAN]
        records: list[bytes] = []
        for device, body in bodies.items():
            if body not in shared:
                known = step is Step.PLAN and bool(records) and not _without_boxes(body)
                records.append(self._append(kind, device, envelope.with_body(body, b"") if known else body))
        return b"".join([*records, *(self._append(kind, EVERYONE, body) for body in shared)])

    def received(self, step: Step, device: str, body: bytes) -> bytes:
        """What a device answered, once the answer was found good."""
        return self._append(ANSWERED[step].TAG, device, signed_of(step, body))

    def ended(self, key: IdentityKey, ending: Result | Abort) -> bytes:
        """How the round ended, signed, and a checkpoint."""
        return self._append(ending.TAG, EVERYONE, envelope.seal(key, ending)) + self.checkpoint(key)

    def checkpoint(self, key: IdentityKey, stage: Stage = Stage.OPEN) -> bytes:
        """Sign the root of what is there so far."""
        signed = Checkpoint(self.offer, self.tree.size, self.tree.root(), self.previous, stage)
        return self._append(Checkpoint.TAG, EVERYONE, envelope.seal(key, signed))

    def opening(self, key: IdentityKey) -> bytes:
        """A checkpoint of nothing, signed: that this session, of which nothing may be logged yet, follows that before.

        It goes beside the offer and is no entry.
        """
        return envelope.seal(key, Checkpoint(self.offer, 0, EMPTY, self.previous, Stage.OPEN))

    def add(self, entry: Entry) -> bytes:
        """Take the next entry; its leaf.

        Raises:
            ProtocolError: It is a plan that cannot be read.
        """
        leaf, index = ENTRY.encode(entry), self.tree.size
        if entry.kind == Checkpoint.TAG:
            self.checkpoints[index] = entry.message
        elif entry.kind in (Result.TAG, Abort.TAG):
            self.plan, self.endings[entry.round] = None, (index, leaf)
        elif entry.kind == MaskedInput.TAG:
            self.own[entry.peer] = (entry.round, ((index, leaf),))
        elif entry.kind == Agreement.TAG:
            round_, leaves = self.own.get(entry.peer, (entry.round, ()))
            self.own[entry.peer] = (round_, (*leaves, (index, leaf)))
        elif entry.kind == Assignment.TAG and entry.round > self.round:
            self.plan = Assignment.decode(envelope.unverified_body(entry.message)).plan.digest()
        self.round = entry.round
        self.tree.append(leaf)
        return leaf

    def _append(self, kind: str, peer: str, message: bytes) -> bytes:
        leaf = self.add(Entry(self.tree.size, kind, self.round, peer, message))
        return len(leaf).to_bytes(LENGTH, "big") + leaf


def _without_boxes(assignment: bytes) -> bool:
    """Whether the last field is empty. A digest that ends in four zeros looks like it, and then more is kept."""
    return envelope.unverified_body(assignment).endswith(bytes(4))


def signed_of(step: Step, body: bytes) -> bytes:
    """The part of a device's answer that is logged: all of it but the vector."""
    return _split(body)[0] if step is Step.PLAN else body


def vector_of(body: bytes) -> bytes:
    """The packed vector of a masked input as it travelled; the log itself holds its digest only."""
    return _split(body)[1]


def _split(body: bytes) -> tuple[bytes, bytes]:
    vector, signed = envelope.split_vector(body)
    return bytes(signed), bytes(vector)


@dataclass(frozen=True, slots=True)
class Reading:
    """What is in a log, as far as it can be read.

    Args:
        entries: In the order of the log.
        end: Bytes that they take, ``MAGIC`` included.
        problem: Why reading ended there; empty at the end of the log.
    """

    entries: tuple[Entry, ...]
    end: int
    problem: str = ""


def read(raw: bytes) -> Reading:
    """Read a log. Nothing is verified yet: ``audit`` does that. Raises nothing: damage is in the reading."""
    if not raw.startswith(MAGIC):
        return Reading((), 0, "not a transcript of this version")
    entries: list[Entry] = []
    at = len(MAGIC)
    while at < len(raw):
        start = at + LENGTH
        size = int.from_bytes(raw[at:start], "big")
        if size > MAX_ENTRY or start + size > len(raw):
            return Reading(tuple(entries), at, f"the log is cut off, or damaged, in entry {len(entries)}")
        try:
            entries.append(ENTRY.decode(raw[start : start + size]))
        except ProtocolError as error:
            return Reading(tuple(entries), at, f"entry {len(entries)} is damaged: {error}")
        at = start + size
    return Reading(tuple(entries), at)


def resume(entries: tuple[Entry, ...], previous: bytes) -> Transcript:
    """The transcript that wrote ``entries``, of which the first is the offer, to go on with.

    Raises:
        ProtocolError: The first is no offer, or a plan cannot be read.
    """
    log = Transcript(Offer.decode(envelope.unverified_body(entries[0].message)).digest(), previous)
    for entry in entries:
        log.add(entry)
    return log
