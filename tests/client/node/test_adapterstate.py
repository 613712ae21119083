"""Old adapters, second adapters of a version and used-up adapters are refused; every honest order of plans is not."""

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
from aggregation.spec import SessionSpec
from client.node import adapterstate
from client.node.adapterstate import ADAPTER_STATE, AdapterState, terms
from client.node.statedir import ADAPTERS, DeviceSettings, DeviceStateDir
from tests.support import refused
from tests.support.fleet import session_spec

A, B = "aa" * 32, "bb" * 32
ALL = tuple(f"device-{number:02d}" for number in range(20))


def plan(version: int, digest: str = A, round_: int = 1) -> Plan:
    return Plan(bytes(32), round_, ("a", "b"), version, digest, b"")


SPEC = session_spec(20)
TERMS = terms(plan(0), SPEC)


def on_plan(known: AdapterState | None, each: Plan, repeats: int, spec: SessionSpec = SPEC) -> AdapterState:
    return adapterstate.on_plan(known, each, spec, repeats)


def on_survivors(known: AdapterState | None, each: Plan, survivors: tuple[str, ...], least: int) -> AdapterState:
    return adapterstate.on_survivors(known, each, SPEC, survivors, least)


def after(known: AdapterState | None, *unmasked: Plan, repeats: int = 1) -> AdapterState:
    """The state after rounds that were all unmasked, over all devices."""
    for each in unmasked:
        known = on_survivors(on_plan(known, each, repeats), each, ALL, 5)
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
    assert on_survivors(known, plan(3), ALL, 5) == AdapterState(3, A, TERMS, (ALL,))


@pytest.mark.parametrize("repeats", [0, 1, 3])
def test_an_adapter_is_used_up_after_so_many_repeats(repeats: int) -> None:
    known = after(None, *[plan(3)] * (1 + repeats), repeats=repeats)
    with refused(ProtocolError, "plan.repeats", peer="coordinator", value=1 + repeats):
        on_plan(known, plan(3), repeats)
    assert on_plan(known, plan(4, B), repeats) == AdapterState(4, B, TERMS)


def test_the_same_bytes_under_a_later_number_are_the_same_adapter() -> None:
    known = after(None, plan(3), plan(5))
    with refused(ProtocolError, "plan.repeats", value=2):
        on_plan(known, plan(9), 1)
    with refused(ProtocolError, "plan.adapter_version"):
        on_plan(known, plan(4), 9)


def test_a_device_that_forgot_its_state_within_a_round_counts_the_request_that_it_answers() -> None:
    assert on_survivors(None, plan(3), ALL, 5) == AdapterState(3, A, TERMS, (ALL,))
    assert on_survivors(AdapterState(2, B, TERMS, (ALL,)), plan(3), ALL[1:], 5) == AdapterState(3, A, TERMS, (ALL[1:],))


@pytest.mark.parametrize(
    ("survivors", "differing"),
    [
        (ALL[1:], 1),
        ((*ALL, "another"), 1),
        (ALL[4:], 4),
        ((*ALL[2:], "another", "and another"), 4),
    ],
)
def test_a_second_sum_that_differs_by_few_devices_is_refused(survivors: tuple[str, ...], differing: int) -> None:
    known = after(None, plan(3))
    with refused(ProtocolError, "survivors.repeat", peer="coordinator", value=differing):
        on_survivors(known, plan(3), survivors, differing + 1)
    assert on_survivors(known, plan(3), survivors, differing).unmasked == (ALL, tuple(sorted(survivors)))


def test_a_sum_is_compared_with_every_earlier_one_from_the_adapter() -> None:
    known = on_survivors(after(None, plan(3)), plan(3), ALL[10:], 5)
    for survivors in (ALL[1:], ALL[11:]):
        with refused(ProtocolError, "survivors.repeat", value=1):
            on_survivors(known, plan(3), survivors, 5)
    assert on_survivors(known, plan(4, B), ALL[1:], 5).unmasked == (ALL[1:],)


@pytest.mark.parametrize("change", [{"clip_norm": 3.9}, {"weight_cap": 99}, {"training": b"other"}], ids=str)
def test_a_repeat_on_other_terms_is_refused(change: dict[str, Any]) -> None:
    spec, other = (SPEC, replace(plan(3), **change)) if "training" in change else (replace(SPEC, **change), plan(3))
    assert on_plan(on_plan(None, plan(3), 1), other, 1, spec).terms == terms(other, spec)  # no sum was unmasked
    with refused(ProtocolError, "plan.terms", peer="coordinator"):
        on_plan(after(None, plan(3)), other, 1, spec)
    assert on_plan(after(None, plan(3)), replace(other, adapter_version=4, adapter_digest=B), 1, spec).unmasked == ()


def test_the_order_of_the_survivors_makes_no_difference() -> None:
    assert on_survivors(after(None, plan(3)), plan(3), ALL[::-1], 5).unmasked == (ALL, ALL)


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
    assert state_dir.load_adapter_state() is None
    known = AdapterState(3, A, TERMS, (ALL, ALL[5:]))
    state_dir.save_adapter_state(known)
    assert DeviceStateDir.open(state_dir.folder).load_adapter_state() == known
    state_dir.save_adapter_state(replace(known, unmasked=()))
    assert state_dir.load_adapter_state() == AdapterState(3, A, TERMS)
    (state_dir.folder / ADAPTERS).write_bytes(b"damaged")
    with refused(TrustError, ADAPTERS) as caught:
        state_dir.load_adapter_state()
    assert "edgeadapt device forget" in str(caught.value)
