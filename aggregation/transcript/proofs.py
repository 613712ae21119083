"""Proofs that the coordinator sends to devices: about its log, and that one session's log follows another's."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from aggregation import envelope, wire
from aggregation.messages import MAX_COHORT
from aggregation.pki.identity import IdentityKey
from aggregation.spec import MAX_ROUNDS
from aggregation.transcript import merkle
from aggregation.transcript.entries import Checkpoint, Result
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
    """The leaf of an entry, and its inclusion proof."""

    leaf: Annotated[bytes, wire.blob(_MAX_LEAF)]
    path: Annotated[tuple[bytes, ...], _PATH]


_Proofs: TypeAlias = Annotated[tuple[Proof, ...], wire.sequence(wire.record(Proof), MAX_ROUNDS)]


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proofs about a log.

    Args:
        checkpoint: The newest one, signed.
        endings: ``Result`` or ``Abort`` of each round that may have been the device's last.
        contributions: The device's masked input and consistency signature in the round to which it contributed last.
        consistency: Number of entries that an earlier checkpoint covers → proof that the newest begins with them.
    """

    checkpoint: _SignedCheckpoint
    endings: _Proofs
    contributions: _Proofs
    consistency: Annotated[Mapping[int, tuple[bytes, ...]], wire.mapping(wire.uint(64), _PATH, 2 * MAX_ROUNDS)]


RECEIPT: Codec[Receipt] = wire.record(Receipt)


@dataclass(frozen=True, slots=True)
class SessionChainProof:
    """Proof that a new session follows the session that a device joined last.

    Args:
        receipt: Of the closed log of the session that the device joined last; empty if it joined none.
        closed: The last checkpoint of each session since, signed, in order.
        start: The checkpoint of no entries, signed, that names the last of these as previous.
    """

    receipt: Annotated[bytes, wire.blob(2**28)]
    closed: Annotated[tuple[bytes, ...], wire.sequence(_CHECKPOINT, MAX_SESSIONS)]
    start: _SignedCheckpoint


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
    """The encoded proof that a device receives with the offer of a new session.

    Args:
        log: Of the new session.
        receipt: From the closed log of the session that the device joined last, if it joined one.
        closed: The last checkpoint of each session since, signed, in order.
    """
    return SESSION_CHAIN_PROOF.encode(SessionChainProof(receipt, tuple(closed), log.start_checkpoint(key)))
