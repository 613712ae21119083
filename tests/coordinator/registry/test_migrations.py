"""A registry of any revision becomes what a new one is, with all that it held; another one is refused by name."""

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command, op
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from click.testing import CliRunner
from sqlalchemy import Engine, MetaData, text
from sqlalchemy.engine import URL, make_url

import edgeadapt.formats.registryreader
from aggregation.errors import ConfigError, EdgeAdaptError
from coordinator.backup import RegistrySnapshot
from coordinator.cli import coordinator_group as coordinator
from coordinator.registry import Registry, TranscriptTable, database, migrations
from edgeadapt.formats.registryfiles import DATABASE, SCHEMA, SCHEMAS
from edgeadapt.formats.registrystores import postgresql_url
from tests.support import FleetOf, refused
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
