"""From an empty folder to audited rounds by commands alone: nobody writes a key, a setting or a manifest by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from client.node.app import app as client_app
from coordinator.app import run
from coordinator.statedir import CoordinatorStateDir
from coordinator.transport import SERVER_NODE
from simulations.engine.grid import FaultModel, InProcessGrid
from tests.support.trial import COORDINATOR, call, make_trial_fleet

DEVICES = ("garage", "hall", "kitchen")
PHRASES = [("Light", "turn on the light"), ("Music", "play music"), ("Timer", "set a timer")]
EXAMPLES = [
    ("switch the lamp on", 0, "train"),
    ("play the song", 1, "train"),
    ("wake me in ten minutes", 2, "train"),
    ("make it bright", 0, "validation"),
]


@pytest.fixture
def fleet(tmp_path: Path, tiny_base: Any, one_thread: None) -> Path:
    make_trial_fleet(tmp_path, str(tiny_base.folder), PHRASES, dict.fromkeys(DEVICES, EXAMPLES), "rounds=2", rank=2)
    return tmp_path


def test_a_fleet_made_by_commands_runs_its_rounds_and_passes_the_audit(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state_dir = CoordinatorStateDir.open(fleet / COORDINATOR)
    nodes = {number: str(fleet / device) for number, device in enumerate(DEVICES, SERVER_NODE + 1)}
    records = list(run(state_dir, InProcessGrid(client_app, nodes, FaultModel(0, 0.0, 1.0))))
    state_dir.registry.close()
    assert [(record.survivors, record.dropped, record.version) for record in records] == [
        (DEVICES, {}, 1),
        (DEVICES, {}, 2),
    ]
    capsys.readouterr()
    call("coordinator", "status", fleet / COORDINATOR, "--json")
    status = json.loads(capsys.readouterr().out)
    assert (status["rounds_done"], status["rounds_wanted"], status["versions"][-1]["version"]) == (2, 2, 2)
    call("audit", "verify", fleet / COORDINATOR, "--authority", fleet / "authority" / "authority.pem", "--json")
    assert json.loads(capsys.readouterr().out)["ok"]


def test_no_secret_leaves_the_directory_of_its_owner(fleet: Path) -> None:
    secret = {path for path in fleet.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()}
    owned = {fleet / "authority" / "authority.key", fleet / COORDINATOR / "signing.pem"}
    assert secret == owned | {fleet / device / "identity.pem" for device in DEVICES}
    assert {path.stat().st_mode & 0o077 for path in secret} == {0}
