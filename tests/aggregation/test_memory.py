"""The memory that a contribution takes, besides its numbers."""

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from aggregation import ring

CONSTANT = 3 * 2**20  # bytes: blocks, keys, messages


@pytest.mark.parametrize("bits", [16, 22, 24, 32])
def test_a_device_needs_three_times_its_vector(
    fleet_of: Callable[..., Any], spec_of: Callable[..., Any], vector_of: Callable[..., Any], bits: int
) -> None:
    size = 2 * 10**6
    fleet = fleet_of(4, spec=spec_of(4, vector=vector_of(4, size=size, bits=bits)))
    name, (_, plans) = "device-000", fleet.begin(fleet.establish())
    planned = fleet.states[name].on_plan(fleet.devices[name], plans[name])
    values, rng = fleet.values(name), np.random.default_rng(1)
    tracemalloc.start()
    planned.contribute(fleet.devices[name], fleet.spec.vector.encode(values, rng))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * ring.zeros(size, bits).nbytes + CONSTANT


def test_the_coordinator_holds_one_vector_however_many_arrive(
    fleet_of: Callable[..., Any], spec_of: Callable[..., Any], vector_of: Callable[..., Any]
) -> None:
    size = 10**6
    fleet = fleet_of(6, spec=spec_of(6, vector=vector_of(6, size=size)))
    state, plans = fleet.begin(fleet.establish())
    tracemalloc.start()
    for name in sorted(plans):
        body = fleet.contribute(name, plans[name])
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        state = state.on_masked_input(name, body)
        _, peak = tracemalloc.get_traced_memory()
        assert peak - before < CONSTANT
        del body
    tracemalloc.stop()
    assert len(state.vectors) == 6
