"""An audit of a registry in PostgreSQL and a bucket: what an audit of the same registry in files finds, and no less."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select, text

from aggregation.errors import EdgeAdaptError, TrustError
from coordinator.registry import database, transcripttable
from coordinator.statedir import LOCK
from edgeadapt.auditing import AuditInput, AuditOptions
from edgeadapt.formats import registrystores
from edgeadapt.formats.blobs import Blobs
from edgeadapt.formats.registryfiles import BLOBS, DATABASE, REGISTRY, RegistrySettings, blob_name
from edgeadapt.formats.registrystores import postgresql_url
from edgeadapt.promotion.evaluations import TRANSCRIPT, find_plan
from edgeadapt.releases.lineage import Lineage
from tests.support import refused
from tests.support.postgresql import Server


@dataclass
class Coordinator:
    """A state directory, and the means of whoever owns its stores to change what is in them."""

    folder: Path
    engine: Engine
    replace_blob: Callable[[str, bytes], object]
    remove_blob: Callable[[str], object]

    def execute(self, statement: str, **values: object) -> Any:
        with self.engine.begin() as connection:
            found = connection.execute(text(statement), values)
            return found.scalar() if found.returns_rows else None

    def change(self, table: str, column: str, where: str) -> None:
        """Change one byte of a signed document."""
        raw = self.execute(f"SELECT {column} FROM {table} WHERE {where}")  # noqa: S608
        changed = raw[:60] + bytes([raw[60] ^ 1]) + raw[61:]
        self.execute(f"UPDATE {table} SET {column} = :changed WHERE {where}", changed=changed)  # noqa: S608

    @property
    def newest(self) -> str:
        digest: str = self.execute("SELECT sha256 FROM edgeadapt_versions ORDER BY version DESC LIMIT 1")
        return digest

    def verdict(self) -> Any:
        """What the audit finds: each check's result, or the error that ends it."""
        try:
            checked = AuditInput.open(self.folder, AuditOptions())
            reports = checked.audit(unfinished=False)
            found = [(each.check, each.status, each.about) for report in reports.values() for each in report.findings]
            checked.require(reports, unfinished=False)
        except EdgeAdaptError as error:
            return type(error), error.about in ("database", DATABASE) or error.about
        return found


@pytest.fixture
def local(state_dir: Path) -> Coordinator:
    """Its registry in files."""
    folder = state_dir
    blobs = folder / BLOBS
    return Coordinator(
        folder,
        create_engine(f"sqlite:///{folder / DATABASE}"),
        lambda digest, content: (blobs / blob_name(digest)).write_bytes(content),
        lambda digest: (blobs / blob_name(digest)).unlink(),
    )


@pytest.fixture
def remote(local: Coordinator, postgresql: str, bucket: str, tmp_path: Path) -> Coordinator:
    """The same, with its registry in PostgreSQL and a bucket."""
    folder = Path(shutil.copytree(local.folder, tmp_path / "remote"))
    engine, blobs = database.connect(postgresql_url(postgresql)), Blobs.open(bucket)
    with local.engine.connect() as source, engine.begin() as target:
        for table in (database.versions, database.rounds, database.optimizer):
            target.execute(table.insert(), [dict(row._mapping) for row in source.execute(select(table))])
    for path in (folder / BLOBS).iterdir():
        blobs.put(path.read_bytes())
    shutil.rmtree(folder / BLOBS)
    (folder / DATABASE).unlink()
    (folder / REGISTRY).write_text(RegistrySettings(database=postgresql, blobs=bucket).to_toml())
    return Coordinator(
        folder,
        engine,
        lambda digest, content: blobs.fs.pipe_file(f"{blobs.root}/{blob_name(digest)}", content),
        lambda digest: blobs.fs.rm_file(f"{blobs.root}/{blob_name(digest)}"),
    )


TAMPERING: dict[str, Callable[[Coordinator], object]] = {
    "a record": lambda each: each.change("edgeadapt_rounds", "record", "round = 1"),
    "the last record": lambda each: each.change("edgeadapt_rounds", "record", "round = 2"),
    "a manifest": lambda each: each.change("edgeadapt_versions", "manifest", "version = 1"),
    "the newest manifest": lambda each: each.change("edgeadapt_versions", "manifest", "version = 2"),
    "no last record": lambda each: each.execute("DELETE FROM edgeadapt_rounds WHERE round = 2"),
    "no first record": lambda each: each.execute("DELETE FROM edgeadapt_rounds WHERE round = 1"),
    "no newest version": lambda each: each.execute("DELETE FROM edgeadapt_versions WHERE version = 2"),
    "no version": lambda each: each.execute("DELETE FROM edgeadapt_versions"),
    "another format": lambda each: each.execute("UPDATE edgeadapt_schema SET version_num = '1'"),
    "no table": lambda each: each.execute("DROP TABLE edgeadapt_rounds"),
    "an adapter": lambda each: each.replace_blob(each.newest, b"another"),
    "an empty adapter": lambda each: each.replace_blob(each.newest, b""),
    "no adapter": lambda each: each.remove_blob(each.newest),
}


