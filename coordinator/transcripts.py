"""The transcripts of a coordinator: one log for each session, for ``edgeadapt audit`` to check later.

Records are synced to the disk before the coordinator sends its next message, which tells a device that its answer
arrived: the device later demands a proof that the log holds it. With a registry that machines share, they are appended
to a table of its database first, and the file is a copy (``coordinator.registry.transcripttable``). The end of a round
is written to the registry first and to the log second, from the registry's record.

A kill can leave the last record incomplete, and a power cut can leave zeros in the last ones. The next start moves such
a rest to a file with the suffix ``.torn``, ends the round that was under way as the registry says, and closes the log.
A log that lacks what the registry knows is not signed again. ``edgeadapt.auditing.transcripts`` names the files."""

import itertools
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, Self

from aggregation import envelope
from aggregation.errors import EdgeAdaptError, ProtocolError, TrustError
from aggregation.messages import MaskedInput, Offer, Plan
from aggregation.pki import Root
from aggregation.pki.certificates import identity, load, subject
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.revocation import RevocationList
from aggregation.session import COORDINATOR as SENDER
from aggregation.steps import Step
from aggregation.transcript.entries import (
    ENTRY,
    EVERYONE,
    LENGTH,
    MAGIC,
    Abort,
    AdapterId,
    Checkpoint,
    Entry,
    Reading,
    Result,
    Stage,
    read,
    write,
)
from aggregation.transcript.log import NO_SESSION, Transcript, logged_part, packed_vector, resume
from aggregation.transcript.logstate import MAX_SESSIONS, receipts, session_chain_proof
from coordinator.registry import Head, TranscriptTable
from edgeadapt.auditing import Problem, checkpoints, history
from edgeadapt.auditing.history import History
from edgeadapt.auditing.transcripts import VECTORS, log_name, log_number, logs, vector_path
from edgeadapt.formats import storage
from edgeadapt.formats.manifest import INTERRUPTED, RoundRecord
from edgeadapt.formats.registryfiles import AUTHORITY, PUBLIC_KEY, REVOKED
from edgeadapt.formats.storage import PUBLIC

LONGEST = 1.0  # seconds that records which need not be synced yet wait for those that follow them


def ending_of(record: RoundRecord) -> Result | Abort | None:
    """Make the ending that the log of its session has for a recorded round; None if the round ended before its plan."""
    if record.plan is None:
        return None
    plan = bytes.fromhex(record.plan)
    if record.version is None or record.adapter is None or record.sum is None:
        return Abort(plan, record.reason or "")
    return Result(plan, record.survivors, bytes.fromhex(record.sum), record.version, record.adapter)


