"""A coordinator whose registry is in PostgreSQL: made, run and looked at as every other one."""

import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from sqlalchemy import text

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError
from coordinator.app import over_gateway, run
from coordinator.cli import coordinator_group as coordinator
from coordinator.registry import Lease, lease
from coordinator.services.deployment import _serves_or_waits
from coordinator.settings import FederationSettings
from coordinator.statedir import HUNG, WAITING, CoordinatorStateDir, open_registry
from coordinator.status import lines_of, status_of
from edgeadapt.auditing import AuditInput, AuditOptions
from edgeadapt.auditing.transcripts import log_name, logs
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats.registryfiles import BLOBS, DATABASE, REGISTRY, TRANSCRIPT, RegistrySettings
from edgeadapt.formats.registrystores import postgresql_url
from tests.support import FleetOf, refused
from tests.support.gateway import HOST, free_port, wait_until
from tests.support.postgresql import Server


def move(fleet: Any, postgresql: str) -> Path:
    """Let the registry of a new fleet be in the database; nothing of it stays in the state directory."""
    folder = fleet.out / "coordinator"
    opened = CoordinatorStateDir.open(folder)
    first = opened.registry.newest_adapter()
    opened.registry.close()
    (folder / REGISTRY).write_text(RegistrySettings(database=postgresql).to_toml())
    (folder / DATABASE).unlink()
    registry = open_registry(folder, opened.key)
    registry.publish(first.manifest, first.blob, opened.key)
    registry.close()
    assert not (folder / DATABASE).exists()
    return Path(folder)


def test_a_federation_runs_and_goes_on_with_its_registry_in_postgresql(
    app_fleet_of: FleetOf, postgresql: str, postgresql_server: Server
) -> None:
    fleet = app_fleet_of(3, rounds=1)
    folder = move(fleet, postgresql)
    (record,) = fleet.federate(fleet.grid())
    assert record.aborted is None
    fleet.configure({"rounds": 2})
    records = fleet.federate(fleet.grid())
    assert [each.version for each in records] == [1, 2]
    found = status_of(CoordinatorStateDir.open(folder))
    assert (found["rounds_done"], len(found["versions"])) == (2, 3)
    name = str(postgresql_url(postgresql).database)
    assert postgresql_server.run(name, "SELECT count(*) FROM edgeadapt_rounds") == "2"
    assert not (folder / DATABASE).exists()


def test_init_makes_the_tables_and_keeps_the_password_out_of_the_directory(
    authority_pem: Path, tmp_path: Path, postgresql: str, postgresql_server: Server
) -> None:
    arguments = ["init", str(tmp_path / "fleet"), "--authority", str(authority_pem), "--database", postgresql, "--json"]
    done = CliRunner().invoke(coordinator, arguments, catch_exceptions=False)
    assert json.loads(done.stdout)["state"] == str(tmp_path / "fleet")
    assert RegistrySettings.of(tmp_path / "fleet").database == postgresql
    held = b"".join(path.read_bytes() for path in (tmp_path / "fleet").rglob("*") if path.is_file())
    assert postgresql_server.password.encode() not in held
    assert CoordinatorStateDir.open(tmp_path / "fleet").registry.is_empty


def test_a_new_coordinator_does_not_take_over_the_registry_of_another(
    app_fleet_of: FleetOf, tmp_path: Path, postgresql: str
) -> None:
    folder = move(app_fleet_of(3), postgresql)
    pinned = (folder / "authority.pem").read_bytes()
    with refused(ConfigError, "database"):
        CoordinatorStateDir.create(
            tmp_path / "other",
            pinned,
            FederationSettings(),
            SystemEntropy(),
            stores=RegistrySettings(database=postgresql),
        )
    assert not (tmp_path / "other").exists()
    assert len(CoordinatorStateDir.open(folder).registry.versions()) == 1


def test_up_takes_a_run_that_waits_for_one_that_works_unless_it_hangs(app_fleet_of: FleetOf, postgresql: str) -> None:
    """Also where the leader's name is the same: two containers may have one host name and one folder."""
    folder = move(app_fleet_of(3), postgresql)
    opened, nowhere = CoordinatorStateDir.open(folder), f"{HOST}:{free_port()}"
    leads, done = threading.Event(), threading.Event()

    def lead() -> None:
        with CoordinatorStateDir.open(folder).leading():
            leads.set()
            done.wait(60)

    other = Lease.take(opened.registry.engine, opened.name)
    assert isinstance(other, Lease)
    assert not _serves_or_waits(opened, nowhere, 1.0)  # a run that lost the lease, and hangs
    waiting = threading.Thread(target=lead)
    with other.kept():
        waiting.start()
        wait_until(lambda: _serves_or_waits(opened, nowhere, 1.0))
        assert "rounds 0 of 3, 0 aborted, a run waits to take over" in lines_of(status_of(opened))
    assert leads.wait(60)
    assert not opened.waits()
    done.set()
    waiting.join()
    before = time.time() - HUNG
    for seconds, waits in ((before + HUNG / 2, True), (before - 1, False)):
        (folder / WAITING).touch()
        os.utime(folder / WAITING, (seconds, seconds))
        assert _serves_or_waits(opened, nowhere, 1.0) == waits


