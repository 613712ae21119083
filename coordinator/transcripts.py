"""The transcripts of a coordinator: one log for each session, for ``edgeadapt audit`` to check later.

``coordinator.audit.transcripts`` names the files, ``coordinator.recorder`` writes a log. A kill can leave the last
record incomplete. The next start moves such a rest to a file with the suffix ``.torn``, ends the round that was under
way, and closes the log.
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
    AdapterId,
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

TORN = ".torn"  # suffix of the incomplete record that a kill left
_INDEX = 8  # bytes of an entry before its kind
_CHECKPOINT = bytes([len(Checkpoint.TAG)]) + Checkpoint.TAG.encode()  # the kind, as an entry has it
_LARGEST_CHECKPOINT = 2 * Checkpoint.LIMIT  # bytes of an entry with a checkpoint, at most
INTERRUPTED = "interrupted"  # why a round was aborted that was under way when the process ended


@dataclass(frozen=True, slots=True)
class Transcripts:
    """The transcripts in a folder.

    Args:
        folder: Created when the first session begins.
        key: The coordinator's; signs the checkpoints.
        root: The authority that certified the devices.
        keep_vectors: Keep every masked vector too, so that an auditor can recompute the sums.
    """

    folder: Path
    key: IdentityKey
    root: Root
    keep_vectors: bool

    def begin(self, offer: bytes, newest: AdapterId, revoked: RevocationList | None = None) -> Recorder:
        """Start the log of a session, and close the one before.

        Args:
            offer: Digest of the session's offer.
            newest: The adapter that the session starts from: the newest in the registry.
            revoked: The revocation list that the session applies.

        Raises:
            TrustError: The log of the session before was altered.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        storage.replace(self.folder / AUTHORITY, self.root.to_pem(), PUBLIC)
        if revoked is not None:
            storage.replace(self.folder / REVOKED, revoked.to_pem(), PUBLIC)
        storage.replace(self.folder / COORDINATOR, self.key.public.to_pem(), PUBLIC)
        vectors = self.folder / VECTORS if self.keep_vectors else None
        if vectors:
            vectors.mkdir(exist_ok=True)
        previous = self.finish(newest)
        number = max(map(log_number, logs(self.folder)), default=0) + 1
        recorder = Recorder(self.folder / log_name(number), Transcript(offer, newest, previous), self.key, vectors)
        recorder.write(MAGIC)
        storage.sync(self.folder)
        return recorder

    def session_chain_proofs(self, recorder: Recorder, last_offers: Mapping[str, bytes]) -> dict[str, bytes]:
        """For each device the proof that the new session continues the log of the session that the device joined last.

        It travels in the same message as the offer.

        Args:
            recorder: Of the new session.
            last_offers: Device → digest of the offer that it joined last, as it says; empty where it joined none.
        """
        wanted, closed, found = set(last_offers.values()) - {b""}, list[bytes](), dict[str, bytes]()
        for path in reversed([path for path in logs(self.folder) if path != recorder.path]):
            if not wanted:
                break
            offer, last = _ends(path)
            if offer in wanted:
                wanted.remove(offer)
                devices = [device for device, digest in last_offers.items() if digest == offer]
                end = Checkpoint.decode(envelope.unverified_body(last)).newest
                log = transcript.resume(transcript.read(path.read_bytes()).entries, end)
                proofs = receipts(log, devices)
                found |= {
                    device: session_chain_proof(recorder.log, self.key, proofs[device], closed) for device in devices
                }
            closed.insert(0, last)
        return {device: found.get(device) or session_chain_proof(recorder.log, self.key) for device in last_offers}

    def finish(self, newest: AdapterId) -> bytes:
        """Close the last log if it is open, as far as it is on the disk. Returns the digest of its last checkpoint.

        Args:
            newest: The newest adapter in the registry.

        Raises:
            TrustError: The log was altered.
        """
        previous = NO_SESSION
        for path in logs(self.folder)[-2:]:  # only the last one can be open, and it may need to name the one before
            previous = _finish(path, self.key, newest, previous)
        return previous


def _finish(path: Path, key: IdentityKey, newest: AdapterId, previous: bytes) -> bytes:
    """The digest of a log's last checkpoint. Closes a log that a kill left open, and removes one without entries.

    Args:
        path: Of the log.
        key: The coordinator's.
        newest: The adapter that a session without a checkpoint, and so without a result, starts from.
        previous: Digest of the last checkpoint of the log before; the result where this log has no entries.
    """
    raw = path.read_bytes()
    reading = transcript.read(raw)
    if reading.problem:
        if _holds_checkpoint(raw[reading.end :], key.public):
            raise _altered(path, reading.problem)
        path.with_suffix(TORN).write_bytes(raw[reading.end :])
        os.truncate(path, reading.end)
    if not reading.entries:
        path.unlink()
        return previous
    intact = replace(reading, problem="")
    try:
        found = checkpoints(intact, key.public, unfinished=True)
    except Problem as problem:
        raise _altered(path, problem) from None
    if not found or found[-1].stage is not Stage.CLOSED:
        start = found[0].newest if found else newest
        recorder = Recorder(path, transcript.resume(intact.entries, start, previous), key)
        if recorder.log.plan is not None:
            recorder.write(recorder.log.ended(key, Abort(recorder.log.plan, INTERRUPTED)))
        recorder.checkpoint(Stage.CLOSED)
        found = checkpoints(transcript.read(path.read_bytes()), key.public, unfinished=False)
    return found[-1].digest()


def _holds_checkpoint(rest: bytes, coordinator: PublicKey) -> bool:
    """Whether the unreadable rest of a log holds a complete checkpoint. A kill damages only the last record."""
    for found in re.finditer(re.escape(_CHECKPOINT), rest):
        start = max(found.start() - _INDEX, 0)
        for end in range(start, min(start + _LARGEST_CHECKPOINT, len(rest)) + 1):  # its length may be what is damaged
            with suppress(ProtocolError):
                envelope.open_verified(Checkpoint, ENTRY.decode(rest[start:end]).message, coordinator, "")
                return True
    return False


def _altered(path: Path, problem: object) -> TrustError:
    return TrustError(
        f"{path} was altered after it was written ({problem}): find out why, and move it away", about=path.name
    )


def _ends(path: Path) -> tuple[bytes, bytes]:
    """Digest of the offer, and the last checkpoint as signed, of a closed log. Reads only the first and last entry.

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
            raise _altered(path, error) from None


def _entry(file: BinaryIO, start: int, size: int) -> Entry:
    file.seek(start)
    return ENTRY.decode(file.read(size))