@dataclass(slots=True)
class Recorder:
    path: Path
    log: Transcript
    key: IdentityKey  # the coordinator's; signs endings and checkpoints
    vectors: Path | None = None  # folder of the masked vectors; None: they are not kept
    table: TranscriptTable | None = None  # where the log is, if machines share it; None: in the file
    _pending: bytes = field(default=b"", repr=False)  # not in the table yet
    _since: float = field(default=0.0, repr=False)  # when the oldest of them came

    def begin(self, plan: Plan) -> None:
        self.log.begin(plan)

    def now(self) -> int:
        """Tell the time as the log does, in which it never goes back: seconds since 1970."""
        return max(int(time.time()), self.log.latest)

    def sent(self, step: Step, bodies: Mapping[str, bytes]) -> None:
        self.write(self.log.sent(step, bodies, self.now()), sync=True)

    def received(self, step: Step, device: str, body: bytes) -> None:
        """Record an answer that was accepted. Its vector comes first: no kill leaves a log that lacks one."""
        if self.vectors is not None and step is Step.PLAN:
            header = envelope.unverified_body(logged_part(step, body))  # was verified when it was accepted
            path = vector_path(self.vectors, MaskedInput.decode(header).vector)
            storage.replace(path, packed_vector(body), PUBLIC)
        self.write(self.log.received(step, device, body))

    def receipts(self, devices: Iterable[str]) -> dict[str, bytes]:
        """Prove to each device what the log has: see ``logstate.receipts``."""
        return receipts(self.log, devices)

    def synced(self) -> Transcript:
        """Return the log once all in it would survive a power cut: a record of the round may then refer to it."""
        self.write(b"", sync=True)
        return self.log

    def end(self, record: RoundRecord) -> None:
        """End the round under way as its record says, which the registry has. A round without a plan has no ending."""
        ending = ending_of(record)
        if ending is not None:
            self.write(self.log.ended(self.key, ending, max(self.now(), record.ended or 0)), sync=True)

    def close(self, record: RoundRecord | None) -> bytes:
        """End the log, and interrupt a round without a ``record``. Returns the digest of the last checkpoint."""
        if record is not None:
            self.end(record)
        elif self.log.plan is not None:
            self.write(self.log.ended(self.key, Abort(self.log.plan, INTERRUPTED), self.now()))
        elif self.log.tree.size - 1 in {index for index, _ in self.log.endings.values()}:
            self.checkpoint()  # a kill came between the two
        self.checkpoint(Stage.CLOSED)
        last = self.log.checkpoints[max(self.log.checkpoints)]
        return Checkpoint.decode(envelope.unverified_body(last)).digest()

    def checkpoint(self, stage: Stage = Stage.OPEN) -> None:
        self.write(self.log.checkpoint(self.key, stage), sync=True)

    def write(self, records: bytes, *, sync: bool = False) -> None:
        """Append. After the return the records survive a kill of the process, and with ``sync`` also a power cut. For a
        table, a kill is as a power cut: what need not be synced is sent with what follows, in one transaction."""
        if self.table is not None:
            now = time.monotonic()
            self._since = self._since if self._pending else now
            self._pending += records
            if not self._pending or not (sync or now - self._since > LONGEST):
                return
            size = self.path.stat().st_size if self.path.exists() else 0
            self.table.append(log_number(self.path), size, self._pending)
            records, self._pending = self._pending, b""
        with storage.naming(self.path), self.path.open("ab") as file:
            file.write(records)
            if sync:
                storage.flush(file)


_CHECKPOINT = bytes([len(Checkpoint.TAG)]) + Checkpoint.TAG.encode()  # the kind, as an entry has it
_ROUND, _PEER, _LENGTH = 4, 1 + len(EVERYONE), 4  # bytes that follow the kind: round, peer, length of the message


@dataclass(frozen=True, slots=True)
class StoredLog:
    path: Path
    entries: tuple[Entry, ...]  # signed by the coordinator, up to the last checkpoint
    checkpoints: tuple[Checkpoint, ...]
    end: int  # bytes that the entries take
    rest: bytes  # what a kill or a power cut left after them: records that are incomplete, or not what was signed

    @classmethod
    def read(cls, path: Path, coordinator: PublicKey) -> Self:
        """Read and verify a log. Raises DataError: it is too large, or not a file. Raises TrustError: it was altered
        after it was written."""
        raw = storage.read(path)
        reading = _intact(read(raw), coordinator)
        rest = raw[reading.end :]
        try:
            signed = tuple(checkpoints(replace(reading, problem=""), coordinator))
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
        A later one they cannot have."""
        offer = self.offer
        for match in re.finditer(re.escape(_CHECKPOINT), rest):
            at = match.end() + _ROUND + _PEER + _LENGTH
            size = int.from_bytes(rest[at - _LENGTH : at], "big")
            if size > Checkpoint.LIMIT + envelope.OVERHEAD:
                continue
            with suppress(ProtocolError):
                signed = envelope.open_verified(Checkpoint, rest[at : at + size], coordinator, SENDER)
                if signed.size >= len(self.entries) and offer in (b"", signed.offer):
                    return True
        return False

    @property
    def closed(self) -> bool:
        return bool(self.checkpoints) and self.checkpoints[-1].stage is Stage.CLOSED

    @property
    def offer(self) -> bytes:
        """Digest of the session's offer; empty without an entry."""
        return Offer.decode(envelope.unverified_body(self.entries[0].message)).digest() if self.entries else b""

    @property
    def endings(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.kind in (Result.TAG, Abort.TAG))

    def resumed(self, newest: AdapterId, previous: bytes) -> Transcript:
        """Restore the transcript that wrote it. For a log without a checkpoint, ``newest`` is the adapter that the
        session started from, and ``previous`` the digest of the last checkpoint of the previous session."""
        if self.checkpoints:
            newest, previous = self.checkpoints[0].newest, self.checkpoints[0].previous
        return resume(self.entries, newest, previous)


