"""Writes the log of one session, and keeps the masked vectors where the settings ask for that.

Records are appended, and synced to the disk before the coordinator sends its next message: that message tells a device
that its answer arrived, and the device later demands a proof that the log holds the answer.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters import storage
from adapters.storage import PUBLIC
from aggregation import transcript
from aggregation.messages import Plan
from aggregation.pki.identity import IdentityKey
from aggregation.server import AbortReason, RoundResult
from aggregation.steps import Step
from aggregation.transcript import Abort, Result, Stage, Transcript
from coordinator.audit.transcripts import vector_path


@dataclass(slots=True)
class Recorder:
    """Writes the log of one session."""

    path: Path
    log: Transcript
    key: IdentityKey
    vectors: Path | None = None

    def begin(self, plan: Plan) -> None:
        """Begin the round of ``plan``."""
        self.log.begin(plan)

    def sent(self, step: Step, bodies: Mapping[str, bytes]) -> None:
        """Record what the coordinator sends: device → body."""
        self.write(self.log.sent(step, bodies), sync=True)

    def received(self, step: Step, device: str, body: bytes) -> None:
        """Record a device's answer, which was accepted."""
        self.write(self.log.received(step, device, body))
        if self.vectors is not None and step is Step.PLAN:
            vector = transcript.packed_vector(body)
            storage.replace(vector_path(self.vectors, hashlib.sha256(vector).digest()), vector, PUBLIC)

    def result(self, result: RoundResult, version: int, adapter: str) -> None:
        """End the round under way: with this sum, and the adapter (its SHA-256) that it produced."""
        if self.log.plan is not None:
            self._end(Result(self.log.plan, result.survivors, result.digest, version, adapter))

    def abort(self, reason: AbortReason) -> None:
        """End the round under way, if there is one, without an adapter."""
        if self.log.plan is not None:
            self._end(Abort(self.log.plan, reason.value))

    def _end(self, ending: Result | Abort) -> None:
        self.write(self.log.ended(self.key, ending), sync=True)

    def checkpoint(self, stage: Stage = Stage.OPEN) -> None:
        """Sign the log so far."""
        self.write(self.log.checkpoint(self.key, stage), sync=True)

    def write(self, records: bytes, *, sync: bool = False) -> None:
        """Append. After the return the records survive a kill of the process, and with ``sync`` also a power cut."""
        with self.path.open("ab") as file:
            file.write(records)
            file.flush()
            if sync:
                os.fsync(file.fileno())
