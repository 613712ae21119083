"""What a device knows of the coordinator's log, and the proofs that it requires before it takes part again."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeAlias

from aggregation import envelope, wire
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import DIGESTS, MAX_COHORT, DeviceId, Digest, HexDigest, Plan, Uint64
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.session import COORDINATOR, refused
from aggregation.spec import MAX_ROUNDS
from aggregation.transcript import merkle
from aggregation.transcript.entries import ENTRY, Abort, AdapterId, Checkpoint, Entry, Result, Stage
from aggregation.transcript.log import Transcript
from aggregation.wire import Codec

MAX_PATH = 128  # hashes: enough for logs of 2^64 entries
MAX_SESSIONS = 10_000  # sessions that a device may have missed
_MAX_LEAF = Result.LIMIT + 2 * envelope.OVERHEAD + 64 * MAX_COHORT
_PATH = wire.sequence(wire.fixed(merkle.HASH), MAX_PATH)
_CHECKPOINT = wire.blob(Checkpoint.LIMIT + envelope.OVERHEAD)
_SignedCheckpoint: TypeAlias = Annotated[bytes, _CHECKPOINT]


@dataclass(frozen=True, slots=True)
class Proof:
    leaf: Annotated[bytes, wire.blob(_MAX_LEAF)]
    path: Annotated[tuple[bytes, ...], _PATH]


_Proofs: TypeAlias = Annotated[tuple[Proof, ...], wire.sequence(wire.record(Proof), MAX_ROUNDS)]


@dataclass(frozen=True, slots=True)
class Receipt:
    checkpoint: _SignedCheckpoint  # the newest one, signed
    endings: _Proofs  # ``Result`` or ``Abort`` of each round that may have been the device's last
    # The device's masked input and consistency signature in the round to which it contributed last.
    contributions: _Proofs
    # Number of entries that an earlier checkpoint covers → proof that the newest begins with them.
    consistency: Annotated[Mapping[int, tuple[bytes, ...]], wire.mapping(wire.uint(64), _PATH, 2 * MAX_ROUNDS)]


RECEIPT: Codec[Receipt] = wire.record(Receipt)


@dataclass(frozen=True, slots=True)
class SessionChainProof:
    """Proof that a new session follows the session that a device joined last."""

    # Of the closed log of the session that the device joined last; empty if it joined none.
    receipt: Annotated[bytes, wire.blob(2**28)]
    # The last checkpoint of each session since, signed, in order.
    closed: Annotated[tuple[bytes, ...], wire.sequence(_CHECKPOINT, MAX_SESSIONS)]
    start: _SignedCheckpoint  # the checkpoint of no entries, signed, that names the last of these as previous


SESSION_CHAIN_PROOF: Codec[SessionChainProof] = wire.record(SessionChainProof)


def receipts(log: Transcript, devices: Iterable[str]) -> dict[str, bytes]:
    """Device → the encoded receipt that it receives with its next plan. ``log``: of the session, with a checkpoint
    after every round that ended. ``devices``: the recipients."""
    newest = max(log.checkpoints)
    consistency = {size: log.tree.consistency(size, newest) for size in log.checkpoints if size}
    endings = {
        round_: Proof(leaf, log.tree.inclusion(index, newest))
        for round_, (index, leaf) in log.endings.items()
        if index < newest
    }

    def receipt(device: str) -> bytes:
        last, leaves = log.contributions.get(device, (0, ()))
        own = tuple(Proof(leaf, log.tree.inclusion(index, newest)) for index, leaf in leaves if index < newest)
        # The device's last round is this one or a later one whose answer did not arrive.
        since = tuple(proof for round_, proof in endings.items() if round_ >= last)
        return RECEIPT.encode(Receipt(log.checkpoints[newest], since, own, consistency))

    return {device: receipt(device) for device in devices}


def session_chain_proof(log: Transcript, key: IdentityKey, receipt: bytes = b"", closed: Iterable[bytes] = ()) -> bytes:
    """The encoded proof that a device receives with the offer of a new session. ``log``: of the new session.
    ``receipt``: from the closed log of the session that the device joined last, if it joined one. ``closed``: the last
    checkpoint of each session since, signed, in order."""
    return SESSION_CHAIN_PROOF.encode(SessionChainProof(receipt, tuple(closed), log.start_checkpoint(key)))


_OptionalDigest: TypeAlias = Annotated[bytes | None, wire.optional(DIGESTS)]


@dataclass(frozen=True, slots=True)
class LogState:
    """What a device knows of the log of the session that it joined last. ``delivered``: SHA-256 of its messages of that
    round that reached the coordinator, as its next request shows."""

    device: DeviceId  # its id
    offer: Digest  # digest of the session's offer
    previous: Digest  # digest of the last checkpoint of the previous session
    version: Uint64  # of the newest adapter, according to the newest checkpoint that it saw
    adapter: HexDigest  # SHA-256 of that adapter's file, hex
    size: Uint64 = 0  # number of entries when it last saw proofs; 0 before the first
    root: Digest = merkle.EMPTY  # root of these entries
    plan: _OptionalDigest = None  # digest of the plan of the round to which it contributed last
    unconfirmed: _OptionalDigest = None  # SHA-256 of its last message, which may not have reached the coordinator
    delivered: Annotated[tuple[bytes, ...], wire.sequence(DIGESTS, 4)] = ()
    survivors: _OptionalDigest = None  # digest of the ids of the survivors that the coordinator named

    @property
    def newest(self) -> AdapterId:
        return self.version, self.adapter

    @classmethod
    def initial(cls, coordinator: PublicKey, raw: bytes, offer: bytes, device: str) -> "LogState":
        """The state of a device that has none, from the proof sent with the offer of digest ``offer``. Raises
        ProtocolError: not a session chain proof, or one for another session."""
        proof = SESSION_CHAIN_PROOF.decode(raw)
        start = envelope.open_repeated(Checkpoint, proof.start, coordinator, COORDINATOR)
        if (start.offer, start.size, start.stage) != (offer, 0, Stage.OPEN):
            raise refused("the session chain proof is for another session than the offer", "proof.start")
        return cls(device, offer, start.previous, *start.newest)

    def contributed(self, plan: bytes, message: bytes) -> "LogState":
        """The state after the device answered the plan with digest ``plan`` by the signed ``message``."""
        return replace(self, plan=plan, unconfirmed=_digest(message), delivered=(), survivors=None)

    def on_survivors(self, survivors: Iterable[str], answer: bytes | None = None) -> "LogState":
        """The state after the coordinator named the survivors; ``answer`` is the device's answer. The request shows
        that the device's last message reached the coordinator."""
        delivered = self.delivered if self.unconfirmed is None else (*self.delivered, self.unconfirmed)
        unconfirmed = None if answer is None else _digest(answer)
        return replace(self, delivered=delivered, unconfirmed=unconfirmed, survivors=digest_of(survivors))

    def on_receipt(self, coordinator: PublicKey, raw: bytes) -> "LogState":
        """Check a receipt; returns the state to keep.

        ``coordinator``: the pinned key. Raises ProtocolError: not a receipt of this session, or it does not prove that
        the log extends what this device saw, contains its delivered messages, and ended its round with the survivors
        that it was shown; or its newest adapter is not the one that this device knows, or that the results since then
        made from it."""
        return self._checked(coordinator, raw)[0]

    def require_newest(self, plan: Plan) -> None:
        """Check that the plan distributes the newest adapter that the log names. Raises ProtocolError."""
        if (plan.adapter_version, plan.adapter_digest) != self.newest:
            text = f"adapter {plan.adapter_version} of the plan is not the newest one in the log, {self.version}"
            raise refused(text, "plan.adapter")

    def require_new(self, offer: bytes) -> None:
        """Check that an offer is not the one that the device joined last. Raises ProtocolError."""
        if offer == self.offer:
            raise refused("this device has joined that session before: the offer is repeated", "offer.repeated")

    def on_session_chain_proof(
        self, coordinator: PublicKey, raw: bytes, offer: bytes, *, other_base: bool = False
    ) -> "LogState":
        """Check the proof sent with the offer of digest ``offer``; returns the state to keep.

        ``other_base``: the session is on another base than the last one in which the device trained, and may start from
        a newer adapter than any that the log made. Raises ProtocolError as ``on_receipt``; the log is not closed; or
        the new session does not follow it, or starts from another adapter than the session before it ended with."""
        proof = SESSION_CHAIN_PROOF.decode(raw)
        self.require_new(offer)
        if not proof.receipt:
            raise refused("the proof has no receipt for the session that this device joined last", "proof.receipt")
        last = _closed(self._checked(coordinator, proof.receipt)[1])
        for signed in proof.closed:
            link = _closed(envelope.open_repeated(Checkpoint, signed, coordinator, COORDINATOR))
            if link.previous != last.digest():
                raise refused("the proof omits a session between the last one and this one", "proof.closed")
            if link.version < last.version or (link.version == last.version and link.adapter != last.adapter):
                text = "a session that this device missed ended with an older or another adapter than it began with"
                raise refused(text, "proof.adapter")
            last = link
        fresh = LogState.initial(coordinator, raw, offer, self.device)
        if fresh.previous != last.digest():
            text = "the offer does not follow the last session that this device knows: it is old"
            raise refused(text, "proof.previous")
        if fresh.newest != last.newest and not (other_base and fresh.version > last.version):
            text = "the session starts from another adapter than the session before it ended with"
            raise refused(text, "proof.adapter")
        return fresh

    def _checked(self, coordinator: PublicKey, raw: bytes) -> tuple["LogState", Checkpoint]:
        receipt = RECEIPT.decode(raw)
        checkpoint = envelope.open_repeated(Checkpoint, receipt.checkpoint, coordinator, COORDINATOR)
        if (checkpoint.offer, checkpoint.previous) != (self.offer, self.previous):
            raise refused("the log is of another session", "receipt.session")
        with ProtocolError.blaming(COORDINATOR, TrustError):
            if self.size:
                path = receipt.consistency.get(self.size, ())
                merkle.verify_consistency(self.root, self.size, checkpoint.root, checkpoint.size, path)
            endings = _endings(coordinator, receipt, checkpoint)
            check_last_round(self, receipt, endings, checkpoint)
            check_adapter(self, endings, checkpoint)
        after = LogState(self.device, self.offer, self.previous, *checkpoint.newest, checkpoint.size, checkpoint.root)
        return after, checkpoint


