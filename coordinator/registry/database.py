"""The registry's tables, and a connection whose failures are errors of one line. SQLite by default, PostgreSQL by URL.
``versions.py`` verifies what the rows hold."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, IntegrityError, SQLAlchemyError

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from edgeadapt.formats import registryfiles
from edgeadapt.formats.registrystores import postgresql_engine, shown

ONLY_ROW = 1  # id in a table of one row
metadata = sa.MetaData()
versions = sa.Table(
    registryfiles.VERSIONS,
    metadata,
    sa.Column(registryfiles.VERSION, sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column(registryfiles.SHA256, sa.String(64), nullable=False),  # of the blob
    sa.Column(registryfiles.MANIFEST, sa.LargeBinary, nullable=False),  # signed
)
rounds = sa.Table(
    registryfiles.ROUNDS,
    metadata,
    sa.Column(registryfiles.ROUND, sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column(registryfiles.RECORD, sa.LargeBinary, nullable=False),  # signed
)
optimizer = sa.Table(  # one row
    f"{registryfiles.PREFIX}optimizer",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("tensors", sa.LargeBinary, nullable=False),  # safetensors; the last round's record has the digest
)
# The next three are of a coordinator whose machine may be replaced by another one, in PostgreSQL.
lease = sa.Table(  # one row
    f"{registryfiles.PREFIX}lease",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),  # how often it was taken
    sa.Column("leader", sa.Text, nullable=False),  # for people
    sa.Column("ends", sa.DateTime(timezone=True), nullable=False),  # by the server's clock
)
transcript = sa.Table(
    f"{registryfiles.PREFIX}transcript",
    metadata,
    sa.Column("session", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("start", sa.BigInteger, primary_key=True, autoincrement=False),  # of the bytes in the session's log
    sa.Column("records", sa.LargeBinary, nullable=False),
)
revocations = sa.Table(  # one row: the newest list that a coordinator has
    f"{registryfiles.PREFIX}revocations",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("pem", sa.LargeBinary, nullable=False),
)
# Alembic's own table is in no metadata of a program. A new database gets it with the others, and alembic is not needed.
schemas = sa.Table(
    registryfiles.SCHEMAS,
    sa.MetaData(),
    sa.Column(registryfiles.SCHEMA_COLUMN, sa.String(32), nullable=False),
    sa.PrimaryKeyConstraint(registryfiles.SCHEMA_COLUMN, name=f"{registryfiles.SCHEMAS}_pkc"),
)


def connect(url: str | URL) -> sa.Engine:
    """Open the database, and create the tables if it has none. Raises ConfigError: the URL is not usable, or the
    database is another program's, or has another schema. Raises DataError: the file is not a database, is damaged, or
    has a view or trigger. Raises EdgeAdaptError: the database cannot be reached, created or written to."""
    engine = engine_of(url)
    with explained(engine), engine.begin() as connection:
        if revision(connection) is None:
            metadata.create_all(connection)
            schemas.create(connection)
            connection.execute(schemas.insert().values({registryfiles.SCHEMA_COLUMN: registryfiles.SCHEMA}))
        else:
            registryfiles.require_schema(revision(connection), shown(engine.url))
    return engine


def engine_of(url: str | URL) -> sa.Engine:
    """Connect to the database when a connection is needed. Raises as ``connect``."""
    try:
        parsed = make_url(url)
        engine = postgresql_engine(parsed) if parsed.get_backend_name() == "postgresql" else sa.create_engine(parsed)
    except (ArgumentError, ImportError) as error:
        reason = f"the registry's database address is not usable: {_line(error)}"
        raise ConfigError(reason, about="database.url") from error
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine, parsed)
    return engine


def revision(connection: sa.Connection) -> str | None:
    """Read the revision of the database's schema; None for an empty database. Raises as ``connect``."""
    name = shown(connection.engine.url)
    tables = sa.inspect(connection).get_table_names()
    if tables and not any(table.startswith(registryfiles.PREFIX) for table in tables):
        reason = f"{name} is another program's database (it has a table {tables[0]!r}): name a new one"
        raise ConfigError(reason, about="database")
    if connection.dialect.name == "sqlite" and (other := connection.exec_driver_sql(registryfiles.NOT_TABLES).scalar()):
        raise DataError(f"{name} is damaged ({other!r} is not a table): restore it from a copy", about="database")
    if registryfiles.FIRST_TABLE in tables:
        return registryfiles.FIRST
    query = sa.select(schemas.c[registryfiles.SCHEMA_COLUMN])
    stored = connection.scalar(query) if registryfiles.SCHEMAS in tables else None
    if stored is None and any(table.startswith(registryfiles.PREFIX) for table in tables):
        raise DataError(f"{name} is damaged (it has no revision): restore it from a copy", about="database")
    return stored


@contextmanager
def explained(engine: sa.Engine) -> Iterator[None]:
    """Turn a failure of the database into an error of one line. The transaction has been rolled back."""
    name = f"registry database {shown(engine.url)}"
    try:
        yield
    except IntegrityError as error:
        text = f"{name}: this round or version is already stored (by another coordinator?); nothing was changed"
        raise DataError(text, about="database") from error
    except DBAPIError as error:
        reason = _line(error.orig)
        if type(error) is DatabaseError:  # its subclasses are about the disk, the network or the statement
            text = f"{name} is damaged or not a database ({reason}): restore it from a copy"
            raise DataError(text, about="database") from error
        # A connection that is lost while it commits does not say whether the server did. A start compares with the log.
        outcome = "start again" if error.connection_invalidated else "nothing was changed"
        raise EdgeAdaptError(f"{name}: {reason}; {outcome}", about="database") from error
    except SQLAlchemyError as error:
        raise EdgeAdaptError(f"{name}: {_line(error)}; nothing was changed", about="database") from error
    except UnicodeDecodeError as error:  # sqlite quotes a name that it did not find, and the name is damaged
        raise DataError(f"{name} is damaged: restore it from a copy", about="database") from error


def _prepare_sqlite(engine: sa.Engine, url: URL) -> None:
    if url.database and url.database != ":memory:" and not url.database.startswith("file:"):
        folder = Path(url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"folder {folder} cannot be created: {error.strerror or error}"
            raise EdgeAdaptError(reason, about="database") from error
    sa.event.listen(engine, "connect", _configure)
    sa.event.listen(engine, "begin", _begin)


def _configure(connection: Any, _: object) -> None:
    # Python's sqlite3 begins a transaction late and not for every statement; now ``_begin`` begins each one.
    connection.isolation_level = None
    # Also after a power cut a committed round stays: its ending is logged next, and a log that knows more than the
    # registry stops the coordinator. FULL, the default, does not sync the folder from which the journal was deleted; a
    # journal that reappears is rolled back.
    connection.execute("PRAGMA synchronous = EXTRA")


def _begin(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _line(error: object) -> str:
    return " ".join(str(error).split())