def _intact(reading: Reading, coordinator: PublicKey) -> Reading:
    """Cut a log before the first message after its last checkpoint whose signature is not valid.

    Answers of devices are on the disk for certain only once the coordinator asks for the next ones: a power cut can
    leave such a record with zeros in it. A later start would sign that, and every audit would refuse it. The entries
    before a checkpoint are verified by it. Assignments that the log keeps without their body are not verified here."""
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
    return Reading(entries[:kept], len(write(entries[:kept])), f"{entries[kept].place} is not what was signed")


def require_agreement(logs: Sequence[StoredLog], head: Head, key: IdentityKey) -> bool:
    """Compare the logs with the registry, before anything is signed.

    Returns whether the last log lacks the ending of the last recorded round and nothing else, as after a kill. Raises
    TrustError: the logs lack something else that the registry knows, or the registry what they know. ``logs``: of the
    session of the last recorded round and of all sessions since, in order, without empty ones; all logs, where no round
    is recorded."""
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
    expected = (head.newest, *head.earlier)
    newest = logs[-1].resumed(head.newest, NO_SESSION).newest if logs else (0, expected[-1][1])
    if not has_version and newest not in expected:
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


logger = logging.getLogger("edgeadapt.coordinator")
TORN = ".torn"  # suffix of the incomplete record that a kill left


