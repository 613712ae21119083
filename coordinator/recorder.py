"""Writes the log of one session as it goes, and keeps the masked vectors where the operator wants them.

Records are appended whole, and synced to the disk before the next question goes out: from it a device learns that its
answer arrived, and demands later that the answer is in the log.
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
        """A round begins."""
        self.log.begin(plan)

    def sent(self, step: Step, bodies: Mapping[str, bytes]) -> None:
        """The coordinator asks. Device → body."""
        self.write(self.log.sent(step, bodies), sync=True)

    def received(self, step: Step, device: str, body: bytes) -> None:
        """A device answered, and the answer was found good."""
        self.write(self.log.received(step, device, body))
        if self.vectors is not None and step is Step.PLAN:
            vector = transcript.packed_vector(body)
            storage.replace(vector_path(self.vectors, hashlib.sha256(vector).digest()), vector, PUBLIC)

    def result(self, result: RoundResult, version: int, adapter: str) -> None:
        """The round under way made this sum, and the sum this adapter (its SHA-256)."""
        if self.log.plan is not None:
            self._end(Result(self.log.plan, result.survivors, result.digest, version, adapter))

    def abort(self, reason: AbortReason) -> None:
        """The round under way, if one is, ended without an adapter."""
        if self.log.plan is not None:
            self._end(Abort(self.log.plan, reason.value))

    def _end(self, ending: Result | Abort) -> None:
        self.write(self.log.ended(self.key, ending), sync=True)

    def checkpoint(self, stage: Stage = Stage.OPEN) -> None:
        """Sign what is there."""
        self.write(self.log.checkpoint(self.key, stage), sync=True)

    def write(self, records: bytes, *, sync: bool = False) -> None:
        """Append. Afterwards a kill of the process loses nothing, and with ``sync`` neither does a power cut."""
        with self.path.open("ab") as file:
            file.write(records)
            file.flush()
            if sync:
                os.fsync(file.fileno())
