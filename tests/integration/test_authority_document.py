"""The commands of docs/how-to/enrol-devices.md, run from top to bottom in an empty folder, enrol and revoke devices."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from aggregation.errors import TrustError
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey
from client.node.statedir import DeviceStateDir

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "how-to" / "enrol-devices.md"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("openssl") is None, reason="the page makes the coordinator's key with openssl")
def test_a_fleet_is_enrolled_by_hand_as_the_page_says(tmp_path: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert len(blocks) > 5
    command = tmp_path / "bin" / "edgeadapt"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m edgeadapt "$@"\n')
    command.chmod(0o755)
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        ["sh", "-euc", "\n".join(blocks)],
        cwd=tmp_path / "work",
        env={**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    work, now = tmp_path / "work", datetime.now(UTC)
    state_dir = DeviceStateDir.open(work / "kitchen")
    root = state_dir.root()
    assert root.der == Root.from_pem((work / "coordinator" / "authority.pem").read_bytes()).der
    assert root.verify(state_dir.certificate, now)[0] == "kitchen"
    assert root.revoked is not None
    assert root.revoked.number == 3
    assert len(root.revoked.revoked) == 1
    device = state_dir.device("a" * 64)
    signing = IdentityKey.from_pem((work / "coordinator" / "signing.pem").read_bytes())
    assert device.coordinator == signing.public
    assert stat.S_IMODE((work / "authority" / "authority.key").stat().st_mode) == 0o600
    with pytest.raises(TrustError):
        IdentityKey.from_pem((work / "authority" / "authority.key").read_bytes())
    listed = subprocess.run(
        [sys.executable, "-m", "edgeadapt", "authority", "list", str(work / "authority"), "--json"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    statuses = {each["name"]: each["status"] for each in json.loads(listed.stdout)["certificates"]}
    assert statuses == {"kitchen": "valid", "garage": "revoked (keyCompromise)"}