def test_a_directory_knows_who_leads(app_fleet_of: FleetOf, postgresql: str, caplog: pytest.LogCaptureFixture) -> None:
    opened = CoordinatorStateDir.open(move(app_fleet_of(3), postgresql))
    assert status_of(opened)["lease"] is None
    other = Lease.take(opened.registry.engine, "elsewhere")
    assert isinstance(other, Lease)
    assert "elsewhere leads, epoch 1" in lines_of(status_of(opened))
    with opened.locked():
        assert "rounds 0 of 3, 0 aborted, a run waits to take over" in lines_of(status_of(opened))
    with other.kept():
        pass
    with caplog.at_level("INFO", "edgeadapt.coordinator"), opened.leading() as leader:
        assert leader.lease is not None
        assert f"{opened.name} (this directory) leads, epoch 2" in lines_of(status_of(opened))
        assert not opened.waits()
        with refused(EdgeAdaptError, "run.lock"), opened.leading():
            pass
    assert caplog.messages == ["leads, epoch 2"]
    assert f"{opened.name} (this directory) led last, and nobody leads now, epoch 2" in lines_of(status_of(opened))


def test_a_leader_that_was_paused_through_rounds_of_another_one_says_who_leads(
    app_fleet_of: FleetOf, postgresql: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its transcript lacks these rounds, and nothing is damaged."""
    monkeypatch.setattr(lease, "RENEWAL", 3600.0)
    fleet = app_fleet_of(3, rounds=3)
    folder = move(fleet, postgresql)
    (folder / REGISTRY).write_text(RegistrySettings(database=postgresql, blobs=str(folder / BLOBS)).to_toml())
    second = Path(shutil.copytree(folder, fleet.out / "second"))
    opened, other = CoordinatorStateDir.open(folder), CoordinatorStateDir.open(second)
    paused = run(opened, fleet.grid())
    assert next(paused).round == 1
    with opened.registry.engine.begin() as connection:
        connection.execute(text("UPDATE edgeadapt_lease SET ends = clock_timestamp() - interval '1 s'"))
    assert [record.round for record in run(other, fleet.grid())] == [2, 3]
    with refused(EdgeAdaptError, "lease", value=2) as caught:
        next(paused)
    assert f"{other.name} has taken over in epoch 2" in str(caught.value)
    left = dict.fromkeys(logs(folder / TRANSCRIPT))
    CoordinatorStateDir.open(folder)  # has the rest of the transcript again
    assert [path.name for path in left] == [log_name(1)]
    assert [path.name for path in logs(folder / TRANSCRIPT)] == [log_name(1), log_name(2)]


def test_a_log_that_a_full_disk_has_cut_is_made_complete_from_the_database(
    app_fleet_of: FleetOf, postgresql: str
) -> None:
    fleet = app_fleet_of(3, rounds=2)
    folder = move(fleet, postgresql)
    rounds = run(CoordinatorStateDir.open(folder), fleet.grid())
    next(rounds)
    (path,) = logs(folder / TRANSCRIPT)
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 7)  # the table took the last record, and the file a part of it
    rounds.close()  # type: ignore[attr-defined]
    assert path.read_bytes().startswith(whole)
    assert len(fleet.federate(fleet.grid())) == 2
    checked = AuditInput.open(folder, AuditOptions())
    checked.require(checked.audit(unfinished=False), unfinished=False)


def test_one_that_takes_over_when_all_rounds_are_done_serves_nobody(app_fleet_of: FleetOf, postgresql: str) -> None:
    fleet = app_fleet_of(3, rounds=1)
    opened = CoordinatorStateDir.open(move(fleet, postgresql))
    with refused(ConfigError, "tls.key"):
        list(over_gateway(opened, f"{HOST}:{free_port()}"))
    fleet.federate(fleet.grid())
    list(over_gateway(opened, f"{HOST}:{free_port()}"))


@pytest.fixture
def authority_pem(tmp_path: Path) -> Path:
    store = AuthorityStore.create(tmp_path / "authority", "fleet", 3650, 30, None)
    return store.folder / "authority.pem"
