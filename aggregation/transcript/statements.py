"""What the coordinator says to the log alone: how a round ended, and what the log holds."""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from aggregation import wire
from aggregation.messages import DEVICES, DIGESTS, MAX_COHORT, Message, Survivors


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
