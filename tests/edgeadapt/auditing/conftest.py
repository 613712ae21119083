"""Logged sessions to audit, and state directories of finished runs."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import FleetOf
from tests.support.fleet import entropy
from tests.support.sessions import logged, logged_of

__all__ = ["entropy", "logged", "logged_of"]

KEPT = {"aggregation__keep_masked_inputs": True}
RUNS: dict[str, tuple[int, dict[str, Any]]] = {  # name → devices and settings, of two rounds a session
    "fedavg": (4, KEPT),
    "fedadam": (4, {**KEPT, "server__optimizer": "fedadam", "server__learning_rate": 0.02}),
    "digests": (4, {}),
    "two rounds": (3, {"rounds": 2}),
}


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The state directories of finished runs, each made when the first test needs it."""
    return tmp_path_factory.mktemp("finished")


@pytest.fixture
def state_dir_of(finished: Path, fleet_of: FleetOf, tmp_path: Path) -> Callable[[str], Path]:
    """A coordinator's state directory after a run; each test has a copy to change."""

    def make(name: str) -> Path:
        if not (finished / name).exists():
            devices, settings = RUNS[name]
            fleet = fleet_of(devices, aggregation__session_rounds=2, **settings)
            fleet.federate(fleet.grid())
            shutil.copytree(fleet.out / "coordinator", finished / name)
        return Path(shutil.copytree(finished / name, tmp_path / name))

    return make


@pytest.fixture
def state_dir(state_dir_of: Callable[[str], Path]) -> Path:
    """After two rounds of three devices in one session."""
    return state_dir_of("two rounds")
