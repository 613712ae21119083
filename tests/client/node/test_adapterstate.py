"""Old adapters, second adapters of a version and used-up adapters are refused; every honest order of plans is not."""

from collections.abc import Container, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.entropy import SystemEntropy
from aggregation.errors import ProtocolError, TrustError
from aggregation.messages import Plan
from aggregation.pki.identity import IdentityKey
from aggregation.spec import Grouping, SessionSpec
from client.node import adapterstate
from client.node.adapterstate import ADAPTER_STATE, EARLIER, AdapterState, earlier, terms
from client.node.statedir import ADAPTERS, DeviceSettings, DeviceStateDir
from tests.support import refused
from tests.support.fleet import session_spec

A, B = "aa" * 32, "bb" * 32
ALL = tuple(f"device-{number:02d}" for number in range(20))


def plan(version: int, digest: str = A, round_: int = 1) -> Plan:
    return Plan(bytes(32), round_, ("a", "b"), version, digest, b"")


ALL_SERIALS = {name: 100 + number for number, name in enumerate(ALL)}
SPEC = session_spec(20)
TERMS = terms(plan(0), SPEC)


def on_plan(known: AdapterState | None, each: Plan, repeats: int, spec: SessionSpec = SPEC) -> AdapterState:
    return adapterstate.on_plan(known, each, spec, repeats)


def on_survivors(
    known: AdapterState | None, each: Plan, survivors: Iterable[str] = ALL, revoked: Container[int] = ()
) -> AdapterState:
    """``revoked``: serials. A device has the number in its name, plus 100, as its serial."""
    return adapterstate.on_survivors(known, each, SPEC, {name: ALL_SERIALS.get(name, 0) for name in survivors}, revoked)


def after(known: AdapterState | None, *unmasked: Plan, repeats: int = 1) -> AdapterState:
    """The state after rounds that were all unmasked, over all devices."""
    for each in unmasked:
        known = on_survivors(on_plan(known, each, repeats), each)
    assert known is not None
    return known


def test_the_first_plan_may_have_any_version() -> None:
    assert on_plan(None, plan(7), 0) == AdapterState(7, A, TERMS)


def test_an_adapter_that_is_older_than_the_last_one_is_refused() -> None:
    known = after(None, plan(3), plan(4, B))
    with refused(ProtocolError, "plan.adapter_version", peer="coordinator", value=3):
        on_plan(known, plan(3), 9)
    with refused(ProtocolError, "plan.adapter_version", peer="coordinator", value=3):
        on_plan(known, plan(3, B), 9)


def test_a_second_adapter_of_a_version_is_refused() -> None:
    with refused(ProtocolError, "plan.adapter_version", peer="coordinator", value=3):
        on_plan(on_plan(None, plan(3), 9), plan(3, B), 9)


def test_rounds_that_were_not_unmasked_do_not_count() -> None:
    known = on_plan(None, plan(3), 0)
    for _ in range(20):
        known = on_plan(known, plan(3), 0)
    assert on_survivors(known, plan(3)) == AdapterState(3, A, TERMS, 1, ALL_SERIALS)


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_an_adapter_is_used_up_after_so_many_repeats(repeats: int) -> None:
    known = after(None, *[plan(3)] * (1 + repeats), repeats=repeats)
    with refused(ProtocolError, "plan.repeats", peer="coordinator", value=1 + repeats):
        on_plan(known, plan(3), repeats)
    assert on_plan(known, plan(4, B), repeats) == AdapterState(4, B, TERMS, earlier=(bytes.fromhex(A),))


def test_the_same_bytes_under_a_later_number_are_the_same_adapter() -> None:
    known = after(None, plan(3), plan(5))
    with refused(ProtocolError, "plan.repeats", value=2):
        on_plan(known, plan(9), 1)
    with refused(ProtocolError, "plan.adapter_version"):
        on_plan(known, plan(4), 9)


def test_an_adapter_is_refused_once_another_one_came_after_its_sums() -> None:
    known = after(None, plan(3), plan(4, B))
    for state in (known, on_plan(known, plan(5, "cc" * 32), 9)):
        with refused(ProtocolError, "plan.adapter_digest", peer="coordinator", value=6):
            on_plan(state, plan(6), 9)
    unsummed = on_plan(on_plan(None, plan(3), 9), plan(4, B), 9)
    assert on_plan(unsummed, plan(5), 9).digest == A


def test_so_many_adapters_are_remembered_and_no_more() -> None:
    known = after(None, *[plan(version, f"{version:064x}") for version in range(EARLIER + 2)])
    assert [int.from_bytes(each) for each in earlier(known)] == list(range(2, EARLIER + 2))
    assert ADAPTER_STATE.decode(ADAPTER_STATE.encode(known)) == known
    with refused(ProtocolError, "plan.adapter_digest"):
        on_plan(known, plan(EARLIER + 2, f"{2:064x}"), 9)
    assert on_plan(known, plan(EARLIER + 2, f"{1:064x}"), 9).sums == 0


@pytest.mark.parametrize("known", [None, AdapterState(2, B, TERMS), AdapterState(4, B, TERMS, 1, ALL_SERIALS)], ids=str)
def test_a_device_reveals_no_shares_for_an_adapter_that_it_does_not_remember(known: AdapterState | None) -> None:
    """It was stopped between the two saves of a later plan: it does not know what it revealed for the earlier one."""
    with refused(ProtocolError, "survivors.adapter", peer="coordinator", value=3):
        on_survivors(known, plan(3))


