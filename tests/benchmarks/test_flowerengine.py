"""The same apps on Flower's simulation engine."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import EdgeAdaptError
from benchmarks.simulation.flowerengine import CLUSTER, federate_on_ray
from tests.support import FleetOf

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]


def test_flowers_engine_makes_the_adapters_of_the_in_process_one_and_errors_reach_the_caller(fleet_of: FleetOf) -> None:
    there, here = fleet_of(4, rounds=2), fleet_of(4, rounds=2)
    records: list[Any] = []

    def done(record: Any) -> None:
        records.append(record)
        if record.round == 2:
            raise EdgeAdaptError("of the second round")

    with pytest.raises(EdgeAdaptError, match="of the second round"):
        federate_on_ray(there.out / "coordinator", [Path(folder) for folder in there.nodes.values()], done)
    assert [len(record.survivors) for record in records] == [4, 4]
    assert [record.adapter for record in records] == [record.adapter for record in here.federate(here.grid())]


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Ray cluster of two nodes with a core each, started by Ray's command line as on two machines."""
    import ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_ENABLE_MULTIPLE_NODES_ON_SAME_HOST", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv(CLUSTER, f"127.0.0.1:{port}")
    with ExitStack() as stack:
        for role in (("--head", f"--port={port}", "--include-dashboard=false"), (f"--address=127.0.0.1:{port}",)):
            log = stack.enter_context((tmp_path / "ray.log").open("ab"))
            # In the foreground: ended by its signal, and no other node of this machine with it.
            command = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1")
            node = subprocess.Popen([*command, "--object-store-memory=100000000", *role], stdout=log, stderr=log)
            stack.callback(node.wait, 60)
            stack.callback(node.terminate)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                ray.init(logging_level="ERROR")
            except ConnectionError:
                time.sleep(1)
                continue
            cores = [node["Resources"].get("CPU") for node in ray.nodes() if node["Alive"]]
            ray.shutdown()
            if cores == [1.0, 1.0]:
                break
        else:
            pytest.fail((tmp_path / "ray.log").read_text())
        yield


@pytest.mark.exhaustive
@pytest.mark.usefixtures("two_nodes")
def test_a_cluster_of_two_nodes_makes_the_adapters_of_one_machine(fleet_of: FleetOf) -> None:
    there, here = fleet_of(4, rounds=2), fleet_of(4, rounds=2)
    done: list[Any] = []
    federate_on_ray(there.out / "coordinator", [Path(folder) for folder in there.nodes.values()], done.append)
    records = here.federate(here.grid())
    assert [record.adapter for record in done] == [record.adapter for record in records]
