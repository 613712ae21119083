"""A log as a start finds it on the disk: read and verified, and compared with what the registry knows of it.

Nothing here writes. ``coordinator.transcripts`` repairs and closes a log after these checks.
"""

import itertools
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from aggregation import envelope, transcript
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Offer
from aggregation.pki.certificates import identity, load, subject
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.session import COORDINATOR
from aggregation.transcript import (
    ENTRY,
    EVERYONE,
    LENGTH,
    MAGIC,
    NO_SESSION,
    Abort,
    AdapterId,
    Checkpoint,
    Entry,
    Reading,
    Result,
    Stage,
    Transcript,
)
from coordinator.recorder import ending_of
from coordinator.registry import Head
from edgeadapt.audit import Problem, checkpoints, history
from edgeadapt.audit.history import History
from edgeadapt.formats import storage
from edgeadapt.formats.roundrecord import INTERRUPTED, RoundRecord

_CHECKPOINT = bytes([len(Checkpoint.TAG)]) + Checkpoint.TAG.encode()  # the kind, as an entry has it
_ROUND, _PEER, _LENGTH = 4, 1 + len(EVERYONE), 4  # bytes that follow the kind: round, peer, length of the message


@dataclass(frozen=True, slots=True)
class StoredLog:
    """The log of a session, as far as it can be read."""

    path: Path
    entries: tuple[Entry, ...]  # signed by the coordinator, up to the last checkpoint
    checkpoints: tuple[Checkpoint, ...]
    end: int  # bytes that the entries take
    rest: bytes  # what a kill or a power cut left after them: records that are incomplete, or not what was signed

    @classmethod
    def read(cls, path: Path, coordinator: PublicKey) -> Self:
        """Read and verify a log.

        Raises:
            DataError: It is too large, or not a file.
            TrustError: It was altered after it was written.
        """
        raw = storage.read(path)
        reading = _intact(transcript.read(raw), coordinator)
        rest = raw[reading.end :]
        try:
            signed = tuple(checkpoints(replace(reading, problem=""), coordinator, unfinished=True))
        except Problem as problem:
            if reading.entries:
                raise altered(path, problem) from None
            signed = ()
        log = cls(path, reading.entries, signed, reading.end, rest)
        if rest and (log.closed or log.is_continued_in(rest, coordinator)):
            raise altered(path, reading.problem)
        return log

    def is_continued_in(self, rest: bytes, coordinator: PublicKey) -> bool:
        """Whether unreadable bytes hold a checkpoint of what follows the entries. A kill damages only the last record.

        Parts of a message are its sender's choice, and devices have the earlier checkpoints of this log and of others.
        A later one they cannot have.
        """
        offer = self.offer
        for match in re.finditer(re.escape(_CHECKPOINT), rest):
            at = match.end() + _ROUND + _PEER + _LENGTH
            size = int.from_bytes(rest[at - _LENGTH : at], "big")
            if size > Checkpoint.LIMIT + envelope.OVERHEAD:
                continue
            with suppress(ProtocolError):
                signed = envelope.open_verified(Checkpoint, rest[at : at + size], coordinator, COORDINATOR)
                if signed.size >= len(self.entries) and offer in (b"", signed.offer):
                    return True
        return False

    @property
    def closed(self) -> bool:
        return bool(self.checkpoints) and self.checkpoints[-1].stage is Stage.CLOSED

    @property
    def offer(self) -> bytes:
        """Digest of the session's offer; empty if the log does not have an entry."""
        return Offer.decode(envelope.unverified_body(self.entries[0].message)).digest() if self.entries else b""

    @property
    def endings(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.kind in (Result.TAG, Abort.TAG))

    def resumed(self, newest: AdapterId, previous: bytes) -> Transcript:
        """Restore the transcript that wrote it.

        For a log without a checkpoint, ``newest`` is the adapter that the session started from, and ``previous`` the
        digest of the last checkpoint of the previous session.
        """
        if self.checkpoints:
            newest, previous = self.checkpoints[0].newest, self.checkpoints[0].previous
        return transcript.resume(self.entries, newest, previous)


