"""A sound transcript passes every check, and the report says what happened."""

from collections.abc import Callable

import pytest

from aggregation.messages import Advert, Message, Shares, Survivors, Unmask, UnmaskResponse
from aggregation.policy import Policy
from aggregation.spec import Adversary
from aggregation.steps import Step
from aggregation.transcript.entries import EVERYONE
from edgeadapt.auditing import Check, Status
from tests.support.fleet import BASE
from tests.support.sessions import LoggedSession

Sessions = Callable[..., LoggedSession]


def test_a_sound_session_passes_every_check(logged: LoggedSession) -> None:
    report = logged.audit()
    assert [finding.check for finding in report.findings] == list(Check)[: list(Check).index(Check.REPEATS)]
    assert {finding.status for finding in report.findings} == {Status.PASS}, report.findings
    report.require()


def test_the_report_has_rounds_survivors_and_dropouts(logged: LoggedSession) -> None:
    first, second, third = logged.audit().rounds
    assert first.survivors == ("device-000", "device-002", "device-003")
    assert first.dropouts_by_step == {"plan": ("device-001",)}
    assert second.survivors == second.planned
    assert second.dropouts_by_step == {"unmask": ("device-002",)}
    assert third.ending == "aborted (too-few)"
    assert third.survivors == third.unmasked == ()
    assert (first.unmasked, second.unmasked) == (first.survivors, second.survivors)
    assert [each.result is None for each in (first, second, third)] == [False, False, True]
    assert third.dropouts_by_step == {"plan": ("device-000", "device-001")}
    assert first.ending.startswith("produced adapter 1")


@pytest.mark.parametrize("adversary", Adversary)
def test_the_report_has_the_step_at_which_each_device_dropped_out(logged_of: Sessions, adversary: Adversary) -> None:
    dropouts = {Step.PLAN: ["device-001"], Step.UNMASK: ["device-004"]}
    if adversary is Adversary.ACTIVE:
        dropouts[Step.SURVIVORS] = ["device-000"]
    report = logged_of([dropouts, {}], devices=7, adversary=adversary).audit()
    assert report.failed == ()
    assert report.rounds[0].dropouts_by_step == {step.value: tuple(devices) for step, devices in dropouts.items()}
    assert set(report.rounds[0].planned) - set(report.rounds[0].survivors) == {"device-001"}
    assert report.rounds[1].dropouts_by_step == report.dropouts_by_step == {}
    text = report.findings[list(Check).index(Check.THRESHOLDS)].text
    assert ("nothing shows that all devices were shown one set" in text) == (adversary is not Adversary.ACTIVE)


@pytest.mark.parametrize(("kind", "step"), [(Advert, "offer"), (Shares, "roster")])
def test_the_report_has_the_dropouts_before_the_first_round(
    logged: LoggedSession, kind: type[Message], step: str
) -> None:
    end = logged.ends()[logged.find(kind, 0, "device-002").index]
    assert logged.audit(logged.raw[:end], unfinished=True).dropouts_by_step == {step: ("device-003",)}


def test_participation_counts_the_sums_that_contain_a_device(logged: LoggedSession) -> None:
    expected = {"device-000": 2, "device-001": 1, "device-002": 2, "device-003": 2}
    assert logged.audit().participation == expected


def test_without_the_vectors_everything_except_the_sums_is_checked(logged: LoggedSession) -> None:
    report = logged.audit(vectors=False)
    assert {finding.check for finding in report.findings if finding.status is not Status.PASS} == {Check.SUMS}
    assert report.failed == ()


@pytest.mark.parametrize("adversary", Adversary)
@pytest.mark.parametrize("devices", [3, 5])
def test_sessions_of_either_kind_and_any_size_pass(logged_of: Sessions, adversary: Adversary, devices: int) -> None:
    dropouts = {Step.PLAN: ["device-000"]} if devices > 3 else {}
    report = logged_of([dropouts, {}], devices=devices, adversary=adversary).audit()
    assert {finding.status for finding in report.findings} == {Status.PASS}, report.findings


