"""The transcript in the database of a registry that several machines share (docs/decisions/0074).

There the table is the log, and the files of ``transcript/`` on each machine are a copy of it: a leader appends to the
table first, in a transaction that its epoch fences, and one that waits copies what was added. So readers of logs read
files, as with a registry of one machine. Nothing is verified here."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.dialects.postgresql import insert as insert_once

from aggregation.errors import DataError, TrustError
from coordinator.registry import database
from coordinator.registry.lease import fenced
from edgeadapt.auditing.transcripts import log_name, log_number, logs
from edgeadapt.formats import storage
from edgeadapt.formats.registryfiles import REVOKED
from edgeadapt.formats.storage import LARGEST, PUBLIC

LONGEST = 2**24  # bytes of a row
LOOK = 0.1  # seconds between two polls of a copy that another process makes


@dataclass(frozen=True, slots=True)
class TranscriptTable:
    engine: Engine
    epoch: int | None = None

    def require_lead(self) -> None:
        """Check that the coordinator of this epoch leads. Raises EdgeAdaptError, also if the database failed."""
        with fenced(self.engine, self.epoch):
            pass

    def append(self, session: int, start: int, records: bytes) -> None:
        """Add to a session's log (from 1), which has ``start`` bytes. After the return, records survive a power cut.
        Raises DataError: the log has another size. Raises EdgeAdaptError: another coordinator leads, or the database
        failed."""
        table = database.transcript
        last = select(table.c.start + func.length(table.c.records)).where(table.c.session == session)
        with fenced(self.engine, self.epoch) as connection:
            size = connection.scalar(last.order_by(table.c.start.desc()).limit(1)) or 0
            if size != start:
                text = f"the log of session {session} has {size} bytes, and records for byte {start} came: nothing was"
                raise DataError(f"{text} changed", about="transcript")
            connection.execute(table.insert(), _rows(session, start, records))

    def revocations(self) -> bytes | None:
        """Read the newest revocation list of any coordinator, PEM, not verified. Raises as ``database.explained``."""
        with database.explained(self.engine), self.engine.connect() as connection:
            return connection.scalar(select(database.revocations.c.pem))

    def offer_revocations(self, pem: bytes, seen: bytes | None) -> None:
        """Keep a list that is newer than ``seen``, unless another one has taken its place meanwhile. It takes no lease:
        the authority signs and numbers lists, so any coordinator may spread the newest. Raises as
        ``database.explained``."""
        table = database.revocations
        with database.explained(self.engine), self.engine.begin() as connection:
            if seen is None:
                values = {"id": database.ONLY_ROW, "pem": pem}
                connection.execute(insert_once(table).values(values).on_conflict_do_nothing())
            else:
                connection.execute(table.update().where(table.c.pem == seen).values(pem=pem))

    def sizes(self) -> dict[int, int]:
        """Map each session to the bytes of its log."""
        table = database.transcript
        query = select(table.c.session, func.sum(func.length(table.c.records))).group_by(table.c.session)
        with database.explained(self.engine), self.engine.connect() as connection:
            return {session: int(size) for session, size in connection.execute(query)}

    def log(self, session: int) -> bytes:
        """Read the log of a session. Raises DataError: it is larger than what is read of a file."""
        table = database.transcript
        query = select(table.c.records).where(table.c.session == session).order_by(table.c.start)
        length = select(func.sum(func.length(table.c.records))).where(table.c.session == session)
        with database.explained(self.engine), self.engine.connect() as connection:
            if (size := int(connection.scalar(length) or 0)) > LARGEST:
                raise DataError(f"the log of session {session} has {size:,} bytes", about="transcript")
            return b"".join(connection.scalars(query))

    def await_copy(self, folder: Path, seconds: float) -> None:
        """Wait, at most ``seconds``, until another process has copied what the table has now. Raises as ``sizes``."""
        wanted, end = self.sizes(), time.monotonic() + seconds
        while any(_sizes(folder).get(session, 0) < size for session, size in wanted.items()):
            if time.monotonic() > end:
                return
            time.sleep(LOOK)

    def copy_to(self, folder: Path, *, whole: bool = False) -> None:
        """Add what the files in a folder lack. One process at a time writes to them.

        A power cut may leave other bytes in the file that was written last. It is copied again once the table has a
        later session, or in any case if ``whole``; an earlier file does not change any more. Raises TrustError: a file
        has what the table does not have. Raises EdgeAdaptError: as ``database.explained``; or the folder cannot be
        written to."""
        pem = self.revocations()
        sizes, here = self.sizes(), _sizes(folder)
        newest = max(here, default=0)
        for session, size in here.items():
            if size > sizes.get(session, 0) and not (whole and session == newest and session in sizes):
                text = f"{folder / log_name(session)} has more than the database: restore both from one copy"
                raise TrustError(text, about="transcript")
        if sizes:
            folder.mkdir(parents=True, exist_ok=True)
        for session in sorted(sizes):
            anew = session == newest and (whole or newest < max(sizes))
            size = 0 if anew else here.get(session, 0)
            if size != sizes[session]:
                self._copy(session, size, folder / log_name(session))
        if sizes and pem is not None and (not (folder / REVOKED).exists() or storage.read(folder / REVOKED) != pem):
            storage.replace(folder / REVOKED, pem, PUBLIC)

    def _copy(self, session: int, size: int, path: Path) -> None:
        table = database.transcript
        end = table.c.start + func.length(table.c.records)
        query = select(table.c.start, table.c.records).where(table.c.session == session, end > size)
        with storage.naming(path), path.open("ab") as file:
            os.truncate(path, size)
            with database.explained(self.engine), self.engine.connect() as connection:
                rows = connection.execution_options(yield_per=1).execute(query.order_by(table.c.start))
                for start, records in rows:
                    file.write(records[size - start :])
                    size = start + len(records)
            storage.flush(file)


def _sizes(folder: Path) -> dict[int, int]:
    return {log_number(path): path.stat().st_size for path in logs(folder)}


def insert(connection: Connection, folder: Path) -> None:
    """Put the logs in a folder, and its revocation list, into tables without any. Raises DataError for a large log."""
    for path in logs(folder):
        if rows := _rows(log_number(path), 0, storage.read(path)):
            connection.execute(database.transcript.insert(), rows)
    if (folder / REVOKED).exists():
        row = {"id": database.ONLY_ROW, "pem": storage.read(folder / REVOKED)}
        connection.execute(database.revocations.insert().values(row))


def _rows(session: int, start: int, records: bytes) -> list[dict[str, int | bytes]]:
    return [
        {"session": session, "start": start + at, "records": records[at : at + LONGEST]}
        for at in range(0, len(records), LONGEST)
    ]
