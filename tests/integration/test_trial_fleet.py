"""From an empty folder to audited rounds by commands alone: nobody writes a key, a setting or a manifest by hand."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.trial import COORDINATOR, make_trial_fleet

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


def test_no_secret_leaves_the_directory_of_its_owner(fleet: Path) -> None:
    secret = {path for path in fleet.rglob("*") if path.is_file() and b"PRIVATE KEY" in path.read_bytes()}
    owned = {fleet / "authority" / "authority.key", fleet / COORDINATOR / "signing.pem"}
    assert secret == owned | {fleet / device / "identity.pem" for device in DEVICES}
    assert {path.stat().st_mode & 0o077 for path in secret} == {0}
