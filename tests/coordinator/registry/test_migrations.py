"""A registry of any revision becomes what a new one is, with all that it held; another one is refused by name."""

import json
import signal
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command, op
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from click.testing import CliRunner
from sqlalchemy import Engine, MetaData, text
from sqlalchemy.engine import URL, make_url

import edgeadapt.formats.registryreader
from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from coordinator.backup import RegistrySnapshot
from coordinator.cli import coordinator_group as coordinator
from coordinator.registry import Blobs, Registry, TranscriptTable, database, migrations
from edgeadapt.formats.registryfiles import DATABASE, SCHEMA, SCHEMAS
from edgeadapt.formats.registrystores import postgresql_url
from tests.support import FleetOf, refused
from tests.support.postgresql import Server
from tests.support.registry import Rounds

REVISIONS = [str(number) for number in range(1, int(SCHEMA) + 1)]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    if request.param == "sqlite":
        return make_url(f"sqlite:///{tmp_path}/registry.db")
    return postgresql_url(request.getfixturevalue("postgresql"))


@pytest.fixture
def engine(url: URL) -> Iterator[Engine]:
    opened = database.engine_of(url)
    yield opened
    opened.dispose()


def at_revision(engine: Engine, revision: str, rows: RegistrySnapshot) -> None:
    """Make a registry as the edgeadapt of that revision did, with rows."""
    with engine.begin() as connection:
        command.upgrade(migrations.configuration(connection), revision)
        if revision == "1":  # was made without alembic
            connection.execute(text("INSERT INTO edgeadapt_format VALUES (2)"))
            connection.execute(text(f"DROP TABLE {SCHEMAS}"))
    rows.insert(engine)


def schema(engine: Engine) -> list[str]:
    found = MetaData()
    found.reflect(engine)
    return sorted(
        f"{table.name} {[(c.name, str(c.type), c.nullable, c.primary_key) for c in table.columns]} "
        f"{sorted(str(each.name) for each in table.constraints if each.name)} {table.indexes}"
        for table in found.tables.values()
    )


@pytest.fixture
def rows(tmp_path: Path, rounds: Rounds) -> RegistrySnapshot:
    """Of a registry with two rounds."""
    registry = Registry.open(f"sqlite:///{tmp_path}/source.db", str(tmp_path / "blobs"), [rounds.key.public])
    rounds.seed(registry)
    for number in (1, 2):
        rounds.commit(registry, number)
    found = RegistrySnapshot.read(registry.engine)
    registry.close()
    return found


@pytest.mark.parametrize("revision", REVISIONS)
def test_each_revision_becomes_what_a_new_registry_is(
    url: URL, engine: Engine, rows: RegistrySnapshot, revision: str, tmp_path: Path, rounds: Rounds
) -> None:
    at_revision(engine, revision, rows)
    assert migrations.upgrade(url) == revision
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": SCHEMAS, "compare_type": True})
        assert compare_metadata(context, database.metadata) == []
        assert database.revision(connection) == SCHEMA
    if engine.dialect.name == "sqlite":
        fresh = database.connect(f"sqlite:///{tmp_path}/fresh.db")
        assert schema(engine) == schema(fresh)
        fresh.dispose()
    assert RegistrySnapshot.read(engine) == rows
    registry = Registry.open(url, str(tmp_path / "blobs"), [rounds.key.public])
    rounds.commit(registry, 3)
    assert [record.round for record in registry.rounds()] == [1, 2, 3]
    registry.close()
    assert migrations.upgrade(url) == SCHEMA


def test_an_upgrade_puts_the_logs_of_a_directory_into_a_database_that_has_none(
    postgresql: str, rows: RegistrySnapshot, tmp_path: Path
) -> None:
    url, transcript = postgresql_url(postgresql), tmp_path / "transcript"
    transcript.mkdir()
    files = {"session-000001.log": b"one", "session-000002.log": b"two", "revoked.crl": b"list"}
    for name, content in files.items():
        (transcript / name).write_bytes(content)
    engine = database.engine_of(url)
    at_revision(engine, "2", rows)
    with refused(ConfigError, "transcript"):  # on another machine: the log would be lost
        migrations.upgrade(url, tmp_path / "elsewhere")
    with engine.connect() as connection:
        assert database.revision(connection) == "2"
    assert migrations.upgrade(url, transcript) == "2"
    assert migrations.upgrade(url, transcript) == SCHEMA
    TranscriptTable(engine).copy_to(tmp_path / "copy")
    engine.dispose()
    assert {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir()} == files


