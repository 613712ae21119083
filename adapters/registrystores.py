"""Where a registry is kept, if not in its state directory: ``registry.toml``, and a PostgreSQL database by URL.

Neither the file nor a command line has a secret. The password comes from where PostgreSQL's own programs take it, the
environment (``PGPASSWORD``, ``PGPASSFILE``) or ``~/.pgpass``, and the keys of a bucket from where boto takes them.
SQLAlchemy, psycopg and fsspec are imported only for such a registry.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from adapters.settings import Settings
from aggregation.errors import ConfigError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine

REGISTRY = "registry.toml"  # in the coordinator's state directory
POSTGRESQL = "postgresql://"
DRIVER = "postgresql+psycopg"
SECRETS = ("password", "sslpassword")  # keys of a URL
# Seconds. A server that answers nothing is an error, and a machine that vanished is noticed.
PATIENCE = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "tcp_user_timeout": 30_000}


class RegistrySettings(Settings):
    """``registry.toml`` in the coordinator's state directory."""

    database: str = Field(
        default="",
        description="postgresql://USER@HOST/NAME, without a password; PGPASSWORD, PGPASSFILE or ~/.pgpass has it; "
        "empty: registry.db here",
    )
    blobs: str = Field(
        default="",
        description="where adapters are kept: a URL that fsspec knows, such as s3://BUCKET/PREFIX, without keys; "
        "empty: blobs here",
    )

    @classmethod
    def of(cls, state_dir: Path) -> "RegistrySettings":
        """Those of a state directory. Without the file, both are there. Raises as ``read`` and ``require_public``."""
        path = state_dir / REGISTRY
        found = cls.read(path) if path.exists() else cls()
        found.require_public(str(path))
        return found

    def require_public(self, where: str) -> None:
        """Return if no address has a secret in it. ``where`` names what has the addresses.

        Raises:
            ConfigError: One has. The error does not show it.
        """
        if self.database:
            postgresql_url(self.database, where)
        _, scheme, rest = self.blobs.partition("://")
        if scheme and "@" in rest.partition("/")[0]:
            reason = f"{where}: blobs has keys in its address: leave them out, and set them as boto takes them"
            raise ConfigError(reason, about="blobs.url")


def postgresql_url(address: str, where: str = "database") -> "URL":
    """A PostgreSQL database's address, for SQLAlchemy with psycopg.

    Args:
        address: As libpq takes it, without a password.
        where: What has the address, for an error.

    Raises:
        ConfigError: It is another address, or has a password, which the error does not show.
    """
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    form = f"{where}: database must be {POSTGRESQL}USER@HOST/NAME"
    if not address.startswith(POSTGRESQL):
        raise ConfigError(form, about="database.url")
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        raise ConfigError(form, about="database.url") from None
    if url.password is not None or any(key in url.query for key in SECRETS):
        reason = f"{where}: database has a password in its address: leave it out, and set PGPASSWORD or PGPASSFILE"
        raise ConfigError(reason, about="database.url")
    if not url.database:
        raise ConfigError(f"{form}: it names no database", about="database.url")
    return url.set(drivername=DRIVER)


def postgresql_engine(url: "URL") -> "Engine":
    """Connections to a PostgreSQL database, which are made when they are needed.

    To another machine TLS is required, and its certificate must be for the host and of an authority that the system
    trusts. ``sslmode`` and ``sslrootcert`` in the address, or ``PGSSLMODE`` and ``PGSSLROOTCERT``, say otherwise. A
    commit is durable when it returns, whatever the server's default is.

    Raises:
        ConfigError: psycopg is not installed.
    """
    from sqlalchemy import create_engine, event

    options: dict[str, Any] = dict(PATIENCE)
    if not _is_local(url) and not {"sslmode", "sslrootcert"} & url.query.keys():
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


def shown(url: "URL") -> str:
    """A database's address in a message."""
    text = url.render_as_string(hide_password=True)
    return text.replace(f"{DRIVER}://", POSTGRESQL)


def _is_local(url: "URL") -> bool:
    named = url.query.get("host", ())
    hosts = [url.host] if url.host else [named] if isinstance(named, str) else list(named)
    if not hosts:
        hosts = [os.environ.get("PGHOST", "")]
    return all(host in ("", "localhost", "127.0.0.1", "::1") or host.startswith("/") for host in hosts)


def _commit_durably(connection: Any, _: object) -> None:
    # A server may be set to acknowledge commits that a power cut takes back. The ending of a round is logged after its
    # commit, and a log that knows more than the registry stops the coordinator.
    found = "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    connection.execute(found)
    connection.commit()
