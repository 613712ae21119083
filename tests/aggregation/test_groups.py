"""Groups of a round: how they are dealt, their sums, and what a device demands of each of them."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation import envelope, groups, ring
from aggregation.errors import ConfigError, ProtocolError
from aggregation.messages import Assignment, Plan, Survivors, Unmask
from aggregation.policy import Policy
from aggregation.server import Confirming, RoundAborted
from aggregation.session import COORDINATOR
from aggregation.spec import Adversary, Grouping
from tests.support import refused
from tests.support.fleet import ADAPTER, BASE, make_fleet, session_spec

DEVICES, COUNT, LEAST = 13, 3, 3
ids = st.lists(st.text("abcdef0123456789", min_size=1, max_size=4), min_size=1, max_size=40, unique=True)


def fleet_of(**changes: Any) -> Any:
    """Thirteen devices in groups of 5, 4 and 4, of which a sum needs 3."""
    spec = session_spec(DEVICES, grouping=Grouping(COUNT, LEAST), threshold=8, minimum_survivors=8)
    policy = Policy(
        known_bases=frozenset({BASE}), minimum_cohort=3, minimum_survivors=2, minimum_ring_bits=8, corrupt_fraction=0
    )
    return make_fleet(DEVICES, spec=replace(spec, **changes), policy=policy)


def by_group(fleet: Any) -> list[list[str]]:
    dealt = groups.deal(ADAPTER, sorted(fleet.devices), COUNT)
    return [[name for name, number in sorted(dealt.items()) if number == each] for each in range(COUNT)]


@given(ids, st.integers(1, 9), st.binary(min_size=32, max_size=32))
def test_a_deal_is_even_and_follows_from_adapter_and_ids_alone(names: list[str], count: int, seed: bytes) -> None:
    dealt = groups.deal(seed.hex(), names, count)
    assert dealt == groups.deal(seed.hex(), reversed(names), count)
    sizes = Counter(dealt.values())
    assert set(dealt) == set(names)
    assert max(sizes.values()) - min(sizes[number] for number in range(count)) <= 1


def test_each_adapter_deals_anew() -> None:
    names = [f"device-{number}" for number in range(12)]
    together = sum(dealt["device-0"] == dealt["device-1"] for dealt in (
        groups.deal(f"{number:064x}", names, 3) for number in range(600)
    ))  # fmt: skip
    assert 120 < together < 210  # 3 of 11 others are in one's group: 164 of 600, with a deviation of 11


@pytest.mark.parametrize(("rounds", "solved"), [(1, 3), (9, 19), (10, 20)])
def test_sums_of_equal_updates_in_other_groups_each_round_give_those_of_single_devices(
    rounds: int, solved: int
) -> None:
    """What the threat model says of an adapter that hardly moves: 1 + R (g - 1) equations for 20 updates."""
    names = [f"device-{number}" for number in range(20)]
    dealt = [groups.deal(f"{number:064x}", names, 3) for number in range(rounds)]
    members = np.array([[each[name] == group for name in names] for each in dealt for group in range(3)], float)
    assert np.linalg.matrix_rank(members) == solved
    updates = np.random.default_rng(0).standard_normal(len(names))
    found, *_ = np.linalg.lstsq(members, members @ updates, rcond=None)
    assert np.allclose(found, updates) == (solved == len(names))


@pytest.mark.parametrize("dropouts", [{}, {"input": 1}, {"survivors": 1, "unmask": 1}])
def test_each_group_has_the_exact_sum_of_its_survivors(dropouts: dict[str, int]) -> None:
    fleet = fleet_of()
    gone = {step: [group[0] for group in by_group(fleet)][:count] for step, count in dropouts.items()}
    session, result = fleet.round(fleet.establish(), gone)
    fleet.assert_sum(result)
    assert len(result.sums) == COUNT
    for group, found in zip(by_group(fleet), result.sums, strict=True):
        assert found.survivors == tuple(name for name in group if name not in gone.get("input", ()))
        weight = sum(fleet.plain[name]["weight"][0] for name in found.survivors)
        assert found.values["weight"][0] == weight
    assert result.survivors == tuple(name for name in sorted(fleet.devices) if name not in gone.get("input", ()))
    _, other = fleet.round(session)
    assert other.survivors == tuple(sorted(fleet.devices))


def test_the_sum_of_some_of_a_group_stays_masked() -> None:
    fleet = fleet_of()
    state, plans = fleet.begin(fleet.establish())
    inputs = {name: fleet.contribute(name, plans[name]) for name in plans}
    planned = {name: fleet.spec.vector.encode(fleet.plain[name], np.random.default_rng(0)) for name in plans}
    for name in inputs:
        state = state.on_masked_input(name, inputs[name])
    for group, total in zip(by_group(fleet), state.totals, strict=True):
        plain = sum(planned[name] for name in group)
        assert not np.array_equal(plain[-1:], total[-1:])  # the weight is exact, and the self masks are on it
    assert len({ring.digest(total, 24) for total in state.totals}) == COUNT


def test_the_masks_of_another_group_are_not_on_a_vector() -> None:
    fleet = fleet_of()
    state, _ = fleet.begin(fleet.establish())
    session, first = state.established.session, by_group(fleet)[0]
    assert set(groups.mask_peers(session, state.plan, first[0], state.plan.members)) == set(first[1:])


# What a device refuses


def sizes(members: list[str], former: list[str]) -> list[int]:
    dealt = groups.deal(ADAPTER, [*members, *former], COUNT)
    return [sum(dealt[name] == number for name in members) for number in range(COUNT)]


def changed_plan(fleet: Any, name: str, plan: bytes, **changes: Any) -> bytes:
    message = fleet.devices[name].open_verified(Assignment, plan)
    return envelope.sign(fleet.key, replace(message, plan=replace(message.plan, **changes)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"former": ("device-000",)}, "plan.former"),  # a member, too
        ({"former": ("gone-2", "gone-1")}, "plan.former"),
        ({"former": ("gone-1", "gone-1")}, "plan.former"),
        (
            {"former": tuple(f"gone-{number:02d}" for number in range(60))},
            "plan.group",
        ),  # crowds members out of a group
    ],
)
def test_a_plan_with_bad_groups_is_refused(changes: dict[str, Any], about: str) -> None:
    fleet = fleet_of()
    _, plans = fleet.begin(fleet.establish())
    name = "device-001"
    if about == "plan.group":  # the names that leave one group with two members
        members = sorted(fleet.devices)
        names = (f"gone-{number:04d}" for number in range(10_000))
        former: list[str] = []
        while (
            min(Counter(groups.deal(ADAPTER, [*members, *former], COUNT)[each] for each in members).values()) >= LEAST
        ):
            former.append(next(names))
        changes = {"former": tuple(former)}
    with refused(ProtocolError, about, peer=COORDINATOR):
        fleet.states[name].on_plan(fleet.devices[name], changed_plan(fleet, name, plans[name], **changes))
    fleet.contribute(name, plans[name])  # and its state is as before


def test_former_members_without_groups_are_refused() -> None:
    fleet = make_fleet(5)
    _, plans = fleet.begin(fleet.establish())
    with refused(ProtocolError, "plan.former", peer=COORDINATOR):
        changed = changed_plan(fleet, "device-001", plans["device-001"], former=("gone",))
        fleet.states["device-001"].on_plan(fleet.devices["device-001"], changed)


def test_a_survivor_set_that_leaves_a_group_below_its_minimum_is_refused() -> None:
    fleet = fleet_of()
    state, bodies = fleet.collect(fleet.establish())
    group, name = by_group(fleet)[1], by_group(fleet)[0][0]
    message = fleet.devices[name].open_verified(Survivors, bodies[name])
    left = {each: vector for each, vector in message.vectors.items() if each not in group[2:]}
    assert len(left) >= fleet.spec.minimum_survivors
    with refused(ProtocolError, "survivors.group", peer=COORDINATOR, value=2):
        body = envelope.sign(fleet.key, Survivors(message.plan, left))
        fleet.states[name].on_survivors(fleet.devices[name], body)
    assert isinstance(state, Confirming)


def test_an_unmask_request_with_too_few_signatures_of_a_group_is_refused() -> None:
    fleet = fleet_of()
    state, bodies = fleet.collect(fleet.establish())
    _, requests = fleet.confirm(state, bodies)
    group, name = by_group(fleet)[1], by_group(fleet)[0][0]
    message = fleet.devices[name].open_verified(Unmask, requests[name])
    assert set(message.consistency_signatures) == set(fleet.devices)  # all, not a quorum of them
    left = {each: raw for each, raw in message.consistency_signatures.items() if each not in group[2:]}
    assert len(left) >= fleet.spec.quorum
    with refused(ProtocolError, "unmask.group", peer=COORDINATOR, value=2):
        fleet.states[name].on_unmask(fleet.devices[name], envelope.sign(fleet.key, Unmask(message.survivors, left)))


# What the coordinator does


def test_a_round_ends_where_a_group_has_too_few() -> None:
    for step, bound in (("input", False), ("survivors", True)):
        fleet = fleet_of()
        ended = fleet.round(fleet.establish(), {step: by_group(fleet)[2][:2]})
        assert isinstance(ended, RoundAborted)
        assert "group 3 has 2" in ended.detail
        assert bool(ended.unmasked) is bound  # devices that signed help to no sum over others
        assert bool(ended.named) is bound


def test_a_repeated_round_has_the_groups_of_the_first_without_a_device_that_is_gone() -> None:
    fleet = fleet_of()
    session, gone = fleet.establish(), by_group(fleet)[0][0]
    dealt = sorted(fleet.devices)
    state, _ = session.plan(
        adapter_version=1,
        adapter_digest=ADAPTER,
        training=b"",
        cohort=[name for name in dealt if name != gone],
        dealt=dealt,
    )
    assert state.plan.former == (gone,)
    after = groups.split(fleet.spec, state.plan, state.plan.members)
    assert [list(group) for group in after] == [[name for name in group if name != gone] for group in by_group(fleet)]


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"grouping": Grouping(7, 2)}, "spec.grouping.count"),
        ({"grouping": Grouping(2, 3), "adversary": Adversary.HONEST_BUT_CURIOUS}, "spec.grouping.adversary"),
    ],
)
def test_groups_that_a_session_cannot_have_are_refused(changes: dict[str, Any], about: str) -> None:
    with refused(ConfigError, about):
        session_spec(DEVICES, **changes)


@pytest.mark.parametrize("numbers", [(1, 3), (3, 1), (0, 2)])
def test_one_group_or_a_group_of_one_is_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(ConfigError):
        Grouping(*numbers)


def test_the_digest_of_a_round_covers_each_sum_and_their_order() -> None:
    spec, one, two = session_spec(DEVICES, grouping=Grouping(2, 3)), ring.zeros(8, 24), ring.zeros(8, 24)
    two[0] = 1
    assert len({groups.digest_of(spec, totals) for totals in ((one, two), (two, one), (one, one))}) == 3
    assert groups.digest_of(session_spec(DEVICES), (two,)) == ring.digest(two, 24)


def test_devices_that_a_plan_does_not_deal_are_in_no_group() -> None:
    spec = session_spec(DEVICES, grouping=Grouping(2, 3))
    plan = Plan(bytes(32), 1, ("a", "b", "c"), 1, ADAPTER, b"")
    assert sorted(sum(groups.split(spec, plan, ("a", "c", "x")), ())) == ["a", "c"]


def test_an_offer_whose_groups_the_corrupt_devices_could_fill_is_refused() -> None:
    fleet = make_fleet(DEVICES, spec=session_spec(DEVICES, grouping=Grouping(3, 3), threshold=8, minimum_survivors=8))
    with refused(ProtocolError, "offer.minimum_survivors", peer=COORDINATOR, value=3):  # 2 of 13 may be corrupt
        fleet.establish()
