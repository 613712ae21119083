"""A cohort of SuperNodes, on Flower's own grid, and light devices, over the gateway."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.app import joined, run
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.formats.keyfiles import TLS_CERTIFICATE, TLS_KEY
from tests.support.flowerlink import living
from tests.support.gateway import HOST, attending, authority_of, free_port, server_tls, wait_until


def test_supernodes_and_light_devices_make_rounds_together(fleet_of: Callable[..., Any], link: Any) -> None:
    fleet, port = fleet_of(5, rounds=2), free_port()
    tls, folder = server_tls(authority_of(fleet)), fleet.out / "coordinator"
    (folder / TLS_KEY).write_bytes(tls.key)
    (folder / TLS_CERTIFICATE).write_bytes(tls.certificate)
    everyone = [Path(state_dir) for state_dir in fleet.nodes.values()]
    state_dir = CoordinatorStateDir.open(folder)
    with (
        living(link, map(str, everyone[:3])),
        joined(link.grid, state_dir, f"{HOST}:{port}") as grid,
        attending(port, everyone[3:]),
    ):
        wait_until(lambda: len([*grid.get_node_ids()]) == 5)
        records = list(run(state_dir, grid))
    state_dir.registry.close()
    names = tuple(path.name for path in everyone)
    assert [(record.survivors, record.dropped) for record in records] == [(names, {}), (names, {})]