def test_an_upgrade_that_fails_leaves_what_was_there(
    url: URL, engine: Engine, rows: RegistrySnapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_revision(engine, "1", rows)
    before = schema(engine)
    drop = op.drop_table

    def fail(name: str) -> None:
        drop(name)
        raise EdgeAdaptError("the power is off", about="power")

    monkeypatch.setattr(op, "drop_table", fail)
    with refused(EdgeAdaptError, "power"):
        migrations.upgrade(url)
    assert schema(engine) == before
    assert RegistrySnapshot.read(engine) == rows
    with engine.connect() as connection:
        assert database.revision(connection) == "1"


def test_an_older_registry_is_refused_until_it_is_upgraded(app_fleet_of: FleetOf, tmp_path: Path) -> None:
    folder = app_fleet_of(3).out / "coordinator"
    with sqlite3.connect(folder / DATABASE) as connection:
        for table in (SCHEMAS, "edgeadapt_lease", "edgeadapt_transcript", "edgeadapt_revocations"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("CREATE TABLE edgeadapt_format (format INTEGER PRIMARY KEY NOT NULL)")
        connection.execute("INSERT INTO edgeadapt_format VALUES (2)")
    connection.close()
    before = (folder / DATABASE).read_bytes()
    error = CliRunner().invoke(coordinator, ["status", str(folder)]).exception
    assert type(error) is ConfigError
    assert "edgeadapt coordinator upgrade" in str(error)
    with refused(ConfigError, "database.schema", value="1"):
        edgeadapt.formats.registryreader.open_registry_files(folder, []).rounds()
    assert (folder / DATABASE).read_bytes() == before
    done = CliRunner().invoke(coordinator, ["upgrade", str(folder), "--json"])
    assert json.loads(done.stdout) == {"state": str(folder), "from": "1", "to": SCHEMA}
    assert CliRunner().invoke(coordinator, ["status", str(folder)]).exit_code == 0


def test_a_newer_registry_and_an_empty_database_are_not_upgraded(url: URL) -> None:
    engine = database.engine_of(url)
    with refused(ConfigError, "database"):
        migrations.upgrade(url)
    database.connect(url).dispose()
    with engine.begin() as connection:
        connection.execute(text("UPDATE edgeadapt_schema SET version_num = '99'"))
    with refused(ConfigError, "database.schema", value="99"):
        migrations.upgrade(url)
    engine.dispose()


# The registry in a real PostgreSQL: the same as in SQLite, and whatever ends the server or a session loses nothing.
Reopen = Callable[[], Registry]


@pytest.fixture
def own_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that a test may end."""
    server = Server.create()
    monkeypatch.setenv("PGPASSWORD", server.password)
    yield server
    server.remove()


def one_line(error: BaseException, server: Server) -> str:
    message = str(error)
    assert "\n" not in message
    assert server.password not in message
    return message


def test_a_registry_in_postgresql_is_that_in_sqlite(
    reopen: Reopen, reopen_postgresql: Reopen, rounds: Rounds, tmp_path: Path
) -> None:
    for opened in (reopen, reopen_postgresql):
        registry = opened()
        assert registry.is_empty
        rounds.seed(registry)
        for number in (1, 2):
            rounds.commit(registry, number)
        registry.record_round(rounds.aborted(3), rounds.key)
        assert not registry.is_empty
    assert rounds.snapshot(reopen_postgresql()) == rounds.snapshot(reopen())
    assert reopen_postgresql().head() == reopen().head()


def test_a_round_that_a_constraint_of_the_server_refuses_leaves_all_as_it_was(
    reopen_postgresql: Reopen, rounds: Rounds
) -> None:
    registry = reopen_postgresql()
    rounds.seed(registry)
    rounds.commit(registry, 1)
    before = rounds.snapshot(registry)
    with registry.engine.begin() as connection:  # the last statement of a commit fails, after all others succeeded
        connection.execute(text("ALTER TABLE edgeadapt_optimizer ADD CHECK (length(tensors) < 1) NOT VALID"))
    with refused(DataError, "database"):
        rounds.commit(registry, 2)
    assert rounds.snapshot(reopen_postgresql()) == before
    with registry.engine.begin() as connection:
        connection.execute(text("ALTER TABLE edgeadapt_optimizer DROP CONSTRAINT edgeadapt_optimizer_tensors_check"))
    rounds.commit(registry, 2)
    assert len(reopen_postgresql().rounds()) == 2


def test_of_two_that_commit_the_same_round_one_is_refused(
    reopen_postgresql: Reopen, rounds: Rounds, tmp_path: Path
) -> None:
    first = reopen_postgresql()
    second = replace(reopen_postgresql(), blobs=Blobs.open(str(tmp_path / "other")))
    rounds.seed(first)
    caught, start = list[EdgeAdaptError](), threading.Barrier(2)

    def commit(registry: Registry) -> None:
        start.wait()
        try:
            rounds.commit(registry, 1)
        except EdgeAdaptError as error:
            caught.append(error)

    threads = [threading.Thread(target=commit, args=[registry]) for registry in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (error,) = caught
    assert isinstance(error, DataError)
    assert [record.round for record in first.rounds()] == [1]
    assert len(first.versions()) == 2


def test_a_server_that_was_restarted_is_found_again(own_server: Server, rounds: Rounds, tmp_path: Path) -> None:
    registry = Registry.open(postgresql_url(own_server.url(own_server.database())), str(tmp_path), [rounds.key.public])
    rounds.seed(registry)
    rounds.commit(registry, 1)
    own_server.stop(signal.SIGQUIT)  # as a crash: it recovers from its log
    with refused(EdgeAdaptError, "database") as caught:
        rounds.commit(registry, 2)
    assert own_server.url("")[:13] in one_line(caught.value, own_server)
    own_server.start()
    assert len(registry.rounds()) == 1
    rounds.commit(registry, 2)
    assert len(registry.rounds()) == 2
    registry.close()


def test_a_session_that_the_server_ends_in_a_commit_stores_all_or_nothing(
    own_server: Server, rounds: Rounds, tmp_path: Path
) -> None:
    name = own_server.database()
    registry = Registry.open(postgresql_url(own_server.url(name)), str(tmp_path), [rounds.key.public])
    rounds.seed(registry)
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend'"
    own_server.run(
        name,
        "CREATE FUNCTION gone() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
        "PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$; "
        "CREATE CONSTRAINT TRIGGER gone AFTER INSERT ON edgeadapt_optimizer DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION gone()",
    )
    with refused(EdgeAdaptError, "database") as caught:  # the trigger ends the session while it commits
        rounds.commit(registry, 1)
    assert "start again" in one_line(caught.value, own_server)
    own_server.run(name, "DROP TRIGGER gone ON edgeadapt_optimizer")
    assert registry.rounds() == ()
    own_server.run(name, f"{others} AND pid <> pg_backend_pid()")  # between two rounds
    rounds.commit(registry, 1)
    assert len(registry.rounds()) == 1
    registry.close()


def test_a_commit_is_durable_whatever_the_server_is_set_to(
    reopen_postgresql: Reopen, postgresql_server: Server
) -> None:
    registry = reopen_postgresql()
    name = registry.engine.url.database
    for server, own in (("off", "on"), ("remote_write", "remote_write")):
        postgresql_server.run("postgres", f"ALTER DATABASE {name} SET synchronous_commit = {server}")
        registry.engine.dispose()
        with registry.engine.connect() as connection:
            assert connection.scalar(text("SHOW synchronous_commit")) == own


def test_what_keeps_a_connection_from_coming_about_is_one_line(
    postgresql: str, postgresql_server: Server, rounds: Rounds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(url: str) -> str:
        with refused(EdgeAdaptError, "database") as caught:
            Registry.open(postgresql_url(url), str(tmp_path), [rounds.key.public])
        return one_line(caught.value, postgresql_server)

    assert "does not exist" in refusal(postgresql_server.url("nowhere"))
    assert "No such file" in refusal(f"postgresql://fleet@/registry?host={tmp_path}")
    assert "refused" in refusal("postgresql://fleet@127.0.0.1:1/registry")
    monkeypatch.setenv("PGPASSWORD", "wrong")
    assert "password authentication failed" in refusal(postgresql)
    monkeypatch.delenv("PGPASSWORD")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "password" in refusal(postgresql)
    passwords = tmp_path / "passwords"
    passwords.write_text(f"*:*:*:*:{postgresql_server.password}\n")
    passwords.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(passwords))
    Registry.open(postgresql_url(postgresql), str(tmp_path), [rounds.key.public]).close()


def test_a_reader_that_may_not_write_reads(
    reopen_postgresql: Reopen, postgresql: str, postgresql_server: Server, rounds: Rounds, tmp_path: Path
) -> None:
    """No command changes a database only because it opens it."""
    rounds.seed(reopen_postgresql())
    name = str(postgresql_url(postgresql).database)
    postgresql_server.run("postgres", f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    registry = Registry.open(postgresql_url(postgresql), str(tmp_path / "blobs"), [rounds.key.public])
    assert [version.manifest for version in registry.versions()] == [rounds.manifest(0)]
    with refused(EdgeAdaptError, "database"):
        rounds.commit(registry, 1)
    registry.close()
