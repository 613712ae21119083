"""The page on the gateway: from an empty folder to audited rounds of light devices, by its own commands."""

from collections.abc import Callable
from typing import Any

import pytest

from coordinator.statedir import CoordinatorStateDir
from tests.support.gateway import free_port


@pytest.mark.slow
def test_the_page_makes_a_fleet_and_its_rounds(reader: Any, blocks: Callable[[str], list[Any]], tiny_base: Any) -> None:
    commands = "\n".join(block.commands for block in blocks("how-to/gateway.md"))
    for port in ("9443", "9444"):
        commands = commands.replace(port, str(free_port()))
    shown = reader.run(f"BASE='{tiny_base.folder}'\n{commands}")
    assert shown.count("is enrolled until") == 3
    state_dir = CoordinatorStateDir.open(reader.folder / "fleet")
    records = state_dir.registry.rounds()
    state_dir.registry.close()
    assert [(record.survivors, record.dropped) for record in records] == [(("garage", "hall", "kitchen"), {})] * 2
