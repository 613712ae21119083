"""What the authority did, in one file that only grows: a line of JSON for each certificate, revocation and list. A line
counts once it is complete and on the disk, and nothing is handed out before that. A kill can leave an incomplete line
at the end, which did not happen: the next writer removes it. Writers wait for each other."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from aggregation.errors import DataError
from aggregation.pki.revocation import Reason
from edgeadapt.formats.storage import locked, read

Token = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Serial = Annotated[str, Field(pattern=r"^[0-9a-f]{1,40}$")]


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    at: datetime


class Purpose(Enum):
    IDENTITY = "identity"
    DEVICE_TLS = "device-tls"  # in records of before 2026-12: light devices had TLS keys
    GATEWAY_TLS = "gateway-tls"


class CertificateIssued(_Line):
    """Records a certificate. ``key`` is the id of the certified key; ``certificate`` is DER in base 64."""

    event: Literal["issued"] = "issued"
    name: str
    serial: Serial
    key: str
    not_before: datetime
    not_after: datetime
    certificate: str
    purpose: Purpose = Purpose.IDENTITY


class CertificateRevoked(_Line):
    event: Literal["revoked"] = "revoked"
    serial: Serial
    reason: Reason


class ListSigned(_Line):
    """Records a revocation list, with what ``rules.listed_revocations`` returned."""

    event: Literal["list"] = "list"
    number: int
    next_update: datetime


class InvitationIssued(_Line):
    """Lets a device enrol over a network until ``expires``. ``token``: public half of the invitation's key, hex."""

    event: Literal["invited"] = "invited"
    name: str
    token: Token
    expires: datetime


class InvitationUsed(_Line):
    """Binds an invitation to the key that it was used for. ``tls_key``: as ``DEVICE_TLS``."""

    event: Literal["used"] = "used"
    token: Token
    key: str
    tls_key: str | None = None


Event: TypeAlias = CertificateIssued | CertificateRevoked | ListSigned | InvitationIssued | InvitationUsed
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])


@dataclass(frozen=True, slots=True)
class AuthorityRecord:
    path: Path

    def read(self) -> tuple[Event, ...]:
        """Read all events, in order. Raises DataError if a complete line is damaged."""
        return self._events(read(self.path))

    @property
    def state(self) -> tuple[int, int]:
        """Return size and time of the file: they change with each event."""
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns

    def invitations(self) -> frozenset[str]:
        """Return the tokens of all invitations: also of those that have expired or were used. Raises as ``read``."""
        return frozenset(event.token for event in self.read() if isinstance(event, InvitationIssued))

    @contextmanager
    def writing(self) -> Iterator["RecordWriter"]:
        """Hold the record's lock, and yield a writer. Raises as ``read``."""
        with locked(self.path.with_suffix(".lock")), self.path.open("r+b") as file:
            raw = file.read()
            events, complete = self._events(raw), raw.rfind(b"\n") + 1
            file.truncate(complete)
            file.seek(complete)
            yield RecordWriter(file, list(events))

    def _events(self, raw: bytes) -> tuple[Event, ...]:
        events = []
        for number, line in enumerate(raw[: raw.rfind(b"\n") + 1].splitlines(), 1):
            try:
                events.append(_EVENT.validate_json(line))
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                text = f"{self.path}, line {number} is damaged ({reason}): restore the file from a backup"
                raise DataError(text, about=self.path.name) from None
        return tuple(events)


@dataclass(slots=True)
class RecordWriter:
    file: BinaryIO
    events: list[Event]

    def add(self, event: Event) -> None:
        """Write an event. After the return it survives a kill and a power cut."""
        line = json.dumps(event.model_dump(mode="json"), ensure_ascii=True) + "\n"
        self.file.write(line.encode())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.events.append(event)
