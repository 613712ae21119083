"""The registry's tables, and a connection whose failures are errors of one line.

SQLite by default, PostgreSQL by URL. ``versions.py`` verifies what the rows hold.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    DateTime,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    create_engine,
    event,
    inspect,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, IntegrityError, SQLAlchemyError

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from edgeadapt.formats.registryfiles import (
    FIRST,
    FIRST_TABLE,
    MANIFEST,
    NOT_TABLES,
    PREFIX,
    RECORD,
    ROUND,
    ROUNDS,
    SCHEMA,
    SCHEMA_COLUMN,
    SCHEMAS,
    SHA256,
    VERSION,
    VERSIONS,
    require_schema,
)
from edgeadapt.formats.registrystores import postgresql_engine, shown

ONLY_ROW = 1  # id in a table of one row
metadata = MetaData()
versions = Table(
    VERSIONS,
    metadata,
    Column(VERSION, BigInteger, primary_key=True, autoincrement=False),
    Column(SHA256, String(64), nullable=False),  # of the blob
    Column(MANIFEST, LargeBinary, nullable=False),  # signed
)
rounds = Table(
    ROUNDS,
    metadata,
    Column(ROUND, BigInteger, primary_key=True, autoincrement=False),
    Column(RECORD, LargeBinary, nullable=False),  # signed
)
optimizer = Table(  # one row
    f"{PREFIX}optimizer",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("tensors", LargeBinary, nullable=False),  # safetensors; the last round's record has the digest
)
# The next three are of a coordinator whose machine may be replaced by another one, in PostgreSQL.
lease = Table(  # one row
    f"{PREFIX}lease",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("epoch", BigInteger, nullable=False),  # how often it was taken
    Column("leader", Text, nullable=False),  # for people
    Column("ends", DateTime(timezone=True), nullable=False),  # by the server's clock
)
transcript = Table(
    f"{PREFIX}transcript",
    metadata,
    Column("session", BigInteger, primary_key=True, autoincrement=False),
    Column("start", BigInteger, primary_key=True, autoincrement=False),  # of the bytes in the session's log
    Column("records", LargeBinary, nullable=False),
)
revocations = Table(  # one row: the newest list that a coordinator has
    f"{PREFIX}revocations",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("pem", LargeBinary, nullable=False),
)
# Alembic's own table is in no metadata of a program. A new database gets it with the others, and alembic is not needed.
schemas = Table(
    SCHEMAS,
    MetaData(),
    Column(SCHEMA_COLUMN, String(32), nullable=False),
    PrimaryKeyConstraint(SCHEMA_COLUMN, name=f"{SCHEMAS}_pkc"),
)


def connect(url: str | URL) -> Engine:
    """Open the database, and create the tables if it has none.

    Raises ConfigError: the URL is not usable, or the database is another program's, or has another schema. Raises
    DataError: the file is not a database, is damaged, or has a view or trigger. Raises EdgeAdaptError: the database
    cannot be reached, created or written to.
    """
    engine = engine_of(url)
    with explained(engine), engine.begin() as connection:
        if revision(connection) is None:
            metadata.create_all(connection)
            schemas.create(connection)
            connection.execute(schemas.insert().values({SCHEMA_COLUMN: SCHEMA}))
        else:
            require_schema(revision(connection), shown(engine.url))
    return engine


def engine_of(url: str | URL) -> Engine:
    """Connect to the database when a connection is needed. Raises as ``connect``."""
    try:
        parsed = make_url(url)
        engine = postgresql_engine(parsed) if parsed.get_backend_name() == "postgresql" else create_engine(parsed)
    except (ArgumentError, ImportError) as error:
        raise ConfigError(
            f"the registry's database address is not usable: {_line(error)}", about="database.url"
        ) from error
    if engine.dialect.name == "sqlite":
        _prepare_sqlite(engine, parsed)
    return engine


def revision(connection: Connection) -> str | None:
    """Read the revision of the database's schema; None for an empty database. Raises as ``connect``."""
    name = shown(connection.engine.url)
    tables = inspect(connection).get_table_names()
    if tables and not any(table.startswith(PREFIX) for table in tables):
        raise ConfigError(
            f"{name} is another program's database (it has a table {tables[0]!r}): name a new one", about="database"
        )
    if connection.dialect.name == "sqlite" and (other := connection.exec_driver_sql(NOT_TABLES).scalar()):
        raise DataError(f"{name} is damaged ({other!r} is not a table): restore it from a copy", about="database")
    if FIRST_TABLE in tables:
        return FIRST
    stored = connection.scalar(select(schemas.c[SCHEMA_COLUMN])) if SCHEMAS in tables else None
    if stored is None and any(table.startswith(PREFIX) for table in tables):
        raise DataError(f"{name} is damaged (it has no revision): restore it from a copy", about="database")
    return stored


@contextmanager
def explained(engine: Engine) -> Iterator[None]:
    """Turn a failure of the database into an error of one line. The transaction has been rolled back."""
    name = f"registry database {shown(engine.url)}"
    try:
        yield
    except IntegrityError as error:
        raise DataError(
            f"{name}: this round or version is already stored (by another coordinator?); nothing was changed",
            about="database",
        ) from error
    except DBAPIError as error:
        reason = _line(error.orig)
        if type(error) is DatabaseError:  # its subclasses are about the disk, the network or the statement
            raise DataError(
                f"{name} is damaged or not a database ({reason}): restore it from a copy", about="database"
            ) from error
        # A connection that is lost while it commits does not say whether the server did. A start compares with the log.
        outcome = "start again" if error.connection_invalidated else "nothing was changed"
        raise EdgeAdaptError(f"{name}: {reason}; {outcome}", about="database") from error
    except SQLAlchemyError as error:
        raise EdgeAdaptError(f"{name}: {_line(error)}; nothing was changed", about="database") from error
    except UnicodeDecodeError as error:  # sqlite quotes a name that it did not find, and the name is damaged
        raise DataError(f"{name} is damaged: restore it from a copy", about="database") from error


def _prepare_sqlite(engine: Engine, url: URL) -> None:
    if url.database and url.database != ":memory:" and not url.database.startswith("file:"):
        folder = Path(url.database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EdgeAdaptError(
                f"folder {folder} cannot be created: {error.strerror or error}", about="database"
            ) from error
    event.listen(engine, "connect", _configure)
    event.listen(engine, "begin", _begin)


def _configure(connection: Any, _: object) -> None:
    # Python's sqlite3 begins a transaction late and not for every statement; now ``_begin`` begins each one.
    connection.isolation_level = None
    # Also after a power cut a committed round stays: its ending is logged next, and a log that knows more than the
    # registry stops the coordinator. FULL, the default, does not sync the folder from which the journal was deleted; a
    # journal that reappears is rolled back.
    connection.execute("PRAGMA synchronous = EXTRA")


def _begin(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN")


def _line(error: object) -> str:
    return " ".join(str(error).split())
