"""The transcripts of a coordinator: one log for each session, for ``edgeadapt audit`` to check later.

``edgeadapt.audit.transcripts`` names the files, ``coordinator.recorder`` writes a log. A kill can leave the last
record incomplete, and a power cut can leave zeros in the last ones. The next start moves such a rest to a file with the
suffix ``.torn``, ends the round that was under way as the registry says, and closes the log. A log that lacks what the
registry knows is not signed again.
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from aggregation import envelope, transcript
from aggregation.errors import EdgeAdaptError, ProtocolError, TrustError
from aggregation.messages import Offer
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import RevocationList
from aggregation.transcript import (
    ENTRY,
    LENGTH,
    MAGIC,
    MAX_SESSIONS,
    NO_SESSION,
    Checkpoint,
    Entry,
    Transcript,
    receipts,
    session_chain_proof,
)
from coordinator.recorder import Recorder
from coordinator.registry import Head, TranscriptTable
from coordinator.storedlog import StoredLog, altered, require_agreement
from edgeadapt.audit.transcripts import VECTORS, log_name, log_number, logs
from edgeadapt.formats import storage
from edgeadapt.formats.registryfiles import AUTHORITY, PUBLIC_KEY, REVOKED
from edgeadapt.formats.roundrecord import RoundRecord
from edgeadapt.formats.storage import PUBLIC

logger = logging.getLogger("edgeadapt.coordinator")
TORN = ".torn"  # suffix of the incomplete record that a kill left


@dataclass(frozen=True, slots=True)
class Transcripts:
    """The transcripts in a folder.

    Args:
        table: Of a registry that machines share: it has the logs then, and ``folder`` a copy.
        ends: Closed log → what ``_ends`` read from it. It does not change any more.
    """

    folder: Path  # created when the first session begins
    key: IdentityKey  # the coordinator's; signs the checkpoints
    root: Root  # the authority that certified the devices
    keep_vectors: bool  # keep every masked vector too, so that an auditor can recompute the sums
    head: Callable[[], Head]  # what the registry knows: its newest adapter and its last round
    table: TranscriptTable | None = None
    ends: dict[Path, tuple[bytes, bytes]] = field(default_factory=dict, repr=False)

    def begin(self, offer: bytes, revoked: RevocationList | None = None) -> Recorder:
        """Start the log of a session, and close the previous one.

        ``offer``: digest of the session's offer; ``revoked``: the revocation list that the session applies. Raises
        TrustError as ``finish``.
        """
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
        newest, previous = self.head().newest, self.finish()
        number = max(map(log_number, logs(self.folder)), default=0) + 1
        log, path = Transcript(offer, newest, previous), self.folder / log_name(number)
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

    def session_chain_proofs(self, recorder: Recorder, last_offers: Mapping[str, bytes]) -> dict[str, bytes]:
        """Prove to each device that the new session continues the log of the session that the device joined last.

        The proof travels in the same message as the offer.

        Args:
            last_offers: Device → digest of the offer that it joined last, as it says; empty where it joined none. One
                that was more than ``MAX_SESSIONS`` sessions ago counts as unknown: no message can name them all. So
                does one before a log that cannot be read.
        """
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
                    log = transcript.resume(transcript.read(storage.read(path)).entries, end)
                    proofs = receipts(log, devices)
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
        that the registry knows must have been found in the logs.

        Raises:
            TrustError: A log was altered, or the logs and the registry contradict each other.
            EdgeAdaptError: Another coordinator leads, or the registry failed.
        """
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
                log.path.with_suffix(TORN).write_bytes(log.rest)
                os.truncate(log.path, log.end)
            if not log.entries:
                log.path.unlink()
        if not held:
            return NO_SESSION
        if held[-1].closed:
            return held[-1].checkpoints[-1].digest()
        previous = held[-2].checkpoints[-1].digest() if len(held) > 1 else NO_SESSION
        recorder = Recorder(held[-1].path, held[-1].resumed(head.newest, previous), self.key, table=self.table)
        return recorder.close(head.round if missing else None)

    def _since(self, record: RoundRecord | None) -> list[StoredLog]:
        """Read the logs from the session of a recorded round on, in order; all logs, where no round is recorded."""
        stored: list[StoredLog] = []
        for path in reversed(logs(self.folder)):
            stored.insert(0, StoredLog.read(path, self.key.public))
            if record is not None and stored[0].offer.hex() == record.offer:
                break
        return stored


def _ends(path: Path) -> tuple[bytes, bytes]:
    """Read the digest of the offer, and the last checkpoint as signed, of a closed log: its first and last entry.

    Raises:
        DataError: It is too large, or not a file.
        TrustError: It was altered.
    """
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
