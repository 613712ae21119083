"""The coordinator and k devices of one group subtract what they know from its sum.

A coordinator can look for a deal that puts its devices into one group: it names former members, which count in a deal.
Then it lets others of that group drop out, down to the group's minimum m. The sum shows m - k honest devices. A device
assumes just that of its cohort's corrupt devices when it reads an offer.
"""

from itertools import combinations
from typing import Any

import pytest

from aggregation import groups
from aggregation.errors import ProtocolError
from aggregation.policy import Policy
from aggregation.spec import Grouping
from tests.support import refused
from tests.support.fleet import ADAPTER, BASE, make_fleet, session_spec

DEVICES, COUNT, LEAST, HONEST = 18, 2, 6, 4
FORMER = 3


def spec_of(least: int = LEAST) -> Any:
    return session_spec(DEVICES, grouping=Grouping(COUNT, least), threshold=13, minimum_survivors=13)


def policy_of(corrupt: int, **changes: Any) -> Policy:
    """Of a device that assumes so many corrupt ones in the cohort."""
    limits = {"minimum_cohort": 8, "minimum_survivors": HONEST, "minimum_ring_bits": 8}
    return Policy(known_bases=frozenset({BASE}), corrupt_fraction=corrupt / DEVICES, **limits | changes)


@pytest.mark.parametrize("least", range(2, 10))
def test_a_device_refuses_exactly_the_groups_whose_sums_leave_too_few(least: int) -> None:
    """Of all numbers of colluding devices: the fewest honest ones of any group of any deal that may be unmasked."""
    spec, size = spec_of(least), DEVICES // COUNT
    for corrupt in range(5):
        names = range(size)
        colluding = set(range(min(corrupt, size)))
        left = min(
            len(set(present) - colluding) for count in range(least, size + 1) for present in combinations(names, count)
        )
        if left < HONEST:
            with refused(ProtocolError, "offer.minimum_survivors", value=least):
                policy_of(corrupt).check(spec, DEVICES)
        else:
            policy_of(corrupt).check(spec, DEVICES)


def searched(names: list[str], colluding: int) -> tuple[tuple[str, ...], int]:
    """Former members with which the colluding devices, the first ones, are in one group; and that group."""
    for number in range(10_000):
        former = tuple(sorted(f"gone-{number}-{each}" for each in range(FORMER)))
        group_of = groups.deal(ADAPTER, [*names, *former], COUNT)
        if len({group_of[name] for name in names[:colluding]}) == 1:
            return former, group_of[names[0]]
    raise AssertionError("no such deal")


@pytest.mark.parametrize("colluding", range(LEAST))
def test_the_sum_of_a_group_less_what_colluding_devices_know_is_of_its_minimum_less_them(colluding: int) -> None:
    """In a session with devices that assume nobody colludes: what the check above stands for."""
    fleet = make_fleet(DEVICES, spec=spec_of(), policy=policy_of(0, minimum_survivors=2))
    names = sorted(fleet.devices)
    former, number = searched(names, max(colluding, 1))
    established = fleet.establish()
    state, plans = established.plan(
        adapter_version=1, adapter_digest=ADAPTER, training=b"", cohort=None, dealt=[*names, *former]
    )
    group = groups.split(fleet.spec, state.plan, names)[number]
    mine = [name for name in group if name in names[:colluding]]
    present = [*mine, *(name for name in group if name not in mine)][:LEAST]
    for name in set(names) - (set(group) - set(present)):
        state = state.on_masked_input(name, fleet.contribute(name, plans[name]))
    state, bodies = state.close()
    state, bodies = fleet.confirm(state, bodies)
    _, result = fleet.open(state, bodies)
    found = result.sums[number]
    assert set(found.survivors) == set(present)
    known = sum(fleet.plain[name]["weight"][0] for name in mine)
    honest = [name for name in present if name not in mine]
    assert len(honest) == LEAST - colluding
    assert found.values["weight"][0] - known == sum(fleet.plain[name]["weight"][0] for name in honest)
