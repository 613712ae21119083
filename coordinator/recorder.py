"""Writes the log of one session, and keeps the masked vectors where the settings ask for that.

Records are synced to the disk before the coordinator sends its next message: that message tells a device that its
answer arrived, and the device later demands a proof that the log holds the answer. With a registry that machines share,
they are appended to a table of its database first, and the file is a copy (``coordinator.registry.transcripttable``).

The end of a round is written to the registry first and to the log second, from the registry's record. A kill in between
leaves a round in the log that is open, and the next start writes its ending (``coordinator.transcripts``).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from aggregation import envelope, transcript
from aggregation.messages import MaskedInput, Plan
from aggregation.pki.identity import IdentityKey
from aggregation.steps import Step
from aggregation.transcript import Abort, Checkpoint, Result, Stage, Transcript
from coordinator.registry import TranscriptTable
from edgeadapt.audit.transcripts import log_number, vector_path
from edgeadapt.formats import storage
from edgeadapt.formats.roundrecord import INTERRUPTED, RoundRecord
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
    """Writes the log of one session."""

    path: Path
    log: Transcript
    key: IdentityKey  # the coordinator's; signs endings and checkpoints
    vectors: Path | None = None  # folder of the masked vectors; None: they are not kept
    table: TranscriptTable | None = None  # where the log is, if machines share it; None: in the file
    _pending: bytes = field(default=b"", repr=False)  # not in the table yet
    _since: float = field(default=0.0, repr=False)  # when the oldest of them came

    def begin(self, plan: Plan) -> None:
        self.log.begin(plan)

    def sent(self, step: Step, bodies: Mapping[str, bytes]) -> None:
        """Record what the coordinator sends: device → body."""
        self.write(self.log.sent(step, bodies), sync=True)

    def received(self, step: Step, device: str, body: bytes) -> None:
        """Record a device's answer, which was accepted. Its vector comes first: no kill leaves a log that lacks one."""
        if self.vectors is not None and step is Step.PLAN:
            header = envelope.unverified_body(transcript.logged_part(step, body))  # was verified when it was accepted
            path = vector_path(self.vectors, MaskedInput.decode(header).vector)
            storage.replace(path, transcript.packed_vector(body), PUBLIC)
        self.write(self.log.received(step, device, body))

    def synced(self) -> Transcript:
        """Return the log once all in it would survive a power cut: a record of the round may then refer to it."""
        self.write(b"", sync=True)
        return self.log

    def end(self, record: RoundRecord) -> None:
        """End the round under way as its record says, which the registry has. A round without a plan has no ending."""
        ending = ending_of(record)
        if ending is not None:
            self.write(self.log.ended(self.key, ending), sync=True)

    def close(self, record: RoundRecord | None) -> bytes:
        """End the log, and interrupt a round without a ``record``. Returns the digest of the last checkpoint."""
        if record is not None:
            self.end(record)
        elif self.log.plan is not None:
            self.write(self.log.ended(self.key, Abort(self.log.plan, INTERRUPTED)))
        elif self.log.tree.size - 1 in {index for index, _ in self.log.endings.values()}:
            self.checkpoint()  # a kill came between the two
        self.checkpoint(Stage.CLOSED)
        last = self.log.checkpoints[max(self.log.checkpoints)]
        return Checkpoint.decode(envelope.unverified_body(last)).digest()

    def checkpoint(self, stage: Stage = Stage.OPEN) -> None:
        self.write(self.log.checkpoint(self.key, stage), sync=True)

    def write(self, records: bytes, *, sync: bool = False) -> None:
        """Append. After the return the records survive a kill of the process, and with ``sync`` also a power cut.

        For a table, a kill is as a power cut: what need not be synced is sent with what follows, in one transaction.
        """
        if self.table is not None:
            now = time.monotonic()
            self._since = self._since if self._pending else now
            self._pending += records
            if not self._pending or not (sync or now - self._since > LONGEST):
                return
            size = self.path.stat().st_size if self.path.exists() else 0
            self.table.append(log_number(self.path), size, self._pending)
            records, self._pending = self._pending, b""
        with self.path.open("ab") as file:
            file.write(records)
            if sync:
                storage.flush(file)
