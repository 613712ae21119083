"""A link in the place of a lock: whoever can write next to a state directory makes the device or coordinator follow it.

A process that opens its lock through the link empties, creates or holds a file of somebody else's choice.
"""

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout
from flwr.app import Context, Message

from aggregation.errors import ConfigError
from client.node.app import app as client_app
from client.node.statedir import LOCK as DEVICE_LOCK
from coordinator.statedir import LOCK as RUN_LOCK
from edgeadapt.formats import storage
from tests.client.node.conftest import refusals
from tests.support import FleetOf, refused

__all__ = ["refusals"]
VICTIM = "device-02"


@pytest.fixture
def fleet(app_fleet_of: FleetOf) -> Any:
    return app_fleet_of(8, rounds=1)


def place(lock: Path, tmp_path: Path) -> Path:
    """Put a hard link to a file in the place of a lock; the file."""
    target = tmp_path / "target"
    target.write_bytes(b"content")
    lock.unlink(missing_ok=True)
    lock.hardlink_to(target)
    return target


@pytest.mark.parametrize("checked", [True, False])
def test_a_device_answers_nothing_through_a_link(
    fleet: Any, tmp_path: Path, refusals: list[str], monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    target = place(fleet.state_dir(VICTIM).folder / DEVICE_LOCK, tmp_path)
    if not checked:
        monkeypatch.setattr(storage, "_require_own_file", lambda lock: None)
    (record,) = fleet.federate(fleet.grid())
    assert len(record.survivors) == (7 if checked else 8)
    assert refusals == (["session.lock"] if checked else [])
    assert target.read_bytes() == b"content"


@pytest.mark.parametrize("kind", ["hard", "symbolic", "dangling"])
def test_a_coordinator_does_not_run_through_a_link(fleet: Any, tmp_path: Path, kind: str) -> None:
    lock = fleet.out / "coordinator" / RUN_LOCK
    target = place(lock, tmp_path)
    if kind != "hard":
        lock.unlink()
        lock.symlink_to(target if kind == "symbolic" else tmp_path / "created")
    with refused(ConfigError, "run.lock"):
        fleet.federate(fleet.grid())
    assert target.read_bytes() == b"content"
    assert not (tmp_path / "created").exists()
    assert not fleet.registry().rounds()


def test_without_the_check_a_coordinator_holds_a_file_of_somebody_else(
    fleet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = place(fleet.out / "coordinator" / RUN_LOCK, tmp_path)
    monkeypatch.setattr(storage, "_require_own_file", lambda lock: None)
    held = list[bool]()

    def app(message: Message, context: Context) -> Message:
        with pytest.raises(Timeout), FileLock(target, blocking=False):
            pass
        held.append(True)
        return client_app(message, context)

    (record,) = fleet.federate(fleet.grid(app=app))
    assert len(record.survivors) == 8
    assert held
