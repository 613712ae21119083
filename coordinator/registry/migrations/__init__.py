"""Bring an older registry to the schema of this edgeadapt, with alembic (docs/decisions/0062). ``versions`` has a file
for each revision. ``coordinator.registry.database`` describes the newest one, from which a new registry is made; a test
holds both equal."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.engine import URL

from aggregation.errors import ConfigError
from coordinator.registry import database, transcripttable
from edgeadapt.auditing.transcripts import logs
from edgeadapt.formats.registryfiles import SCHEMA, SCHEMAS, require_schema
from edgeadapt.formats.registrystores import shown

CONNECTION = "connection"  # attribute of a configuration, which ``env.py`` reads


def upgrade(url: str | URL, transcript: Path | None = None) -> str:
    """Bring a registry to the newest revision, all or nothing: a failure leaves it as it was.

    ``transcript``: folder of the logs, which a database in PostgreSQL of revision 2 or older does not have. Returns the
    revision that it had. Raises ConfigError: it is newer than this edgeadapt, the database does not have a registry,
    the folder does not have a log of its rounds, or as ``database.connect``."""
    engine = database.engine_of(url)
    try:
        with database.explained(engine), engine.begin() as connection:
            before = database.revision(connection)
            if before is None:
                raise ConfigError(f"{shown(engine.url)} has no registry", about="database")
            if before == SCHEMA:
                return before
            if not before.isdecimal() or int(before) > int(SCHEMA):
                require_schema(before, shown(engine.url))
            config = configuration(connection)
            if MigrationContext.configure(connection, opts={"version_table": SCHEMAS}).get_current_revision() is None:
                command.stamp(config, before)
            command.upgrade(config, "head")
            if transcript is not None and engine.dialect.name == "postgresql":
                if not logs(transcript) and connection.execute(database.rounds.select().limit(1)).first() is not None:
                    text = f"{shown(engine.url)} has rounds, and {transcript} has no log of them: upgrade it on the"
                    raise ConfigError(f"{text} machine whose coordinator ran them", about="transcript")
                transcripttable.insert(connection, transcript)
            return before
    finally:
        engine.dispose()


def configuration(connection: Connection) -> Config:
    """Configure alembic for a connection, whose transaction has all that is done."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes[CONNECTION] = connection
    return config