LOG_STATE: Codec[LogState] = wire.record(LogState)


def check_last_round(
    state: LogState, receipt: Receipt, endings: Sequence[Result | Abort], checkpoint: Checkpoint
) -> None:
    """Check that a receipt shows the end of the device's last round and the messages that it must contain. Raises
    ProtocolError: it does not, or names other survivors than the device was shown; TrustError: an entry is not in the
    log."""
    if state.plan is None:
        return
    ending = next((each for each in endings if each.plan == state.plan), None)
    if ending is None:
        raise refused("the receipt does not show how this device's last round ended", "receipt.endings")
    required = set(state.delivered)
    if isinstance(ending, Result):
        if state.survivors not in (None, digest_of(ending.survivors)):
            raise refused("the log names other survivors than this device was shown", "receipt.survivors")
        if state.device in ending.survivors and state.unconfirmed is not None and state.survivors is None:
            required.add(state.unconfirmed)
    found = {_digest(_included(proof, checkpoint).message) for proof in receipt.contributions}
    if required - found:
        text = "the receipt does not show that the log has this device's messages of its last round"
        raise refused(text, "receipt.contributions")


def check_adapter(state: LogState, endings: Iterable[Result | Abort], checkpoint: Checkpoint) -> None:
    """Return if the results since the checkpoint that a device knows lead from its newest adapter to the log's.

    A receipt shows every ending since the device's last round, so that no result between the two is missing.
    ``endings``: those that the receipt shows, in the order of the log. Raises ProtocolError: they do not: the log names
    an older adapter, one without a result, or two of one version."""
    version, adapter = state.newest
    for result in endings:
        if isinstance(result, Result) and result.version == version + 1:
            version, adapter = result.produced
        elif isinstance(result, Result) and result.version == version and result.adapter != adapter:
            raise refused(f"the log has two results for adapter {version}", "receipt.adapter")
    if checkpoint.newest != (version, adapter):
        text = f"the log names adapter {checkpoint.version} as its newest, its results show {version}"
        raise refused(text, "receipt.adapter")


def _endings(coordinator: PublicKey, receipt: Receipt, checkpoint: Checkpoint) -> list[Result | Abort]:
    """The endings that a receipt shows, verified, in the order of the log."""
    found: list[Result | Abort] = []
    for entry in sorted((_included(proof, checkpoint) for proof in receipt.endings), key=lambda entry: entry.index):
        kind: type[Result] | type[Abort] = Result if entry.kind == Result.TAG else Abort
        found.append(envelope.open_repeated(kind, entry.message, coordinator, COORDINATOR))
    return found


def _closed(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.stage is not Stage.CLOSED:
        raise refused("the log of an earlier session is not closed", "proof.stage")
    return checkpoint


def _included(proof: Proof, checkpoint: Checkpoint) -> Entry:
    entry = ENTRY.decode(proof.leaf)
    merkle.verify_inclusion(checkpoint.root, checkpoint.size, entry.index, proof.leaf, proof.path)
    return entry


def _digest(message: bytes) -> bytes:
    return hashlib.sha256(message).digest()


def digest_of(devices: Iterable[str]) -> bytes:
    """SHA-256 of the sorted device ids: equal for equal sets."""
    return _digest("\n".join(sorted(devices)).encode())
