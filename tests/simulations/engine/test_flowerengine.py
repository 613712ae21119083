"""The same apps on Flower's simulation engine."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import EdgeAdaptError
from simulations.engine.flowerengine import federate_on_ray

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")]
FleetOf = Callable[..., Any]


def test_flowers_engine_makes_the_adapters_of_the_in_process_one_and_errors_reach_the_caller(fleet_of: FleetOf) -> None:
    there, here = fleet_of(4, rounds=2), fleet_of(4, rounds=2)
    done: list[Any] = []
    federate_on_ray(there.out / "coordinator", [Path(folder) for folder in there.nodes.values()], done.append)
    assert [len(record.survivors) for record in done] == [4, 4]
    records = here.federate(here.grid())
    assert [record.adapter for record in done] == [record.adapter for record in records]
    there.configure({"rounds": 3, "attempts": 1, "aggregation.minimum_devices": 9})
    with pytest.raises(EdgeAdaptError):
        federate_on_ray(there.out / "coordinator", [Path(folder) for folder in there.nodes.values()])
