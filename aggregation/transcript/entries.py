"""A log as bytes, and the coordinator's messages to it: results, aborts, checkpoints.

A log is ``MAGIC``, then its entries, each after its length. Equal entries are equal bytes: ``read`` accepts one header
and one encoding of each entry. So no byte of a log is without meaning: the header says how entries are encoded, and the
entries are what the coordinator signs in its checkpoints. A later version of the format needs another header and
another ``TAG`` of its checkpoints, so that the coordinator's signature covers the version too."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, ClassVar, TypeAlias

from aggregation import envelope, wire
from aggregation.errors import ProtocolError
from aggregation.messages import Assignment, DeviceIds, Digest, HexDigest, Message, Survivors, Uint32, Uint64
from aggregation.pki import DEVICE_ID
from aggregation.wire import Codec

MAGIC = b"edgeadapt/transcript/3\n"
EVERYONE = "*"  # the peer of a message that all devices received alike
LENGTH = 4  # bytes before each entry
_NAME = MAGIC.decode().strip()
AdapterId: TypeAlias = tuple[int, str]  # version, and SHA-256 of its file in hex


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a message in its log. ``round`` is 0 before the first; ``peer`` is the device, or ``EVERYONE``."""

    index: int
    kind: str
    round: int
    peer: str

    def __str__(self) -> str:
        who = "" if self.peer == EVERYONE else f" {'to' if self.kind == Assignment.TAG else 'of'} {self.peer}"
        return f"entry {self.index} ({self.kind}{who}{f', round {self.round}' if self.round else ''})"


@dataclass(frozen=True, slots=True)
class Entry:
    """A leaf of the log: a signed message and its place. ``at``: when the coordinator wrote it, in seconds since 1970
    by its own clock, never less than in an entry before. A checkpoint has none, so that a checkpoint after each time
    signs it; nor has an answer of a device, which would say how long that trained."""

    index: Uint64
    kind: Annotated[str, wire.text(r"[a-z-]{1,32}")]
    round: Uint32
    peer: Annotated[str, wire.text(rf"\*|{DEVICE_ID}")]
    message: Annotated[bytes, wire.blob(envelope.MAX_MESSAGE)]
    at: Annotated[int | None, wire.last(wire.uint(32))] = None

    @property
    def place(self) -> Place:
        return Place(self.index, self.kind, self.round, self.peer)


ENTRY: Codec[Entry] = wire.record(Entry)


@dataclass(frozen=True, slots=True)
class Reading:
    entries: tuple[Entry, ...]  # in the order of the log
    end: int  # bytes that they take, with ``MAGIC``
    problem: str = ""  # why reading ended there; empty at the end of the log


def record(leaf: bytes) -> bytes:
    """Return an encoded entry as it stands in a log."""
    return len(leaf).to_bytes(LENGTH, "big") + leaf


def write(entries: Iterable[Entry]) -> bytes:
    """Return the log of these entries. Law: ``write(read(raw).entries) == raw[: read(raw).end]``, unless ``raw`` has
    not even a header."""
    return MAGIC + b"".join(record(ENTRY.encode(entry)) for entry in entries)


def read(raw: bytes) -> Reading:
    """Read a log without verifying it. Raises nothing: ``Reading.problem`` names the damage."""
    if not raw.startswith(MAGIC):
        return Reading((), 0, f"it does not begin with {_NAME!r}: it was altered, or is of another version")
    entries: list[Entry] = []
    at = len(MAGIC)
    while at < len(raw):
        start = at + LENGTH
        size = int.from_bytes(raw[at:start], "big")
        if start + size > len(raw):
            return Reading(tuple(entries), at, f"the log is truncated, or damaged, in entry {len(entries)}")
        try:
            entries.append(ENTRY.decode(raw[start : start + size]))
        except ProtocolError as error:
            return Reading(tuple(entries), at, f"entry {len(entries)} is damaged: {error}")
        at = start + size
    return Reading(tuple(entries), at)


@dataclass(frozen=True, slots=True)
class Result(Message):
    """Coordinator → log, step 9: the survivors of a round, the digest of their sum, and the adapter made from it.
    ``sum`` is the SHA-256 of the unmasked vector, packed; ``adapter`` that of the new adapter's file."""

    TAG: ClassVar = "result"
    LIMIT: ClassVar = Survivors.LIMIT
    plan: Digest
    survivors: DeviceIds
    sum: Digest
    version: Uint64
    adapter: HexDigest

    @property
    def produced(self) -> AdapterId:
        return self.version, self.adapter


@dataclass(frozen=True, slots=True)
class Abort(Message):
    """Coordinator → log: a round that ended without a new adapter, and why."""

    TAG: ClassVar = "abort"
    LIMIT: ClassVar = 1024
    plan: Digest
    reason: Annotated[str, wire.text(r"[a-z-]{1,32}")]


class Stage(Enum):
    """Whether a checkpoint closes its log."""

    OPEN = "open"
    CLOSED = "closed"  # no entry follows


@dataclass(frozen=True, slots=True)
class Checkpoint(Message):
    """Coordinator → log: the root of the ``size`` entries before this one.

    ``offer`` is the digest of the session's offer; ``previous`` that of the last checkpoint of the coordinator's
    previous session, so that no session between two others can be omitted. ``version`` and ``adapter`` name the newest
    adapter at this place of the log: that of the last result or, before the first result of a session, that of the
    previous session's last checkpoint. Only the first session of a coordinator, and the first on another base, start
    from an adapter that no log produced."""

    TAG: ClassVar = "checkpoint"
    LIMIT: ClassVar = 1024
    offer: Digest
    size: Uint64
    root: Digest
    previous: Digest
    version: Uint64
    adapter: HexDigest
    stage: Annotated[Stage, wire.choice(Stage)]

    @property
    def newest(self) -> AdapterId:
        return self.version, self.adapter
