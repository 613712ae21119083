"""A sound transcript passes every check, and the report says what happened."""

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from aggregation import envelope
from aggregation.messages import Advert, Message, Shares, Survivors, Unmask, UnmaskResponse
from aggregation.policy import Policy
from aggregation.spec import Adversary
from aggregation.steps import Step
from aggregation.transcript import EVERYONE
from coordinator.audit.auditor import Check, Status

BASE = hashlib.sha256(b"base").hexdigest()  # of the fleet of tests/aggregation


def test_a_sound_session_passes_every_check(logged: Any) -> None:
    report = logged.audit()
    assert [finding.check for finding in report.findings] == [check for check in Check if check is not Check.ADAPTERS]
    assert {finding.status for finding in report.findings} == {Status.PASS}, report.findings
    report.require()


def test_the_report_tells_rounds_survivors_and_dropouts(logged: Any) -> None:
    first, second, third = logged.audit().rounds
    assert first.survivors == ("device-000", "device-002", "device-003")
    assert first.dropped == ("device-001",)
    assert second.survivors == second.planned
    assert second.dropped == ()
    assert third.ending == "ended without a sum (too-few)"
    assert third.survivors == third.dropped == ()
    assert first.ending.startswith("made adapter 2")


@pytest.mark.parametrize("adversary", Adversary)
def test_the_report_tells_at_which_step_each_device_was_lost(
    logged_of: Callable[..., Any], adversary: Adversary
) -> None:
    lost = {Step.PLAN: ["device-001"], Step.UNMASK: ["device-004"]}
    if adversary is Adversary.ACTIVE:
        lost[Step.SURVIVORS] = ["device-000"]
    report = logged_of([lost, {}], devices=7, adversary=adversary).audit()
    assert report.failed == ()
    assert report.rounds[0].lost == {step.value: tuple(devices) for step, devices in lost.items()}
    assert report.rounds[0].dropped == ("device-001",)
    assert report.rounds[1].lost == report.lost == {}


@pytest.mark.parametrize(("kind", "step"), [(Advert, "offer"), (Shares, "roster")])
def test_the_report_tells_who_was_lost_before_the_first_round(logged: Any, kind: type[Message], step: str) -> None:
    end = logged.ends()[logged.find(kind, 0, "device-002").index]
    assert logged.audit(logged.raw[:end], unfinished=True).lost == {step: ("device-003",)}


def test_participation_counts_the_sums_that_a_device_is_in(logged: Any) -> None:
    expected = {"device-000": 2, "device-001": 1, "device-002": 2, "device-003": 2}
    assert logged.audit().participation == expected


def test_without_the_vectors_all_but_the_sums_is_checked(logged: Any) -> None:
    report = logged.audit(kept=False)
    assert {finding.check for finding in report.findings if finding.status is not Status.PASS} == {Check.SUMS}
    assert report.failed == ()


@pytest.mark.parametrize("adversary", Adversary)
@pytest.mark.parametrize("devices", [3, 5])
def test_sessions_of_either_kind_and_any_size_pass(
    logged_of: Callable[..., Any], adversary: Adversary, devices: int
) -> None:
    lost = {Step.PLAN: ["device-000"]} if devices > 3 else {}
    report = logged_of([lost, {}], devices=devices, adversary=adversary).audit()
    assert {finding.status for finding in report.findings} == {Status.PASS}, report.findings


@pytest.fixture(scope="module")
def sparse(logged_of: Callable[..., Any]) -> Any:
    """Eleven devices on a circle of six neighbours each."""
    policy = Policy(known_bases=frozenset({BASE}), minimum_cohort=3, corrupt_fraction=0, complete_up_to=3)
    lost = {Step.PLAN: ["device-003"], Step.UNMASK: ["device-008"]}
    return logged_of([lost, {}], devices=11, policy=policy, degree=6, threshold=5, minimum_survivors=7)