OTHERS = pytest.mark.parametrize(
    ("survivors", "differing"),
    [
        (ALL[1:], 1),
        ((*ALL, "another"), 1),
        (ALL[10:], 10),
        ((*ALL[2:], "another", "and another"), 4),
        ([f"other-{name}" for name in ALL], 40),
    ],
)


@OTHERS
def test_a_second_sum_over_other_devices_is_refused(survivors: Iterable[str], differing: int) -> None:
    known = after(None, plan(3))
    for repeated in (known, on_survivors(known, plan(3))):
        with refused(ProtocolError, "survivors.repeat", peer="coordinator", value=differing):
            on_survivors(repeated, plan(3), survivors)
    assert {*on_survivors(on_plan(known, plan(4, B), 1), plan(4, B), survivors).survivors} == {*survivors}


def test_a_later_sum_may_lack_devices_that_were_revoked_and_no_others() -> None:
    known, revoked = after(None, plan(3)), {100, 101, 105}
    less = on_survivors(known, plan(3), ALL[2:], revoked)
    assert less == AdapterState(3, A, TERMS, 2, {name: ALL_SERIALS[name] for name in ALL[2:]})
    for survivors in (ALL[3:], (*ALL[2:], "another")):
        with refused(ProtocolError, "survivors.repeat", value=1):
            on_survivors(known, plan(3), survivors, revoked)
    with refused(ProtocolError, "survivors.repeat", value=2):  # those that it lacks do not come back
        on_survivors(less, plan(3), ALL, revoked)


def test_a_device_whose_certificate_was_renewed_is_in_the_set_under_its_name() -> None:
    renewed = {**ALL_SERIALS, ALL[0]: 7}
    known = adapterstate.on_survivors(after(None, plan(3)), plan(3), SPEC, renewed, {100})
    assert known == AdapterState(3, A, TERMS, 2, renewed)
    with refused(ProtocolError, "survivors.repeat", value=1):
        on_survivors(known, plan(3), ALL[1:], {100})
    assert on_survivors(known, plan(3), ALL[1:], {7, 100}).sums == 3


@pytest.mark.parametrize("change", [{"clip_norm": 3.9}, {"weight_cap": 99}, {"training": b"other"}], ids=str)
def test_a_repeat_on_other_terms_is_refused(change: dict[str, Any]) -> None:
    spec, other = (SPEC, replace(plan(3), **change)) if "training" in change else (replace(SPEC, **change), plan(3))
    assert on_plan(on_plan(None, plan(3), 1), other, 1, spec).terms == terms(other, spec)  # no sum was unmasked
    with refused(ProtocolError, "plan.terms", peer="coordinator"):
        on_plan(after(None, plan(3)), other, 1, spec)
    assert on_plan(after(None, plan(3)), replace(other, adapter_version=4, adapter_digest=B), 1, spec).sums == 0


@given(st.lists(st.integers(0, 2), max_size=30))
def test_a_coordinator_that_repeats_failed_rounds_within_the_limit_is_never_refused(failures: list[int]) -> None:
    """Each entry: how often the round failed after the unmask request, before it made the next version."""
    known: AdapterState | None = None
    for version, failed in enumerate(failures):
        digest = f"{version:064x}"
        known = after(known, *[plan(version, digest)] * (failed + 1), repeats=2)
    if known is not None:
        assert ADAPTER_STATE.decode(ADAPTER_STATE.encode(known)) == known


def test_a_state_survives_the_process_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    identity = IdentityKey.generate(SystemEntropy())
    settings = DeviceSettings(base="some_base")
    state_dir = DeviceStateDir.create(tmp_path / "state", settings, identity, {}, SystemEntropy())
    assert state_dir.load(AdapterState) is None
    known = AdapterState(3, A, TERMS, 2, {**ALL_SERIALS, ALL[0]: 2**160 - 1})
    state_dir.save(known)
    assert DeviceStateDir.open(state_dir.folder).load(AdapterState) == known
    state_dir.save(replace(known, sums=0, survivors={}))
    assert state_dir.load(AdapterState) == AdapterState(3, A, TERMS)
    (state_dir.folder / ADAPTERS).write_bytes(b"damaged")
    with refused(TrustError, ADAPTERS) as caught:
        state_dir.load(AdapterState)
    assert "edgeadapt device forget" in str(caught.value)


def test_a_repeat_with_other_groups_is_refused() -> None:
    """Of the sums over two deals of the same devices, the difference would show a few of them."""
    spec = session_spec(20, grouping=Grouping(2, 5))
    first = replace(plan(3), members=ALL)
    known = adapterstate.on_plan(None, first, spec, 3)
    bound = adapterstate.on_survivors(known, first, spec, {name: ALL_SERIALS[name] for name in ALL[1:]}, ())
    less = replace(first, members=ALL[1:])
    for other in (less, replace(less, former=("device-99",)), replace(less, former=(ALL[0], "device-99"))):
        with refused(ProtocolError, "plan.groups"):
            adapterstate.on_plan(bound, other, spec, 3)
    for other_spec in (SPEC, session_spec(20, grouping=Grouping(3, 5))):
        with refused(ProtocolError, "plan.groups"):
            adapterstate.on_plan(bound, first, other_spec, 3)
    again = replace(less, former=ALL[:1])
    assert adapterstate.on_plan(bound, again, spec, 3).sums == 1
    assert adapterstate.on_plan(bound, replace(plan(4, B), members=ALL[1:]), spec, 3).sums == 0  # another adapter