def _intact(reading: Reading, coordinator: PublicKey) -> Reading:
    """Cut a log before the first message after its last checkpoint whose signature is not valid.

    Answers of devices are on the disk for certain only once the coordinator asks for the next ones: a power cut can
    leave such a record with zeros in it. A later start would sign that, and every audit would refuse it. The entries
    before a checkpoint are verified by it. Assignments that the log keeps without their body are not verified here.
    """
    entries = reading.entries
    kept = max((entry.index + 1 for entry in entries if entry.kind == Checkpoint.TAG), default=0)
    if kept >= len(entries):
        return reading
    with suppress(Problem, ProtocolError, TrustError):
        offer = Offer.decode(envelope.unverified_body(entries[0].message))
        certificates = [load(der) for der in offer.certificates]
        logged = History(offer, {subject(each): identity(each) for each in certificates})
        for entry in entries[kept:]:
            history.verify(logged, (entry,), coordinator)
            kept += 1
    if kept == len(entries):
        return reading
    end = len(MAGIC) + sum(LENGTH + len(ENTRY.encode(entry)) for entry in entries[:kept])
    return Reading(entries[:kept], end, f"{entries[kept].place} is not what was signed")


def require_agreement(logs: Sequence[StoredLog], head: Head, key: IdentityKey) -> bool:
    """Compare the logs with the registry, before anything is signed.

    Returns whether the last log lacks the ending of the last recorded round and nothing else, as after a kill. Raises
    TrustError: the logs lack something else that the registry knows, or the registry what they know.

    Args:
        logs: Of the session of the last recorded round and of all sessions since, in order, without empty ones; all
            logs, where no round is recorded.
    """
    for log, following in itertools.pairwise(logs):
        start = following.checkpoints[0].previous if following.checkpoints else None
        if not log.closed or start not in (None, log.checkpoints[-1].digest()):
            raise _contradiction(f"{log.path.name} is not the log that {following.path.name} follows")
    missing = head.round is not None and _lacks_ending(logs, head.round, key)
    since = logs[0].endings if logs else ()
    if head.round is not None:
        since = tuple(entry for entry in since if entry.index > head.round.entries)
    for entry in (*since, *(entry for log in logs[1:] for entry in log.endings)):
        if entry.kind != Abort.TAG or Abort.decode(envelope.unverified_body(entry.message)).reason != INTERRUPTED:
            raise _contradiction(f"the registry has no record of the round that ended with {entry.place}")
    has_version = missing and head.round is not None and head.round.version is not None
    newest = logs[-1].resumed(head.newest, NO_SESSION).newest if logs else (0, head.newest[1])
    if not has_version and newest != head.newest:
        raise _contradiction(f"the newest adapter is {newest[0]} in the logs and {head.newest[0]} in the registry")
    return missing


def _lacks_ending(logs: Sequence[StoredLog], record: RoundRecord, key: IdentityKey) -> bool:
    """Whether the log of a recorded round stops right before the round's ending."""
    if not logs or logs[0].offer.hex() != record.offer:
        raise _contradiction(f"the log of round {record.round} is missing")
    log = logs[0].resumed((0, ""), NO_SESSION)
    if log.tree.size < record.entries or log.tree.root(record.entries).hex() != record.root:
        raise _contradiction(f"{logs[0].path.name} lacks entries of round {record.round}")
    ending = ending_of(record)
    if ending is None:
        return False
    if log.tree.size == record.entries and len(logs) == 1 and log.plan == ending.plan:
        return True
    following = logs[0].entries[record.entries : record.entries + 1]
    if [entry.message for entry in following] != [envelope.sign(key, ending)]:
        raise _contradiction(f"{logs[0].path.name} lacks the ending of round {record.round}")
    return False


def _contradiction(what: str) -> TrustError:
    text = f"the transcript and the registry contradict each other ({what}): restore both from one copy"
    return TrustError(text, about="transcript")


def altered(path: Path, problem: object) -> TrustError:
    text = f"{path} was altered after it was written ({problem}): find out why, and move it away"
    return TrustError(text, about=path.name)
