"""What a device demands of the log before its next round: the round that it took part in is in it, and it only grew.

A *receipt* is the coordinator's newest checkpoint, the ending of a round with its proof of inclusion, and for each
earlier checkpoint a proof of consistency, whichever of them the device saw last. A *witness* is what a device keeps of
that: how long the log was and its root. So a coordinator cannot rewrite what it showed a device before, and cannot show
devices different logs without each of these holding for ever.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from aggregation import envelope, merkle, wire
from aggregation.errors import ProtocolError, TrustError
from aggregation.identity import PublicKey
from aggregation.messages import MAX_COHORT
from aggregation.session import COORDINATOR
from aggregation.spec import MAX_ROUNDS
from aggregation.transcript import ENTRY, Abort, Checkpoint, Result, Transcript
from aggregation.wire import Codec

MAX_PATH = 128  # hashes: two for each doubling of a log that nobody can write
_PATH = wire.sequence(wire.fixed(merkle.HASH), MAX_PATH)
_SIZE = wire.uint(64)


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proofs about a log.

    Args:
        checkpoint: The newest, signed.
        ending: Leaf of the round's ending: a ``Result`` or an ``Abort``; empty where the device was in no round.
        inclusion: That the ending is in the log that the checkpoint covers.
        consistency: Entries that an earlier checkpoint covers → that the newest begins with them.
    """

    checkpoint: bytes
    ending: bytes
    inclusion: tuple[bytes, ...]
    consistency: Mapping[int, tuple[bytes, ...]]


RECEIPT: Codec[Receipt] = wire.record(
    Receipt,
    {
        "checkpoint": wire.blob(Checkpoint.LIMIT + envelope.OVERHEAD),
        "ending": wire.blob(Result.LIMIT + 2 * envelope.OVERHEAD + 64 * MAX_COHORT),
        "inclusion": _PATH,
        "consistency": wire.mapping(_SIZE, _PATH, 2 * MAX_ROUNDS),
    },
)


def receipt(log: Transcript, round_: int = 0) -> bytes:
    """What a device gets that took part in ``round_`` of the session last; 0 for none.

    Args:
        log: Of the session, with a checkpoint after that round.
        round_: One that has ended.
    """
    *earlier, newest = log.checkpoints
    index, leaf = log.endings[round_] if round_ else (0, b"")
    inclusion = log.tree.inclusion(index, newest) if round_ else ()
    consistency = {size: log.tree.consistency(size, newest) for size in [*earlier, newest] if size}
    return RECEIPT.encode(Receipt(log.checkpoints[newest], leaf, inclusion, consistency))


@dataclass(frozen=True, slots=True)
class Witness:
    """What a device knows of the log of its session.

    Args:
        offer: Digest of the session's offer.
        size: Entries of the log when it last saw proofs; 0 before the first.
        root: Of these entries.
    """

    offer: bytes
    size: int = 0
    root: bytes = merkle.EMPTY

    def on_receipt(
        self, coordinator: PublicKey, raw: bytes, plan: bytes | None
    ) -> tuple["Witness", Result | Abort | None]:
        """Check a receipt; returns what to keep, and how the device's last round ended.

        Args:
            coordinator: The pinned key.
            raw: As received.
            plan: Digest of the plan of the round that this device contributed to last; nothing before the first.

        Raises:
            ProtocolError: Not a receipt of this session, or it does not prove that the log goes on from what this
                device saw, or that the round's ending is in it.
        """
        given = RECEIPT.decode(raw)
        checkpoint = envelope.open_as(Checkpoint, given.checkpoint, coordinator, COORDINATOR)
        if checkpoint.offer != self.offer:
            raise ProtocolError("the log is of another session", COORDINATOR)
        try:
            if self.size:
                path = given.consistency.get(self.size, ())
                merkle.verify_consistency(self.root, self.size, checkpoint.root, checkpoint.size, path)
            ending = None if plan is None else _ending(coordinator, given, checkpoint, plan)
        except TrustError as error:
            raise ProtocolError(str(error), COORDINATOR) from None
        return Witness(self.offer, checkpoint.size, checkpoint.root), ending


def _ending(coordinator: PublicKey, given: Receipt, checkpoint: Checkpoint, plan: bytes) -> Result | Abort:
    entry = ENTRY.decode(given.ending)
    merkle.verify_inclusion(checkpoint.root, checkpoint.size, entry.index, given.ending, given.inclusion)
    kind: type[Result] | type[Abort] = Result if entry.kind == Result.TAG else Abort
    ending: Result | Abort = envelope.open_as(kind, entry.message, coordinator, COORDINATOR)
    if ending.plan != plan:
        raise ProtocolError("the log shows the end of another round than this device took part in", COORDINATOR)
    return ending
