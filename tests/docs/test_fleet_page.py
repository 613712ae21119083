"""The page on a fleet: a SuperNode and light devices in one cohort, from an empty folder to a device that answers."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.statedir import CoordinatorStateDir
from tests.support.gateway import free_port, wait_until

SUPERNODE = "office"
DEVICES = {"garage", "hall", "kitchen", SUPERNODE}


def processes_in(folder: Path) -> list[int]:
    """Processes that name the folder on their command line or in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            known = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:  # another user's, or gone
            continue
        if os.fsencode(folder) in known and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


@pytest.mark.slow
def test_the_page_trains_a_supernode_and_light_devices_in_one_cohort_and_exports_the_result(
    reader: Any, blocks: Callable[[str], list[Any]], tiny_base: Any
) -> None:
    commands = "\n".join(block.commands for block in blocks("how-to/fleet.md"))
    for port in ("9443", "9444", "8000", "9101"):
        commands = commands.replace(port, str(free_port()))
    commands = commands.replace("rounds=2", "rounds=1")  # Flower starts a process for each message
    try:
        shown = reader.run(f"BASE='{tiny_base.folder}'\n{commands}")
        state_dir = CoordinatorStateDir.open(reader.folder / "fleet")
        records = state_dir.registry.rounds()
        state_dir.registry.close()
        (record,) = records
        assert {*record.survivors, *record.dropped} == DEVICES  # much other work may let a light device drop out
        assert SUPERNODE in record.survivors
        assert "bundle: global version 1" in shown
        promoted = shown.partition("canary")[2]
        assert "parity of global" in promoted
        assert (reader.folder / "phone" / "bundle" / "adapters" / "global.json").is_file()
        wait_until(lambda: not processes_in(reader.folder), seconds=120)
    finally:
        for process in processes_in(reader.folder):
            os.kill(process, signal.SIGKILL)