def test_the_verdict_on_each_alteration_is_the_same_wherever_the_registry_is(
    local: Coordinator, remote: Coordinator
) -> None:
    sound = local.verdict()
    assert isinstance(sound, list)
    assert remote.verdict() == sound
    kept = [(each, keep(each)) for each in (local, remote)]
    for what, tamper in TAMPERING.items():
        tamper(local)
        tamper(remote)
        found = local.verdict()
        assert (what, remote.verdict()) == (what, found)
        assert found != sound, what
        for each, before in kept:
            bring_back(each, before)
    assert remote.verdict() == local.verdict() == sound


def test_a_plan_is_found_in_the_database_and_the_state_directory_is_only_read(remote: Coordinator) -> None:
    logs = remote.folder / TRANSCRIPT
    with remote.engine.begin() as connection:
        transcripttable.insert(connection, logs)
    shutil.rmtree(logs)
    (remote.folder / LOCK).unlink(missing_ok=True)
    before = {path: path.stat().st_mtime_ns for path in (remote.folder, *remote.folder.rglob("*"))}
    records = [each.record for each in Lineage.read(remote.folder, None, None).versions if each.record]
    assert len(records) == 2
    for record in records:
        assert record.plan is not None
        plan = find_plan(remote.folder, record.plan)
        assert (plan.round, plan.digest().hex()) == (record.round, record.plan)
    with refused(TrustError, "plan"):
        find_plan(remote.folder, "0" * 64)
    assert {path: path.stat().st_mtime_ns for path in (remote.folder, *remote.folder.rglob("*"))} == before
    remote.execute("DELETE FROM edgeadapt_transcript")
    with refused(TrustError, "plan"):
        find_plan(remote.folder, records[0].plan or "")


def test_a_store_that_is_away_is_no_finding(remote: Coordinator, postgresql_server: Server, tmp_path: Path) -> None:
    """Nobody is accused because a network is down."""
    settings = RegistrySettings.of(remote.folder)
    away = settings.model_copy(update={"database": f"postgresql://fleet@/registry?host={tmp_path}"})
    (remote.folder / REGISTRY).write_text(away.to_toml())
    with refused(EdgeAdaptError, "database") as caught:
        AuditInput.open(remote.folder, AuditOptions())
    assert not isinstance(caught.value, TrustError)
    assert postgresql_server.password not in str(caught.value)


@pytest.mark.parametrize(("limit", "value"), [("MOST_ROWS", 1), ("LARGEST", 1000), ("LONGEST", 200)])
def test_a_database_that_answers_too_much_or_never_is_refused(
    remote: Coordinator, limit: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever owns the database can make a view of a table's name."""
    remote.execute("ALTER TABLE edgeadapt_rounds RENAME TO kept")
    if limit == "LONGEST":
        remote.execute("CREATE VIEW edgeadapt_rounds AS SELECT kept.* FROM kept, pg_sleep(600)")
    else:
        remote.execute("CREATE VIEW edgeadapt_rounds AS SELECT * FROM kept")
    assert limit == "LONGEST" or isinstance(remote.verdict(), list)
    monkeypatch.setattr(registrystores, limit, value)
    with refused(TrustError, "database"):
        AuditInput.open(remote.folder, AuditOptions())


Kept = tuple[dict[Any, list[dict[str, Any]]], str, bytes]


def keep(each: Coordinator) -> Kept:
    """All that an alteration takes from the stores."""
    tables = (*database.metadata.sorted_tables, database.schemas)
    with each.engine.connect() as connection:
        rows = {table: [dict(row._mapping) for row in connection.execute(select(table))] for table in tables}
    settings = RegistrySettings.of(each.folder)
    return rows, each.newest, Blobs.at(settings.blobs or str(each.folder / BLOBS)).get(each.newest)


def bring_back(each: Coordinator, kept: Kept) -> None:
    rows, digest, blob = kept
    with each.engine.begin() as connection:
        for table, found in rows.items():
            table.drop(connection, checkfirst=True)
            table.create(connection)
            if found:
                connection.execute(table.insert(), found)
    each.replace_blob(digest, blob)
