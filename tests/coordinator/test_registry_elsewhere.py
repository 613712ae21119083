"""A coordinator whose registry is in PostgreSQL: made, run and looked at as every other one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from adapters.registryfiles import DATABASE, REGISTRY, RegistrySettings
from adapters.registrystores import postgresql_url
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError
from coordinator.authority import AuthorityStore
from coordinator.cli.coordinator import coordinator
from coordinator.settings import FederationSettings
from coordinator.statedir import CoordinatorStateDir, open_registry
from coordinator.status import status_of
from tests.support import refused
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
    app_fleet_of: Callable[..., Any], postgresql: str, postgresql_server: Server
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
    assert json.loads(done.output)["state"] == str(tmp_path / "fleet")
    assert RegistrySettings.of(tmp_path / "fleet").database == postgresql
    held = b"".join(path.read_bytes() for path in (tmp_path / "fleet").rglob("*") if path.is_file())
    assert postgresql_server.password.encode() not in held
    assert CoordinatorStateDir.open(tmp_path / "fleet").registry.is_empty


def test_init_with_a_password_in_the_address_is_refused_and_makes_nothing(authority_pem: Path, tmp_path: Path) -> None:
    arguments = ["init", str(tmp_path / "fleet"), "--authority", str(authority_pem)]
    with refused(ConfigError, "database.url") as caught:
        CliRunner().invoke(
            coordinator, [*arguments, "--database", "postgresql://me:hunter2@db/fleet"], catch_exceptions=False
        )
    assert "hunter2" not in str(caught.value)
    assert not (tmp_path / "fleet").exists()


def test_a_new_coordinator_does_not_take_over_the_registry_of_another(
    app_fleet_of: Callable[..., Any], tmp_path: Path, postgresql: str
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


@pytest.fixture
def authority_pem(tmp_path: Path) -> Path:
    store = AuthorityStore.create(tmp_path / "authority", "fleet", 3650, 30, None)
    return store.folder / "authority.pem"
