"""A registry that is not in its state directory: in PostgreSQL by URL, and with its blobs where fsspec finds them.
Addresses have no secret. The password comes from where PostgreSQL's own programs take it: ``PGPASSWORD``,
``PGPASSFILE`` or ``~/.pgpass``."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from edgeadapt.formats.blobs import Blobs
from edgeadapt.formats.dsse import MAX_ENVELOPE
from edgeadapt.formats.registryfiles import (
    DATABASE,
    FIRST,
    FIRST_TABLE,
    REGISTRY,
    SCHEMA_COLUMN,
    SCHEMAS,
    LocalFiles,
    RegistrySettings,
    blob_name,
    require_schema,
)

POSTGRESQL = "postgresql://"
DRIVER = "postgresql+psycopg"
SECRETS = ("password", "sslpassword")  # keys of a URL
# Seconds. A server that answers nothing is an error, and a machine that vanished is noticed.
PATIENCE = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "tcp_user_timeout": 30_000}
LONGEST = 60_000  # milliseconds that a query may take
LARGEST, MOST_ROWS = 2 * MAX_ENVELOPE, 2**20  # bytes of a row, rows


def postgresql_url(address: str) -> URL:
    """Parse a PostgreSQL database's address, as libpq takes it, for SQLAlchemy with psycopg. Raises ConfigError: it is
    another address, or has a password, which the error does not show."""
    form = f"{REGISTRY}: database must be {POSTGRESQL}USER@HOST/NAME"
    if not address.startswith(POSTGRESQL):
        raise ConfigError(form, about="database.url")
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise ConfigError(form, about="database.url") from None
    if url.password is not None or any(key in url.query for key in SECRETS):
        reason = f"{REGISTRY}: database has a password in its address: leave it out, and set PGPASSWORD or PGPASSFILE"
        raise ConfigError(reason, about="database.url")
    if not url.database:
        raise ConfigError(f"{form}: it names no database", about="database.url")
    return url.set(drivername=DRIVER)


def postgresql_engine(url: URL) -> Engine:
    """Make connections to a PostgreSQL database when they are needed.

    To another machine TLS is required, and its certificate must be for the host and of an authority that the system
    trusts. ``sslmode`` and ``sslrootcert`` in the address, or ``PGSSLMODE`` and ``PGSSLROOTCERT``, say otherwise. A
    commit is durable when it returns, whatever the server's default is. Raises ConfigError: psycopg is not installed.
    """
    options: dict[str, Any] = dict(PATIENCE)
    if not is_local(url) and not {"sslmode", "sslrootcert"} & url.query.keys():
        if "PGSSLMODE" not in os.environ:
            options["sslmode"] = "verify-full"
        if "PGSSLROOTCERT" not in os.environ:
            options["sslrootcert"] = "system"
    try:
        # A connection may have been lost since the last round, as when the server was restarted.
        engine = create_engine(url, connect_args=options, pool_pre_ping=True)
    except ImportError as error:
        text = "a registry in PostgreSQL needs psycopg: pip install 'edgeadapt[postgresql]'"
        raise ConfigError(text, about="database.url") from error
    event.listen(engine, "connect", _commit_durably)
    return engine


@dataclass(frozen=True, slots=True)
class RemoteStores(LocalFiles):
    """Reads a registry whose database, blobs or both are elsewhere."""

    engine: Engine | None
    blobs: Blobs | None

    @classmethod
    def open(cls, state_dir: Path, settings: RegistrySettings) -> Self:
        """Open those of a state directory without connecting. Raises as ``postgresql_url`` and ``Blobs.at``."""
        engine = postgresql_engine(postgresql_url(settings.database)) if settings.database else None
        blobs = Blobs.at(settings.blobs) if settings.blobs else None
        return cls(state_dir, engine, blobs)

    @property
    def name(self) -> str:
        return shown(self.engine.url) if self.engine else str(self.folder / DATABASE)

    def place(self, digest: str) -> str:
        return f"{self.blobs.name}/{blob_name(digest)}" if self.blobs else LocalFiles.place(self, digest)

    def file(self, digest: str, size: int) -> bytes:
        """Read as ``LocalFiles.file`` does. Raises EdgeAdaptError if the store cannot be reached."""
        return self.blobs.read(digest, size) if self.blobs else LocalFiles.file(self, digest, size)

    def rows(self, query: str, values: tuple[int, ...]) -> list[tuple[Any, ...]]:
        """Query as ``LocalFiles.rows`` does. Raises EdgeAdaptError if the database cannot be reached. A database's
        owner decides what it answers, also without an end: there are limits on time and size."""
        if self.engine is None:
            return LocalFiles.rows(self, query, values)
        try:
            with self.engine.connect() as connection:
                connection = connection.execution_options(postgresql_readonly=True)
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {LONGEST}")
                if connection.exec_driver_sql(f"SELECT to_regclass('{FIRST_TABLE}')").scalar() is not None:
                    require_schema(FIRST, self.name)
                revision = connection.exec_driver_sql(f"SELECT {SCHEMA_COLUMN} FROM {SCHEMAS} LIMIT 1").scalar()  # noqa: S608
                require_schema(revision, self.name)
                rows = list[tuple[Any, ...]]()
                streamed = connection.execution_options(stream_results=True)
                for row in streamed.exec_driver_sql(query.replace("?", "%s"), values):
                    if len(rows) == MOST_ROWS or sum(len(each) for each in row if isinstance(each, bytes)) > LARGEST:
                        raise DataError(f"{self.name} has more rows or larger ones than a registry", about="database")
                    rows.append(tuple(row))
        except DBAPIError as error:
            reason = " ".join(str(error.orig).split())
            # The server refuses a statement with a code; an error without one is of the connection.
            if error.connection_invalidated or getattr(error.orig, "sqlstate", None) is None:
                raise EdgeAdaptError(f"{self.name}: {reason}", about="database") from None
            raise DataError(f"{self.name} is not a registry or is damaged ({reason})", about="database") from None
        except SQLAlchemyError as error:
            reason = " ".join(str(error).split())
            raise DataError(f"{self.name} is not a registry or is damaged ({reason})", about="database") from None
        return rows


def shown(url: URL) -> str:
    return url.render_as_string(hide_password=True).replace(f"{DRIVER}://", POSTGRESQL)


def is_local(url: URL) -> bool:
    """Check whether a database's address is of this machine: a socket in the file system, or the loopback interface."""
    named = url.query.get("host", ())
    hosts = [url.host] if url.host else [named] if isinstance(named, str) else list(named)
    if not hosts:
        hosts = [os.environ.get("PGHOST", "")]
    return all(host in ("", "localhost", "127.0.0.1", "::1") or host.startswith("/") for host in hosts)


def _commit_durably(connection: Any, _: object) -> None:
    # A server may be set to acknowledge commits that a power cut takes back. The ending of a round is logged after its
    # commit, and a log that knows more than the registry stops the coordinator.
    query = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    connection.execute(query)
    connection.commit()
