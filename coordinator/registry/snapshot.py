"""All rows of a registry at one moment: what a backup holds, whichever database they are from and whichever they go to.

Nothing is verified here; ``Registry`` does that when it reads them.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Engine, Table

from aggregation.errors import ConfigError
from coordinator.registry import database, transcripttable
from edgeadapt.formats.registrystores import shown

LENGTH = 8  # bytes before each value that the digest covers


@dataclass(frozen=True, slots=True)
class RegistrySnapshot:
    """Rows of each table, in the order of its primary key."""

    rows: dict[str, tuple[dict[str, Any], ...]] = field(repr=False)

    @classmethod
    def read(cls, engine: Engine) -> Self:
        """Read all tables in one transaction, while a coordinator may write. Raises as ``database.explained``."""
        with database.explained(engine), engine.connect() as connection:
            if engine.dialect.name == "postgresql":  # by default each statement would see a moment of its own
                connection = connection.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
            with connection.begin():
                rows = {
                    table.name: tuple(
                        dict(row) for row in connection.execute(table.select().order_by(*table.primary_key)).mappings()
                    )
                    for table in _tables()
                }
        return cls(rows)

    def insert(self, engine: Engine, transcript: Path | None = None) -> None:
        """Put all rows, all or none, into a registry without any; the logs in ``transcript`` too, if it takes logs.

        Raises:
            ConfigError: It has some.
            EdgeAdaptError: As ``database.explained``.
        """
        with database.explained(engine), engine.begin() as connection:
            for table in _tables():
                if connection.execute(table.select().limit(1)).first() is not None:
                    text = f"{shown(engine.url)} has a registry already: name a new database"
                    raise ConfigError(text, about="database")
                if rows := self.rows[table.name]:
                    connection.execute(table.insert(), list(rows))
            if transcript is not None:
                transcripttable.insert(connection, transcript)

    def digest(self) -> str:
        """SHA-256 (hex) of every value, each after its length, and of the number of rows of each table."""
        state = hashlib.sha256()
        for table in _tables():
            rows = self.rows[table.name]
            state.update(len(rows).to_bytes(LENGTH, "big"))
            for value in (row[column.name] for row in rows for column in table.columns):
                raw = value if isinstance(value, bytes) else str(value).encode()
                state.update(len(raw).to_bytes(LENGTH, "big") + raw)
        return state.hexdigest()


def _tables() -> tuple[Table, ...]:
    return database.versions, database.rounds, database.optimizer
