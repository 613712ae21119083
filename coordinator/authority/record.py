"""What the authority did, in one file that only grows: a line of JSON for each certificate, revocation and list.

A line counts once it is whole and on the disk, and nothing is handed out before. A kill can leave half a line at the
end; that event did not happen, and the next writer cuts it off. Writers take turns by a lock file.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from adapters.storage import locked
from aggregation.errors import DataError
from aggregation.pki.revocation import Reason

Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{1,40}$")]


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    at: datetime


class Issued(_Event):
    """A certificate. ``key`` is the id of the certified key; ``certificate`` is DER in base 64."""

    event: Literal["issued"] = "issued"
    name: str
    serial: Hex
    key: str
    not_before: datetime
    not_after: datetime
    certificate: str


class Revoked(_Event):
    """A certificate that counts no longer."""

    event: Literal["revoked"] = "revoked"
    serial: Hex
    reason: Reason


class Listed(_Event):
    """A revocation list was signed, with all revocations so far."""

    event: Literal["listed"] = "listed"
    number: int
    until: datetime


Event: TypeAlias = Annotated[Issued | Revoked | Listed, Field(discriminator="event")]
_EVENT: TypeAdapter[Issued | Revoked | Listed] = TypeAdapter(Event)


@dataclass(frozen=True, slots=True)
class AuthorityRecord:
    """The file at ``path``."""

    path: Path

    def read(self) -> "tuple[Issued | Revoked | Listed, ...]":
        """All that happened, in order.

        Raises:
            DataError: A line that is whole is damaged.
        """
        return self._events(self.path.read_bytes())

    @contextmanager
    def writing(self) -> Iterator["RecordWriter"]:
        """What happened so far, and the means to add to it; others that write wait.

        Raises:
            DataError: As ``read``.
        """
        with locked(self.path.with_suffix(".lock")), self.path.open("r+b") as file:
            raw = file.read()
            whole = raw.rfind(b"\n") + 1
            if whole < len(raw):
                file.truncate(whole)
            file.seek(whole)
            yield RecordWriter(file, list(self._events(raw)))

    def _events(self, raw: bytes) -> "tuple[Issued | Revoked | Listed, ...]":
        events = []
        for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), 1):
            try:
                events.append(_EVENT.validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                raise DataError(f"{self.path}, line {number} is damaged: {first['msg']}") from None
        return tuple(events)


@dataclass(slots=True)
class RecordWriter:
    """A record while it is locked."""

    file: BinaryIO
    events: "list[Issued | Revoked | Listed]"

    def add(self, event: Issued | Revoked | Listed) -> None:
        """Write an event. After the return it has happened, whatever becomes of this process or machine."""
        line = json.dumps(event.model_dump(mode="json"), ensure_ascii=True) + "\n"
        self.file.write(line.encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.events.append(event)
