"""Addresses of a registry's stores: no secret in them, none in an error, and TLS to other machines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError
from edgeadapt.formats import registrystores
from edgeadapt.formats.blobs import Blobs
from edgeadapt.formats.registryfiles import REGISTRY, RegistrySettings
from edgeadapt.formats.registrystores import postgresql_engine, postgresql_url, shown
from tests.support import refused

SECRET = "hunter2"  # noqa: S105


@pytest.mark.parametrize(
    "address",
    [
        f"postgresql://me:{SECRET}@db/fleet",
        f"postgresql://me@db/fleet?password={SECRET}",
        f"postgresql://db/fleet?user=me&sslmode=require&password={SECRET}",
        f"postgresql://me@db/fleet?sslpassword={SECRET}",
        f"postgresql://me:{SECRET}@db:port/fleet",
        f"postgresql://me:{SECRET}@[db/fleet",
        f"postgres:{SECRET}",
        f"mysql://me:{SECRET}@db/fleet",
        "postgresql://",
        "postgresql://db/",
        "sqlite:///registry.db",
        "host=db password=" + SECRET,
    ],
)
def test_an_address_with_a_password_or_of_another_kind_is_refused_and_not_shown(address: str) -> None:
    with refused(ConfigError, "database.url") as caught:
        postgresql_url(address)
    assert SECRET not in str(caught.value)
    assert REGISTRY in str(caught.value)


@pytest.mark.parametrize("address", [f"s3://key:{SECRET}@bucket/fleet", f"http://me:{SECRET}@host"])
def test_a_blob_address_with_keys_is_refused_and_not_shown(address: str) -> None:
    with refused(ConfigError, "blobs.url") as caught:
        Blobs.at(address)
    assert SECRET not in str(caught.value)


def test_a_folder_without_the_file_has_its_registry(tmp_path: Path) -> None:
    assert RegistrySettings.of(tmp_path) == RegistrySettings()


@pytest.mark.parametrize("content", ["databse = ''", "database = 5", "database = ", "\0"])
def test_a_damaged_file_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / REGISTRY).write_text(content)
    with pytest.raises(ConfigError) as caught:
        RegistrySettings.of(tmp_path)
    assert REGISTRY in str(caught.value)


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, Any]]:
    """Address → what libpq is given besides it."""
    for name in ("PGHOST", "PGSSLMODE", "PGSSLROOTCERT"):
        monkeypatch.delenv(name, raising=False)
    real, given = registrystores.create_engine, dict[str, Any]()

    def create(url: Any, *, connect_args: dict[str, Any], **rest: Any) -> Any:
        given.update(connect_args)
        return real(url, connect_args=connect_args, **rest)

    monkeypatch.setattr(registrystores, "create_engine", create)

    def of(address: str) -> dict[str, Any]:
        given.clear()
        postgresql_engine(postgresql_url(address)).dispose()
        return {key: value for key, value in given.items() if key not in registrystores.PATIENCE}

    return of


VERIFIED = {"sslmode": "verify-full", "sslrootcert": "system"}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("postgresql://me@db.example/fleet", VERIFIED),
        ("postgresql://me@/fleet?host=db.example", VERIFIED),
        ("postgresql://me@/fleet?host=/run/postgresql&host=db.example", VERIFIED),
        ("postgresql://me@db.example/fleet?sslmode=verify-ca", {}),
        ("postgresql://me@db.example/fleet?sslrootcert=ca.pem&sslmode=verify-full", {}),
        ("postgresql://me@localhost/fleet", {}),
        ("postgresql://me@/fleet?host=/run/postgresql", {}),
        ("postgresql:///fleet", {}),
    ],
)
def test_tls_to_another_machine_is_verified_unless_the_address_says_otherwise(
    address: str, expected: dict[str, str], options: Callable[[str], dict[str, Any]]
) -> None:
    assert options(address) == expected


def test_the_environment_of_libpq_is_heeded(
    options: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", "db.example")
    assert options("postgresql:///fleet") == VERIFIED
    monkeypatch.setenv("PGSSLROOTCERT", "ca.pem")
    assert options("postgresql:///fleet") == {"sslmode": "verify-full"}
    monkeypatch.setenv("PGSSLMODE", "require")
    assert options("postgresql:///fleet") == {}


def test_an_address_is_shown_as_it_was_written() -> None:
    assert shown(postgresql_url("postgresql://me@db:5433/fleet")) == "postgresql://me@db:5433/fleet"
