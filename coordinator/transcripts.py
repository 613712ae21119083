"""The transcripts of a coordinator: one file a session, written as it goes, for ``edgeadapt audit`` to check later.

``coordinator.audit.transcripts`` names the files, ``coordinator.recorder`` writes a log. A kill can tear its last
record; the next start cuts it back, keeps what it cut in a file next to the log, ends the round under way, and closes
the log.
"""

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from adapters import storage
from adapters.storage import PUBLIC
from aggregation import envelope, transcript
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Offer
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey, PublicKey
from aggregation.pki.revocation import RevocationList
from aggregation.transcript import (
    ENTRY,
    LENGTH,
    MAGIC,
    NO_SESSION,
    Abort,
    Checkpoint,
    Entry,
    Stage,
    Transcript,
    receipts,
    session_chain_proof,
)
from coordinator.audit import Problem, checkpoints
from coordinator.audit.transcripts import AUTHORITY, COORDINATOR, REVOKED, VECTORS, log_name, log_number, logs
from coordinator.recorder import Recorder

TORN = ".torn"
_INDEX = 8  # bytes of an entry before its kind
_CHECKPOINT = bytes([len(Checkpoint.TAG)]) + Checkpoint.TAG.encode()  # the kind, as an entry has it
INTERRUPTED = "interrupted"  # why a round ended that was under way when the process ended


@dataclass(frozen=True, slots=True)
class Transcripts:
    """The folder.

    Args:
        folder: Made when the first session begins.
        key: The coordinator's; signs the checkpoints.
        root: The authority that certified the devices.
        keep_vectors: Keep every masked vector too, so that sums can be added up again.
    """

    folder: Path
    key: IdentityKey
    root: Root
    keep_vectors: bool

    def begin(self, offer: bytes, revoked: RevocationList | None = None) -> Recorder:
        """Start the log of the session whose offer has this digest, and close the one before.

        Args:
            offer: Its digest.
            revoked: The revocation list that the session goes by.

        Raises:
            TrustError: The log before it was altered.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        storage.replace(self.folder / AUTHORITY, self.root.to_pem(), PUBLIC)
        if revoked is not None:
            storage.replace(self.folder / REVOKED, revoked.to_pem(), PUBLIC)
        storage.replace(self.folder / COORDINATOR, self.key.public.to_pem(), PUBLIC)
        vectors = self.folder / VECTORS if self.keep_vectors else None
        if vectors:
            vectors.mkdir(exist_ok=True)
        previous = self.finish()
        number = max(map(log_number, logs(self.folder)), default=0) + 1
        recorder = Recorder(self.folder / log_name(number), Transcript(offer, previous), self.key, vectors)
        recorder.write(MAGIC)
        storage.sync(self.folder)
        return recorder

    def session_chain_proofs(self, recorder: Recorder, seen: Mapping[str, bytes]) -> dict[str, bytes]:
        """What each device gets in the same message as the offer of the session of ``recorder``.

        Args:
            recorder: Of the new session.
            seen: Device → digest of the offer that it says it joined last; empty where it joined none.
        """
        wanted, closed, found = set(seen.values()) - {b""}, list[bytes](), dict[str, bytes]()
        for path in reversed([path for path in logs(self.folder) if path != recorder.path]):
            if not wanted:
                break
            offer, last = _ends(path)
            if offer in wanted:
                wanted.remove(offer)
                devices = [device for device, digest in seen.items() if digest == offer]
                log = transcript.resume(transcript.read(path.read_bytes()).entries, NO_SESSION)
                proofs = receipts(log, devices)
                found |= {
                    device: session_chain_proof(recorder.log, self.key, proofs[device], closed) for device in devices
                }
            closed.insert(0, last)
        return {device: found.get(device) or session_chain_proof(recorder.log, self.key) for device in seen}

    def finish(self) -> bytes:
        """Close the last log if it is open, from what is on the disk. Returns the digest of its last checkpoint.

        Raises:
            TrustError: The log was altered.
        """
        previous = NO_SESSION
        for path in logs(self.folder)[-2:]:  # only the last one can be open, and it may need to name the one before
            previous = _finish(path, self.key, previous)
        return previous


def _finish(path: Path, key: IdentityKey, previous: bytes) -> bytes:
    """The digest of a log's last checkpoint. A log that a kill left open is closed first, one without entries removed.

    Args:
        path: Of the log.
        key: The coordinator's.
        previous: Digest of the last checkpoint of the log before; comes back where this log has no entries.
    """
    raw = path.read_bytes()
    reading = transcript.read(raw)
    if reading.problem:
        if _goes_on(raw[reading.end :], key.public):
            raise _altered(path, reading.problem)
        path.with_suffix(TORN).write_bytes(raw[reading.end :])
        os.truncate(path, reading.end)
    if not reading.entries:
        path.unlink()
        return previous
    whole = replace(reading, problem="")
    try:
        found = checkpoints(whole, key.public, unfinished=True)
    except Problem as problem:
        raise _altered(path, problem) from None
    if not found or found[-1].stage is not Stage.CLOSED:
        recorder = Recorder(path, transcript.resume(whole.entries, previous), key)
        if recorder.log.plan is not None:
            recorder.write(recorder.log.ended(key, Abort(recorder.log.plan, INTERRUPTED)))
        recorder.checkpoint(Stage.CLOSED)
        found = checkpoints(transcript.read(path.read_bytes()), key.public, unfinished=False)
    return found[-1].digest()


def _goes_on(rest: bytes, coordinator: PublicKey) -> bool:
    """Whether the log holds a whole checkpoint in what can no longer be read: a kill tears nothing but its end."""
    for found in re.finditer(re.escape(_CHECKPOINT), rest):
        start = max(found.start() - _INDEX, 0)
        size = int.from_bytes(rest[max(start - LENGTH, 0) : start], "big")
        with suppress(ProtocolError):
            envelope.open_verified(Checkpoint, ENTRY.decode(rest[start : start + size]).message, coordinator, "")
            return True
    return False


def _altered(path: Path, problem: object) -> TrustError:
    return TrustError(f"{path} was altered after it was written ({problem}): find out why, and move it away")


def _ends(path: Path) -> tuple[bytes, bytes]:
    """Digest of the offer, and the last checkpoint as signed, of a closed log, without reading what is between.

    Raises:
        TrustError: It was altered.
    """
    with path.open("rb") as file:
        file.seek(len(MAGIC))
        spans = []
        while head := file.read(LENGTH):
            spans.append((file.tell(), int.from_bytes(head, "big")))
            file.seek(sum(spans[-1]))
        try:
            first, last = (_entry(file, *spans[end]) for end in (0, -1))
            return Offer.decode(envelope.unverified_body(first.message)).digest(), last.message
        except (IndexError, ProtocolError) as error:
            raise TrustError(f"{path} was altered after it was written ({error}): find out why") from None


def _entry(file: BinaryIO, start: int, size: int) -> Entry:
    file.seek(start)
    return ENTRY.decode(file.read(size))