@dataclass(frozen=True, slots=True)
class Transcripts:
    """The transcripts in a folder. ``table``: of a registry that machines share: it has the logs then, and ``folder`` a
    copy. ``ends``: closed log → what ``_ends`` read from it. It does not change any more."""

    folder: Path  # created when the first session begins
    key: IdentityKey  # the coordinator's; signs the checkpoints
    root: Root  # the authority that certified the devices
    keep_vectors: bool  # keep every masked vector too, so that an auditor can recompute the sums
    head: Callable[[], Head]  # what the registry knows: its newest adapter and its last round
    table: TranscriptTable | None = None
    ends: dict[Path, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)

    def begin(self, offer: bytes, revoked: RevocationList | None = None) -> Recorder:
        """Start the log of a session, and close the previous one. ``offer``: digest of the session's offer;
        ``revoked``: the revocation list that the session applies. Raises TrustError as ``finish``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        storage.replace(self.folder / AUTHORITY, self.root.to_pem(), PUBLIC)
        if revoked is not None:
            if self.table is not None:
                self._offer(self.table, revoked)
            storage.replace(self.folder / REVOKED, revoked.to_pem(), PUBLIC)
        storage.replace(self.folder / PUBLIC_KEY, self.key.public.to_pem(), PUBLIC)
        vectors = self.folder / VECTORS if self.keep_vectors else None
        if vectors:
            vectors.mkdir(exist_ok=True)
        newest, (previous, latest) = self.head().newest, self._finish()
        number = max(map(log_number, logs(self.folder)), default=0) + 1
        log, path = Transcript(offer, newest, previous, latest=latest), self.folder / log_name(number)
        recorder = Recorder(path, log, self.key, vectors, self.table)
        recorder.write(MAGIC)
        storage.sync(self.folder)
        return recorder

    def _offer(self, table: TranscriptTable, listed: RevocationList) -> None:
        """Let the table have a list, unless it has a newer one that another coordinator was given meanwhile."""
        while (stored := table.revocations()) is None or self._number(stored) < listed.number:
            table.offer_revocations(listed.to_pem(), stored)

    def _number(self, stored: bytes) -> int:
        """Number of a list in the table; -1 for what the authority did not sign."""
        try:
            return self.root.revocations(stored).number
        except TrustError:
            return -1

    def sessions(self, *, backwards: bool = False) -> Iterator[tuple[Entry, ...]]:
        """Read the entries of one log after the other. Raises TrustError: a log was altered."""
        paths = logs(self.folder)
        for path in reversed(paths) if backwards else paths:
            yield StoredLog.read(path, self.key.public).entries

    def session_chain_proofs(self, recorder: Recorder, last_offers: Mapping[str, bytes]) -> dict[str, bytes]:
        """Prove to each device that the new session continues the log of the session that the device joined last.

        The proof travels in the same message as the offer. ``last_offers``: device → digest of the offer that it joined
        last, as it says; empty where it joined none. One that was more than ``MAX_SESSIONS`` sessions ago counts as
        unknown: no message can name them all. So does one before a log that cannot be read."""
        wanted, closed, by_offer = set(last_offers.values()) - {b""}, list[bytes](), dict[str, bytes]()
        for path in reversed([path for path in logs(self.folder) if path != recorder.path]):
            if not wanted or len(closed) > MAX_SESSIONS:
                break
            try:
                if path not in self.ends:
                    self.ends[path] = _ends(path)
                offer, last = self.ends[path]
                if offer in wanted:
                    wanted.remove(offer)
                    devices = [device for device, digest in last_offers.items() if digest == offer]
                    end = Checkpoint.decode(envelope.unverified_body(last)).newest
                    proofs = receipts(resume(read(storage.read(path)).entries, end), devices)
                    by_offer |= {
                        device: session_chain_proof(recorder.log, self.key, proofs[device], closed)
                        for device in devices
                    }
            except EdgeAdaptError as error:  # a device's claim led here, and must not stop the others
                logger.warning("%s and the logs before it prove nothing to devices: %s", path.name, error)
                break
            closed.insert(0, last)
        return {device: by_offer.get(device) or session_chain_proof(recorder.log, self.key) for device in last_offers}

    def finish(self) -> bytes:
        """Close the last log if it is open, as far as it is on the disk. Returns the digest of its last checkpoint.

        A round under way gets the ending that the registry has for it, or is aborted. Before anything is signed, all
        that the registry knows must have been found in the logs. Raises TrustError: a log was altered, or the logs and
        the registry contradict each other. Raises EdgeAdaptError: another coordinator leads, or the registry failed."""
        return self._finish()[0]

    def _finish(self) -> tuple[bytes, int]:
        if self.table is not None:
            self.table.require_lead()  # the files of a former leader lack what the one after it has added
            self.table.copy_to(self.folder)  # a full disk may have kept a part of what the table has
        head = self.head()
        stored = self._since(head.round)
        held = [log for log in stored if log.entries]
        missing = require_agreement(held, head, self.key)
        for log in stored:
            if self.table is not None and (log.rest or not log.entries):  # no kill leaves that in a table
                raise altered(log.path, "it has an incomplete record")
            if log.rest:
                storage.write_files(self.folder, {log.path.with_suffix(TORN).name: log.rest})
                os.truncate(log.path, log.end)
            if not log.entries:
                log.path.unlink()
        if not held:
            return NO_SESSION, 0
        if held[-1].closed:
            return held[-1].checkpoints[-1].digest(), max(entry.at or 0 for entry in held[-1].entries)
        previous = held[-2].checkpoints[-1].digest() if len(held) > 1 else NO_SESSION
        recorder = Recorder(held[-1].path, held[-1].resumed(head.newest, previous), self.key, table=self.table)
        return recorder.close(head.round if missing else None), recorder.log.latest

    def _since(self, record: RoundRecord | None) -> list[StoredLog]:
        stored: list[StoredLog] = []
        for path in reversed(logs(self.folder)):
            stored.insert(0, StoredLog.read(path, self.key.public))
            if record is not None and stored[0].offer.hex() == record.offer:
                break
        return stored


def _ends(path: Path) -> tuple[bytes, bytes]:
    """Read the digest of the offer, and the last checkpoint as signed, of a closed log: its first and last entry.
    Raises DataError: it is too large, or not a file. Raises TrustError: it was altered."""
    with storage.opened(path) as (file, size):
        first = last = (len(MAGIC) + LENGTH, 0)
        end = len(MAGIC)
        while end < size:
            file.seek(end)
            last = end + LENGTH, int.from_bytes(file.read(LENGTH), "big")
            first = last if end == len(MAGIC) else first
            end = sum(last)
        try:
            offer = Offer.decode(envelope.unverified_body(_entry(file, *first).message))
            return offer.digest(), _entry(file, *last).message
        except ProtocolError as error:
            raise altered(path, error) from None


def _entry(file: BinaryIO, start: int, size: int) -> Entry:
    file.seek(start)
    return ENTRY.decode(file.read(size))
