"""A registry in a folder, and rounds to put into it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from coordinator.registry import Registry
from tests.support.registry import Rounds


@pytest.fixture(scope="session")
def rounds() -> Rounds:
    return Rounds(IdentityKey.generate(SystemEntropy()))


@pytest.fixture
def reopen(tmp_path: Path, rounds: Rounds) -> Iterator[Callable[[], Registry]]:
    """Opens the registry in ``tmp_path``, as a new process would."""
    opened: list[Registry] = []

    def open_registry() -> Registry:
        opened.append(Registry.open(f"sqlite:///{tmp_path}/registry.db", str(tmp_path / "blobs"), [rounds.key.public]))
        return opened[-1]

    yield open_registry
    for registry in opened:
        registry.close()


@pytest.fixture
def registry(reopen: Callable[[], Registry]) -> Registry:
    return reopen()
