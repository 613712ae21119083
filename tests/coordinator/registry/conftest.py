"""A registry in a folder, and rounds to put into it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from coordinator.registry import Registry
from edgeadapt.formats.registrystores import postgresql_url
from tests.support.registry import Rounds


@pytest.fixture(scope="session")
def rounds() -> Rounds:
    return Rounds(IdentityKey.generate(SystemEntropy()))


def opener(url: str | URL, blobs: Path, rounds: Rounds) -> Iterator[Callable[[], Registry]]:
    opened: list[Registry] = []

    def open_registry() -> Registry:
        opened.append(Registry.open(url, str(blobs), [rounds.key.public]))
        return opened[-1]

    yield open_registry
    for registry in opened:
        registry.close()


@pytest.fixture
def reopen(tmp_path: Path, rounds: Rounds) -> Iterator[Callable[[], Registry]]:
    """Opens the registry in ``tmp_path``, as a new process would."""
    yield from opener(f"sqlite:///{tmp_path}/registry.db", tmp_path / "blobs", rounds)


@pytest.fixture
def reopen_postgresql(tmp_path: Path, rounds: Rounds, postgresql: str) -> Iterator[Callable[[], Registry]]:
    """The same of a registry in a database of its own, with its blobs in ``tmp_path``."""
    yield from opener(postgresql_url(postgresql), tmp_path / "blobs", rounds)


@pytest.fixture
def registry(reopen: Callable[[], Registry]) -> Registry:
    return reopen()
