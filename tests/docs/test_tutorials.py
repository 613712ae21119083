"""The tutorials, one after the other in one empty folder: every command works, and prints what the page shows."""

import json
import re
import stat
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from aggregation.errors import TrustError
from aggregation.pki import Root
from aggregation.pki.identity import IdentityKey
from client.node.statedir import DeviceStateDir

PAGES = ["first-federation", "first-adapter", "first-audit"]  # each goes on in the folder of the one before


def shape(line: str) -> str:
    """A line without the numbers, digests and blanks that differ from machine to machine."""
    if line.startswith("exit code"):
        return line
    return " ".join(re.sub(r"\b[0-9a-f]{12,}\b|\d[\d,.]*|\.\d+", "#", line).split())


@pytest.mark.slow
def test_the_tutorials_do_what_they_say(reader: Any, blocks: Callable[[str], list[Any]]) -> None:
    for page in PAGES:
        found = blocks(f"tutorials/{page}.md")
        assert len(found) > 3
        for block in found:
            printed = reader.run(block.commands)
            lines = {shape(line) for line in printed.splitlines()}
            missing = [line for line in block.shown.splitlines() if "…" not in line and shape(line) not in lines]
            assert missing == [], f"{page}: {block.commands}\n{printed}"
    accuracy = json.loads((reader.folder / "runs" / "first" / "result.json").read_text())["accuracy"]
    assert accuracy["personal"]["mean"] > accuracy["local"]["mean"] + 0.03


# The page on enrolment


@pytest.mark.slow
def test_a_fleet_is_enrolled_by_hand_as_the_page_says(reader: Any, blocks: Callable[[str], list[Any]]) -> None:
    commands = [block.commands for block in blocks("how-to/enrol-devices.md")]
    assert len(commands) > 5
    reader.run("\n".join(commands))
    work, now = reader.folder, datetime.now(UTC)
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
    listed = reader.run("edgeadapt authority list authority --json")
    statuses = {each["name"]: each["status"] for each in json.loads(listed)["certificates"]}
    assert statuses == {"kitchen": "valid", "garage": "revoked (keyCompromise)"}