def test_a_session_on_a_sparse_graph_passes(sparse: Any) -> None:
    report = sparse.audit()
    assert {finding.status for finding in report.findings} == {Status.PASS}, report.findings
    assert "5 of 7 devices must answer" in report.findings[list(Check).index(Check.THRESHOLDS)].text


def test_on_a_sparse_graph_every_message_to_all_is_logged_once(sparse: Any) -> None:
    kinds = [(entry.kind, entry.peer) for entry in sparse.entries if entry.round == 1]
    assert kinds.count((Survivors.TAG, EVERYONE)) == kinds.count((Unmask.TAG, EVERYONE)) == 1


def test_on_a_sparse_graph_a_neighbourhood_that_agrees_is_no_quorum(sparse: Any) -> None:
    unmask = envelope.open_verified(Unmask, sparse.find(Unmask, 1).message, sparse.fleet.key.public, "coordinator")
    assert len(unmask.consistency_signatures) == 7
    few = dict(list(unmask.consistency_signatures.items())[:6])
    (finding,) = sparse.audit(sparse.with_changed(Unmask, 1, consistency_signatures=few)).failed
    assert finding.check is Check.SURVIVORS
    assert "6 agreements, 7 are needed" in finding.text
    assert (finding.place.kind, finding.place.round) == ("unmask", 1)


def test_on_a_sparse_graph_shares_to_devices_further_off_are_found(sparse: Any) -> None:
    session, me = sparse.session.session, "device-000"
    far = next(name for name in sorted(session.peers) if name != me and name not in session.neighbors(me, (name,)))
    entry = sparse.find(Shares, 0, me)
    encrypted_shares = envelope.open_verified(
        Shares, entry.message, sparse.fleet.devices[me].identity.public, me
    ).encrypted_shares
    wrong = {**encrypted_shares, far: next(iter(encrypted_shares.values()))}
    (finding,) = sparse.audit(sparse.with_changed(Shares, 0, me, encrypted_shares=wrong)).failed
    assert finding.check is Check.ORDER
    assert "not for exactly its neighbours" in finding.text
    assert finding.place.index == entry.index


def test_on_a_sparse_graph_a_share_of_a_device_further_off_is_found(sparse: Any) -> None:
    session, me = sparse.session.session, "device-000"
    far = next(name for name in sorted(session.peers) if name != me and name not in session.neighbors(me, (name,)))
    entry = sparse.find(UnmaskResponse, 1, me)
    opening = envelope.open_verified(UnmaskResponse, entry.message, sparse.fleet.devices[me].identity.public, me)
    changed = sparse.with_changed(UnmaskResponse, 1, me, seeds={**opening.seeds, far: bytes(33)})
    (finding,) = sparse.audit(changed).failed
    assert finding.check is Check.SHARES
    assert f"a share of {far} is opened" in finding.text
    assert finding.place.index == entry.index


def test_on_a_sparse_graph_a_neighbourhood_that_hardly_opened_is_found(sparse: Any) -> None:
    session, me = sparse.session.session, "device-000"
    near = {me, *session.neighbors(me, session.peers)}
    answered = [e for e in sparse.entries if (e.kind, e.round) == (UnmaskResponse.TAG, 1) and e.peer in near]
    gone = answered[4:]
    (finding,) = sparse.audit(sparse.rewritten(lambda entries: [e for e in entries if e not in gone])).failed
    assert finding.check is Check.THRESHOLDS
    assert "4 devices near" in finding.text
    assert finding.place.kind == "result"


def test_a_session_without_a_round_passes(logged_of: Callable[..., Any]) -> None:
    report = logged_of([]).audit()
    assert report.failed == ()
    assert report.rounds == ()
    assert set(report.participation.values()) == {0}


def test_a_session_under_way_passes_where_that_is_asked_for(logged: Any) -> None:
    begun = logged.raw[: logged.ends()[40]]
    assert logged.audit(begun).failed
    assert logged.audit(begun, unfinished=True).failed == ()
