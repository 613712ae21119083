"""The log of a repository of channels: a signed record of each thing that was done, chained to the previous one.

::

    DIR/log/N.json     the record of action N, from 1 (a DSSE envelope)

Each action signs a new snapshot, and the snapshot names the newest record by number and digest. So the log has the
protection that TUF gives to metadata: a record cannot be altered, removed or moved, nor the end of the log cut off,
without the key of the snapshot. The records name all metadata that they signed, so nothing is done without one;
``edgeadapt.releases.history`` checks that. The log is not served: it says which releases were refused, and why."""

import getpass
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field
from tuf.api.metadata import Snapshot

from aggregation.errors import DataError
from edgeadapt.formats.jsontext import Exact
from edgeadapt.formats.manifest import Count, Manifest, Sha256
from edgeadapt.formats.release import Rollout
from edgeadapt.releases.drift import JudgedDrift
from edgeadapt.releases.verdict import Figure, JudgedEvaluation

LOG = "log"  # folder
HEAD = "x-edgeadapt-log"  # field of the snapshot
# What was done; "refuse" is a promotion that a gate refused, "evaluate" a verdict after which the release stayed.
Making = Literal["publish", "promote", "refuse", "rollout", "evaluate", "rollback"]
Kind = Literal["init", "add", "protect", "unprotect", "renew", "rotate"] | Making
Text = Annotated[str, Field(max_length=1000)]


@dataclass(frozen=True, slots=True)
class GateResult(Exact):
    gate: Text
    passed: bool  # it lets the release pass
    measured: Figure | None  # the figure; None if it could not be measured, which never passes
    limit: Figure | None  # what it was held to; None if that could not be determined
    text: Text  # for a person: what was measured on how much, or why it could not be


@dataclass(frozen=True, slots=True)
class Action(Exact):
    """Says what was done.

    Args:
        subject: The channel; of ``rotate`` the role; None if it concerns all.
        source: The channel that a promotion is from.
        release: Number of the release that it made or rolls out in ``subject``, or of ``source`` that was refused.
        again: The earlier release that a rollback published again.
        evaluation: A prepared rollback was published for it, or the release stayed after it.
        drift: A prepared rollback was published for it.
    """

    kind: Kind
    subject: Text | None = None
    source: Text | None = None
    release: Count | None = None
    sha256: Sha256 | None = None
    adapters: dict[Text, Count] | None = None
    again: Count | None = None
    gates: tuple[GateResult, ...] = ()
    rollout: Rollout | None = None
    evaluation: JudgedEvaluation | None = None
    drift: JudgedDrift | None = None


@dataclass(frozen=True, slots=True)
class ActionRecord(Manifest):
    """Records an action, signed by the key of snapshot and timestamp."""

    NAME: ClassVar[str] = "action-record"

    number: Count  # from 1
    previous: Sha256 | None  # digest of the previous signed record; None for the first
    made: Annotated[str, Field(max_length=40)]  # when, ISO 8601
    by: Annotated[str, Field(max_length=100)]  # login name, as the machine states it; empty: not stated
    metadata: dict[Text, Count]  # role → the version that the action signed; of root always, the one then in force
    action: Action


@dataclass(frozen=True, slots=True)
class LogHead:
    """Names the newest record, as a snapshot does; number 0 and no digest before the first."""

    number: int
    sha256: str | None

    @classmethod
    def of(cls, snapshot: Snapshot) -> Self:
        """Read what a snapshot says. Raises DataError if that is not the head of a log."""
        head = snapshot.unrecognized_fields.get(HEAD, {"number": 0, "sha256": None})
        match head:
            case {"number": int(number), "sha256": str() | None as digest} if len(head) == 2 and number >= 0:
                return cls(number, digest)
        raise DataError(f"{HEAD} of the snapshot is damaged: restore the repository", about=HEAD)

    def put(self, snapshot: Snapshot) -> None:
        snapshot.unrecognized_fields[HEAD] = {"number": self.number, "sha256": self.sha256}


def login_name() -> str:
    """Name who runs this process, for ``ActionRecord.by``."""
    try:
        return getpass.getuser()[:100]
    except (KeyError, OSError):  # a container's user without an entry
        return f"user {os.getuid()}"


def action_path(folder: Path, number: int) -> Path:
    return folder / LOG / f"{number}.json"


def digest_of(signed: bytes) -> str:
    """Return the digest by which a record names the previous one, and the snapshot the newest (SHA-256, hex)."""
    return hashlib.sha256(signed).hexdigest()