@pytest.fixture(scope="module")
def sparse(logged_of: Sessions) -> LoggedSession:
    """Eleven devices with six neighbors each."""
    policy = Policy(
        known_bases=frozenset({BASE}), minimum_cohort=3, minimum_survivors=2, corrupt_fraction=0, complete_up_to=3
    )
    dropouts = {Step.PLAN: ["device-003"], Step.UNMASK: ["device-008"]}
    return logged_of([dropouts, {}], devices=11, policy=policy, degree=6, threshold=5, minimum_survivors=7)


def test_a_session_on_a_sparse_graph_passes(sparse: LoggedSession) -> None:
    report = sparse.audit()
    assert {finding.status for finding in report.findings} == {Status.PASS}, report.findings
    assert "5 of 7 devices recover a secret" in report.findings[list(Check).index(Check.THRESHOLDS)].text


def test_on_a_sparse_graph_every_message_to_all_is_logged_once(sparse: LoggedSession) -> None:
    kinds = [(entry.kind, entry.peer) for entry in sparse.entries if entry.round == 1]
    assert kinds.count((Survivors.TAG, EVERYONE)) == kinds.count((Unmask.TAG, EVERYONE)) == 1


def test_on_a_sparse_graph_the_signatures_of_a_neighborhood_are_no_quorum(sparse: LoggedSession) -> None:
    unmask = sparse.message(Unmask, 1)
    assert len(unmask.consistency_signatures) == 7
    few = dict(list(unmask.consistency_signatures.items())[:6])
    (finding,) = sparse.audit(sparse.with_changed(Unmask, 1, consistency_signatures=few)).failed
    assert (finding.check, finding.about) == (Check.SURVIVORS, "unmask.quorum")
    assert finding.place is not None
    assert (finding.place.kind, finding.place.round) == ("unmask", 1)


def test_on_a_sparse_graph_shares_for_a_device_that_is_not_a_neighbor_are_found(sparse: LoggedSession) -> None:
    session, me = sparse.session.session, "device-000"
    far = next(name for name in sorted(session.peers) if name != me and name not in session.neighbors(me, (name,)))
    encrypted_shares = sparse.message(Shares, 0, me).encrypted_shares
    wrong = {**encrypted_shares, far: next(iter(encrypted_shares.values()))}
    (finding,) = sparse.audit(sparse.with_changed(Shares, 0, me, encrypted_shares=wrong)).failed
    assert (finding.check, finding.about) == (Check.ORDER, "shares.encrypted_shares")
    assert finding.place == sparse.find(Shares, 0, me).place


def test_on_a_sparse_graph_a_share_of_a_device_that_is_not_a_neighbor_is_found(sparse: LoggedSession) -> None:
    session, me = sparse.session.session, "device-000"
    far = next(name for name in sorted(session.peers) if name != me and name not in session.neighbors(me, (name,)))
    response = sparse.message(UnmaskResponse, 1, me)
    changed = sparse.with_changed(UnmaskResponse, 1, me, seeds={**response.seeds, far: bytes(33)})
    (finding,) = sparse.audit(changed).failed
    assert (finding.check, finding.about) == (Check.SHARES, "unmask-response.shares")
    assert finding.place == sparse.find(UnmaskResponse, 1, me).place
    assert far in finding.text


def test_on_a_sparse_graph_a_neighborhood_with_too_few_responses_is_found(sparse: LoggedSession) -> None:
    session, me = sparse.session.session, "device-000"
    holders = {me, *session.neighbors(me, session.peers)}
    answered = [e for e in sparse.entries if (e.kind, e.round) == (UnmaskResponse.TAG, 1) and e.peer in holders]
    (finding,) = sparse.audit(sparse.without(*answered[4:])).failed
    assert (finding.check, finding.about) == (Check.THRESHOLDS, "unmask-response.size")
    assert "4 devices revealed shares" in finding.text
    assert finding.place is not None
    assert finding.place.kind == "result"


def test_a_session_without_a_round_passes(logged_of: Sessions) -> None:
    report = logged_of([]).audit()
    assert report.failed == ()
    assert report.rounds == ()
    assert set(report.participation.values()) == {0}


def test_a_session_under_way_passes_if_that_is_accepted(logged: LoggedSession) -> None:
    begun = logged.raw[: logged.ends()[40]]
    for unfinished, status in ((False, Status.OPEN), (True, Status.PASS)):
        report = logged.audit(begun, unfinished=unfinished)
        assert (report.findings[0].status, report.failed) == (status, ())
