"""What a device keeps of the coordinator's log, and demands of it."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

from aggregation import envelope, wire
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import DEVICES, DIGESTS
from aggregation.pki.identity import PublicKey
from aggregation.session import COORDINATOR
from aggregation.transcript import merkle
from aggregation.transcript.entries import ENTRY, Abort, Checkpoint, Entry, Result, Stage
from aggregation.transcript.proofs import RECEIPT, SESSION_CHAIN_PROOF, SIZE, Proof, Receipt
from aggregation.wire import Codec


@dataclass(frozen=True, slots=True)
class LogState:
    """What a device knows of the log of the session that it joined last.

    Args:
        device: Its id.
        offer: Digest of the session's offer.
        previous: Digest of the last checkpoint of the session before.
        size: Entries of the log when it last saw proofs; 0 before the first.
        root: Of these entries.
        plan: Digest of the plan of the round to which it contributed last.
        unconfirmed: SHA-256 of its last message, which may not have reached the coordinator.
        delivered: SHA-256 of its messages of that round that reached the coordinator, as its next request shows.
        survivors: Digest of the ids of the survivors that the coordinator named.
    """

    device: str
    offer: bytes
    previous: bytes
    size: int = 0
    root: bytes = merkle.EMPTY
    plan: bytes | None = None
    unconfirmed: bytes | None = None
    delivered: tuple[bytes, ...] = ()
    survivors: bytes | None = None

    @classmethod
    def initial(cls, coordinator: PublicKey, raw: bytes, offer: bytes, device: str) -> "LogState":
        """The state of ``device`` after a session chain proof that it takes without an earlier state.

        Raises:
            ProtocolError: Not a session chain proof that leads to the session of the offer with digest ``offer``.
        """
        proof = SESSION_CHAIN_PROOF.decode(raw)
        start = envelope.open_verified(Checkpoint, proof.start, coordinator, COORDINATOR)
        if (start.offer, start.size, start.stage) != (offer, 0, Stage.OPEN):
            raise ProtocolError("the session chain proof leads to another session than the offer's", COORDINATOR)
        return cls(device, offer, start.previous)

    def contributed(self, plan: bytes, message: bytes) -> "LogState":
        """This device answered the plan of that digest with a signed ``message``."""
        return replace(self, plan=plan, unconfirmed=_digest(message), delivered=(), survivors=None)

    def on_survivors(self, survivors: Iterable[str], answer: bytes | None = None) -> "LogState":
        """The coordinator named the survivors, so the last message has reached it. ``answer`` is what goes out next."""
        delivered = self.delivered if self.unconfirmed is None else (*self.delivered, self.unconfirmed)
        unconfirmed = None if answer is None else _digest(answer)
        return replace(self, delivered=delivered, unconfirmed=unconfirmed, survivors=_names(survivors))

    def on_receipt(self, coordinator: PublicKey, raw: bytes) -> "LogState":
        """Check a receipt; returns what to keep.

        Args:
            coordinator: The pinned key.
            raw: As received.

        Raises:
            ProtocolError: Not a receipt of this session, or it does not prove that the log goes on from what this
                device saw, that its messages are in it, and that its round ended with the survivors that it was told.
        """
        return self._checked(coordinator, raw)[0]

    def on_session_chain_proof(self, coordinator: PublicKey, raw: bytes, offer: bytes) -> "LogState":
        """Check a passage to the session of the offer with this digest; returns what to keep of it.

        Raises:
            ProtocolError: As ``on_receipt``; the log is not closed; or the new session does not follow it.
        """
        given = SESSION_CHAIN_PROOF.decode(raw)
        if offer == self.offer:
            raise ProtocolError("this device has joined that session before: the offer is repeated", COORDINATOR)
        if not given.receipt:
            raise ProtocolError("no proof of the session that this device joined last", COORDINATOR)
        last = _closed(self._checked(coordinator, given.receipt)[1])
        for signed in given.closed:
            link = _closed(envelope.open_verified(Checkpoint, signed, coordinator, COORDINATOR))
            if link.previous != last.digest():
                raise ProtocolError("a session between the last one and this one is left out", COORDINATOR)
            last = link
        fresh = LogState.initial(coordinator, raw, offer, self.device)
        if fresh.previous != last.digest():
            raise ProtocolError("the offer does not follow the sessions that this device knows: it is old", COORDINATOR)
        return fresh

    def _checked(self, coordinator: PublicKey, raw: bytes) -> tuple["LogState", Checkpoint]:
        given = RECEIPT.decode(raw)
        checkpoint = envelope.open_verified(Checkpoint, given.checkpoint, coordinator, COORDINATOR)
        if (checkpoint.offer, checkpoint.previous) != (self.offer, self.previous):
            raise ProtocolError("the log is of another session", COORDINATOR)
        try:
            if self.size:
                path = given.consistency.get(self.size, ())
                merkle.verify_consistency(self.root, self.size, checkpoint.root, checkpoint.size, path)
            self._ended(coordinator, given, checkpoint)
        except TrustError as error:
            raise ProtocolError(str(error), COORDINATOR) from None
        return LogState(self.device, self.offer, self.previous, checkpoint.size, checkpoint.root), checkpoint

    def _ended(self, coordinator: PublicKey, given: Receipt, checkpoint: Checkpoint) -> None:
        if self.plan is None:
            return
        ending = self._ending(coordinator, given, checkpoint)
        demanded = set(self.delivered)
        if isinstance(ending, Result):
            if self.survivors not in (None, _names(ending.survivors)):
                raise ProtocolError("the log counts other survivors than this device was told", COORDINATOR)
            if self.device in ending.survivors and self.unconfirmed is not None and self.survivors is None:
                demanded.add(self.unconfirmed)
        found = {_digest(_included(proof, checkpoint).message) for proof in given.contributions}
        if demanded - found:
            raise ProtocolError("the log is not shown to hold this device's messages of its last round", COORDINATOR)

    def _ending(self, coordinator: PublicKey, given: Receipt, checkpoint: Checkpoint) -> Result | Abort:
        for proof in given.endings:
            entry = _included(proof, checkpoint)
            kind: type[Result] | type[Abort] = Result if entry.kind == Result.TAG else Abort
            ending: Result | Abort = envelope.open_verified(kind, entry.message, coordinator, COORDINATOR)
            if ending.plan == self.plan:
                return ending
        raise ProtocolError("the log is not shown to hold the end of this device's last round", COORDINATOR)


_DIGESTS = wire.optional(DIGESTS)
LOG_STATE: Codec[LogState] = wire.record(
    LogState,
    {
        "device": DEVICES,
        "offer": DIGESTS,
        "previous": DIGESTS,
        "size": SIZE,
        "root": DIGESTS,
        "plan": _DIGESTS,
        "unconfirmed": _DIGESTS,
        "delivered": wire.sequence(DIGESTS, 4),
        "survivors": _DIGESTS,
    },
)


def _closed(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.stage is not Stage.CLOSED:
        raise ProtocolError("the log of a session before is not closed", COORDINATOR)
    return checkpoint


def _included(proof: Proof, checkpoint: Checkpoint) -> Entry:
    entry = ENTRY.decode(proof.leaf)
    merkle.verify_inclusion(checkpoint.root, checkpoint.size, entry.index, proof.leaf, proof.path)
    return entry


def _digest(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()


def _names(devices: Iterable[str]) -> bytes:
    return _digest("\n".join(sorted(devices)).encode())
