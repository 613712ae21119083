"""A coordinator repeats a round from one adapter with other groups: of two sums, the difference shows one device.

It names devices that are gone, which count in the deal, until a group of the second round is one of the first without
one device.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from aggregation import groups
from aggregation.errors import ProtocolError
from aggregation.policy import Policy
from aggregation.spec import Grouping
from client.node import adapterstate
from tests.support import refused
from tests.support.fleet import ADAPTER, BASE, make_fleet, session_spec

DEVICES, COUNT = 13, 3
Groups = list[frozenset[str]]


def dealt(names: list[str], former: tuple[str, ...] = ()) -> Groups:
    group_of = groups.deal(ADAPTER, [*names, *former], COUNT)
    return [frozenset(name for name in names if group_of[name] == number) for number in range(COUNT)]


def without_one(first: Groups, second: Groups) -> Iterator[tuple[int, int, str]]:
    """A group of the first deal, one of the second, and the one device that only the first has."""
    for i, before in enumerate(first):
        for j, after in enumerate(second):
            if after < before and len(before - after) == 1:
                yield i, j, *(before - after)


def searched(names: list[str]) -> tuple[tuple[str, ...], int, int, str]:
    """Former members with which one device is alone in the difference."""
    for number in range(100_000):
        former = tuple(sorted(f"gone-{number}-{each}" for each in range(3)))
        for found in without_one(dealt(names), dealt(names, former)):
            if min(map(len, dealt(names, former))) >= 3:
                return former, *found
    raise AssertionError("no such deal")


def attack(fleet: Any, former: tuple[str, ...]) -> list[Any]:
    """The sums of two rounds from one adapter, in which each device trains alike, as far as devices take part."""
    spec, session, results, names = fleet.spec, fleet.establish(), [], tuple(sorted(fleet.devices))
    known = dict[str, Any]()
    for dealt_with in ((), (*names, *former)):
        state, plans = session.plan(
            adapter_version=1, adapter_digest=ADAPTER, training=b"settings", cohort=None, dealt=dealt_with
        )
        for name in names:
            known[name] = adapterstate.on_plan(known.get(name), state.plan, spec, 3)
            planned = fleet.states[name].on_plan(fleet.devices[name], plans[name])
            alike = {"delta": np.zeros(7), "weight": np.array([float(names.index(name))])}
            vector = spec.vector.encode(alike, np.random.default_rng(0))
            fleet.states[name], body = planned.contribute(fleet.devices[name], vector)
            state = state.on_masked_input(name, body)
        state, bodies = state.close()
        state, bodies = fleet.confirm(state, bodies)
        for name in names:
            known[name] = adapterstate.on_survivors(
                known[name], state.survivor_set.plan, spec, dict.fromkeys(names, 1), ()
            )
        session, result = fleet.open(state, bodies)
        results.append(result)
    return results


def fleet_of() -> Any:
    policy = Policy(
        known_bases=frozenset({BASE}), minimum_cohort=3, minimum_survivors=2, minimum_ring_bits=8, corrupt_fraction=0
    )
    spec = session_spec(DEVICES, grouping=Grouping(COUNT, 3), threshold=8, minimum_survivors=8)
    return make_fleet(DEVICES, spec=spec, policy=policy)


def test_a_device_refuses_the_second_round() -> None:
    fleet = fleet_of()
    former, *_ = searched(sorted(fleet.devices))
    with refused(ProtocolError, "plan.groups"):
        attack(fleet, former)


def test_without_the_check_the_difference_of_two_sums_is_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapterstate, "dealt", lambda plan, spec: bytes(32))
    fleet = fleet_of()
    former, i, j, victim = searched(sorted(fleet.devices))
    first, second = attack(fleet, former)
    assert set(first.sums[i].survivors) - set(second.sums[j].survivors) == {victim}
    shown = first.sums[i].values["weight"] - second.sums[j].values["weight"]
    assert shown == sorted(fleet.devices).index(victim)


def test_a_round_with_the_same_groups_is_helped_to() -> None:
    first, second = attack(fleet_of(), ())
    assert [each.survivors for each in first.sums] == [each.survivors for each in second.sums]
