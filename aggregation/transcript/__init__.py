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

from aggregation.transcript.entries import (
    ENTRY,
    EVERYONE,
    LENGTH,
    MAGIC,
    Abort,
    Checkpoint,
    Entry,
    Place,
    Reading,
    Result,
    Stage,
    read,
)
from aggregation.transcript.log import ANSWERS, NO_SESSION, REQUESTS, Transcript, logged_part, packed_vector, resume
from aggregation.transcript.logstate import LOG_STATE, LogState
from aggregation.transcript.proofs import (
    RECEIPT,
    SESSION_CHAIN_PROOF,
    Proof,
    Receipt,
    SessionChainProof,
    receipts,
    session_chain_proof,
)

__all__ = [
    "ANSWERS",
    "ENTRY",
    "EVERYONE",
    "LENGTH",
    "LOG_STATE",
    "MAGIC",
    "NO_SESSION",
    "RECEIPT",
    "REQUESTS",
    "SESSION_CHAIN_PROOF",
    "Abort",
    "Checkpoint",
    "Entry",
    "LogState",
    "Place",
    "Proof",
    "Reading",
    "Receipt",
    "Result",
    "SessionChainProof",
    "Stage",
    "Transcript",
    "logged_part",
    "packed_vector",
    "read",
    "receipts",
    "resume",
    "session_chain_proof",
]
