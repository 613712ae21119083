"""What a coordinator or a device can forge with its own key: each rule finds what breaks it and names the place."""

import datetime as dt
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from aggregation import checks, envelope
from aggregation.messages import (
    Advert,
    Assignment,
    ConsistencySignature,
    MaskedInput,
    Message,
    Offer,
    Plan,
    Roster,
    Shares,
    Survivors,
    Unmask,
    UnmaskResponse,
)
from aggregation.pki import Authority
from aggregation.policy import Policy
from aggregation.session import context_of
from aggregation.steps import Step
from aggregation.transcript import MAGIC, Abort, Checkpoint, Entry, Result, Stage, Transcript
from coordinator.audit.auditor import Check, Report, Status, audit

ME, OTHER, LOST = "device-000", "device-002", "device-001"


def only(report: Report, check: Check, reason: str) -> Any:
    """The one failure, where it must be."""
    (finding,) = report.failed
    assert finding.check is check, finding
    assert reason in finding.text
    return finding.place


def test_rewriting_alone_changes_nothing(logged: Any) -> None:
    assert logged.rewritten(lambda entries: entries) == logged.raw


def test_a_device_of_another_authority_is_found(logged: Any, entropy: Any) -> None:
    times = (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2036, 1, 1, tzinfo=dt.UTC))
    stranger = Authority.create("another", entropy, *times)
    report = audit(logged.raw, stranger.root, logged.fleet.key.public)
    assert only(report, Check.IDENTITIES, "not issued by the pinned authority").index == 0


# Signatures


def test_a_message_in_anothers_name_is_found(logged: Any) -> None:
    mine, theirs = (logged.find(MaskedInput, 1, name) for name in (ME, OTHER))
    raw = logged.rewritten(
        lambda entries: [replace(mine, peer=OTHER) if e == mine else e for e in entries if e != theirs]
    )
    place = only(logged.audit(raw), Check.SIGNATURES, "is not valid")
    assert (place.kind, place.round, place.peer) == ("masked-input", 1, OTHER)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"peer": "device-999"}, "not in the cohort"),
        ({"kind": "letter"}, "no such kind"),
        ({"kind": "unmask-response"}, "came where"),
    ],
)
def test_an_entry_that_says_something_else_than_its_message_is_found(
    logged: Any, change: dict[str, Any], reason: str
) -> None:
    old = logged.find(MaskedInput, 1)
    raw = logged.rewritten(lambda entries: [replace(e, **change) if e == old else e for e in entries])
    assert only(logged.audit(raw), Check.SIGNATURES, reason).index == old.index


# Order


@pytest.mark.parametrize(
    ("kind", "round_", "changes", "reason"),
    [
        (Advert, 0, {"device": OTHER}, "of another device"),
        (Advert, 0, {"share_key": bytes([7]) * 32}, "not made of the adverts"),
        (Roster, 0, {"adverts": ()}, "too small"),
        (Shares, 0, {"context": bytes(32)}, "of another session"),
        (Shares, 0, {"encrypted_shares": {}}, "exactly its neighbours"),
        (MaskedInput, 1, {"plan": bytes(32)}, "for another plan"),
        (Survivors, 1, {"plan": bytes(32)}, "for another plan"),
        (ConsistencySignature, 1, {"survivors": bytes(32)}, "for another survivor set"),
        (UnmaskResponse, 1, {"survivors": bytes(32)}, "for another survivor set"),
        (Result, 1, {"plan": bytes(32)}, "for another plan"),
        (Result, 1, {"survivors": ()}, "for another survivor set"),
    ],
)
def test_a_message_that_does_not_belong_is_found(
    logged: Any, kind: type[Message], round_: int, changes: dict[str, Any], reason: str
) -> None:
    raw = logged.with_changed(kind, round_, **changes)
    place = only(logged.audit(raw), Check.ORDER, reason)
    expected = logged.find(Roster) if "adverts" in reason else logged.find(kind, round_)
    assert place.index == expected.index


@pytest.mark.parametrize(
    "kind", [Advert, Roster, Shares, MaskedInput, Survivors, ConsistencySignature, Unmask, UnmaskResponse, Result]
)
def test_a_step_that_is_answered_twice_is_found(logged: Any, kind: type[Message]) -> None:
    old = logged.find(kind, int(kind not in (Advert, Roster, Shares)))
    raw = logged.rewritten(
        lambda entries: [e for entry in entries for e in ([entry, old] if entry == old else [entry])]
    )
    assert only(logged.audit(raw), Check.ORDER, "a second time").index == old.index + 1


def test_a_second_offer_is_found(logged: Any) -> None:
    raw = logged.rewritten(lambda entries: [entries[0], replace(entries[0], peer=ME), *entries[1:]])
    assert only(logged.audit(raw), Check.ORDER, "a second offer").index == 1


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Roster, "before the roster"), (Assignment, "has no plan")],
)
def test_a_message_that_others_rest_on_is_missed(logged: Any, kind: type[Message], reason: str) -> None:
    raw = logged.rewritten(lambda entries: [e for e in entries if not (e.kind == kind.TAG and e.round < 2)])
    only(logged.audit(raw), Check.ORDER, reason)


def test_a_message_that_comes_too_early_or_late_is_found(logged: Any) -> None:
    late, unmask = logged.find(ConsistencySignature, 1, "device-003"), logged.find(Unmask, 1)
    raw = logged.rewritten(lambda entries: reordered(entries, [late, unmask], [unmask, late]))
    assert only(logged.audit(raw), Check.ORDER, "not where its step is").kind == "consistency-signature"


def reordered(entries: list[Entry], old: list[Entry], new: list[Entry]) -> list[Entry]:
    at = entries.index(old[0])
    assert entries[at : at + len(old)] == old
    return entries[:at] + new + entries[at + len(old) :]


def with_assignment(logged: Any, peer: str, plan: Plan, boxes_of: str, *, whole: bool) -> bytes:
    """The log with another assignment for ``peer``: a plan, and the boxes of some device. ``whole``: body and all."""
    encrypted_shares = {
        dealer: dealt[boxes_of] for dealer, dealt in logged.session.encrypted_shares.items() if boxes_of in dealt
    }
    body = envelope.sign(logged.fleet.key, Assignment(plan, encrypted_shares))
    old = logged.find(Assignment, 1, peer)
    new = replace(old, message=body if whole else envelope.with_body(body, b""))
    return logged.rewritten(lambda entries: [new if entry == old else entry for entry in entries])  # type: ignore[no-any-return]


def logged_plan(logged: Any) -> Plan:
    entry = logged.find(Assignment, 1)
    return envelope.open_verified(Assignment, entry.message, logged.fleet.key.public, "coordinator").plan


@pytest.mark.parametrize("whole", [True, False])
def test_an_assignment_may_be_logged_with_its_body_or_without(logged: Any, whole: bool) -> None:
    raw = with_assignment(logged, OTHER, logged_plan(logged), OTHER, whole=whole)
    assert (raw == logged.raw) != whole
    assert logged.audit(raw).failed == ()


@pytest.mark.parametrize(("whole", "reason"), [(True, "different plans"), (False, "another plan than the first one")])
def test_different_plans_for_different_devices_are_found(logged: Any, whole: bool, reason: str) -> None:
    plan = replace(logged_plan(logged), training=b"for you alone")
    raw = with_assignment(logged, OTHER, plan, OTHER, whole=whole)
    assert only(logged.audit(raw), Check.ORDER, reason).index == logged.find(Assignment, 1, OTHER).index


@pytest.mark.parametrize(("whole", "reason"), [(True, "not those that were dealt"), (False, "other boxes than were")])
def test_boxes_that_nobody_dealt_are_found(logged: Any, whole: bool, reason: str) -> None:
    raw = with_assignment(logged, OTHER, logged_plan(logged), ME, whole=whole)
    assert only(logged.audit(raw), Check.ORDER, reason).index == logged.find(Assignment, 1, OTHER).index


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"context": bytes(32)}, "of another session"),
        ({"round": 2}, "of another round"),
        ({"members": (OTHER, ME)}, "a member twice, or out of order"),
        ({"members": (ME, ME, OTHER)}, "a member twice, or out of order"),
        ({"members": (ME, OTHER, "stranger")}, "a member of the plan shared no secrets"),
    ],
    ids=str,
)
def test_a_plan_that_no_device_would_take_is_found(logged: Any, changes: dict[str, Any], reason: str) -> None:
    raw = with_assignment(logged, ME, replace(logged_plan(logged), **changes), ME, whole=True)
    assert only(logged.audit(raw), Check.ORDER, reason).index == logged.find(Assignment, 1, ME).index


def signed_by(logged: Any, entry: Entry, device: str, message: Message) -> Entry:
    """An entry like another one, but of this device and with this message."""
    return replace(entry, peer=device, message=envelope.sign(logged.fleet.devices[device].identity, message))


def after(logged: Any, old: Entry, *new: Entry) -> bytes:
    """The log with entries put behind one."""
    return logged.rewritten(  # type: ignore[no-any-return]
        lambda entries: [each for entry in entries for each in ((entry, *new) if entry == old else (entry,))]
    )


def test_an_update_of_a_device_that_is_not_in_the_plan_is_found(logged: Any) -> None:
    plan = replace(logged_plan(logged), members=(ME, LOST, "device-003"))
    assignment = replace(logged.find(Assignment, 1, ME), message=envelope.sign(logged.fleet.key, Assignment(plan, {})))
    update = signed_by(logged, logged.find(MaskedInput, 1), OTHER, MaskedInput(plan.digest(), OTHER, bytes(32)))
    raw = logged.rewritten(
        lambda entries: [*(e for e in entries if e.round == 0), assignment, update, logged.find(Abort, 3), entries[-1]]
    )
    place = only(logged.audit(raw), Check.ORDER, "the device is not in the plan")
    assert (place.kind, place.peer) == ("masked-input", OTHER)


def test_two_survivor_sets_for_two_devices_are_found(logged: Any) -> None:
    told = logged.find(Survivors, 1)
    vectors = envelope.open_verified(Survivors, told.message, logged.fleet.key.public, "coordinator").vectors
    fewer = logged.resigned(told, Survivors, vectors={device: vectors[device] for device in (ME, OTHER)})
    raw = after(logged, told, replace(fewer, peer=OTHER))
    assert only(logged.audit(raw), Check.ORDER, "a second survivor set").index == told.index + 1


def test_a_request_to_open_another_survivor_set_is_found(logged: Any) -> None:
    asked = logged.find(Unmask, 1)
    survivors = envelope.open_verified(Unmask, asked.message, logged.fleet.key.public, "coordinator").survivors
    fewer = replace(survivors, vectors={device: survivors.vectors[device] for device in (ME, OTHER)})
    raw = logged.with_changed(Unmask, 1, survivors=fewer)
    assert only(logged.audit(raw), Check.ORDER, "another survivor set than the one agreed").index == asked.index


@pytest.mark.parametrize("kind", [ConsistencySignature, UnmaskResponse])
def test_what_a_device_says_that_is_no_survivor_is_found(logged: Any, kind: type[Message]) -> None:
    """Else devices that were lost could make up a quorum."""
    told = envelope.open_verified(Survivors, logged.find(Survivors, 1).message, logged.fleet.key.public, "coordinator")
    assert LOST not in told.vectors
    said = (
        ConsistencySignature(told.digest(), LOST)
        if kind is ConsistencySignature
        else UnmaskResponse(told.digest(), LOST, {}, {})
    )
    old = logged.find(kind, 1)
    raw = after(logged, old, signed_by(logged, old, LOST, said))
    assert only(logged.audit(raw), Check.ORDER, "the device is no survivor").index == old.index + 1


def test_a_round_with_two_endings_is_found(logged: Any) -> None:
    """A sum was opened, and the log says too that none was."""
    result = logged.find(Result, 1)
    abort = envelope.sign(logged.fleet.key, Abort(logged_plan(logged).digest(), "too-few"))
    raw = after(logged, result, replace(result, kind=Abort.TAG, message=abort))
    assert only(logged.audit(raw), Check.ORDER, "a second ending").index == result.index + 1


def test_a_round_whose_plan_is_nowhere_in_full_is_found(logged: Any) -> None:
    raw = with_assignment(logged, ME, logged_plan(logged), ME, whole=False)  # the first, which the others rest on
    assert only(logged.audit(raw), Check.ORDER, "has no plan").index == logged.find(Assignment, 1, ME).index


# Thresholds


def test_a_threshold_that_two_groups_can_reach_is_found(
    logged_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for check in ("check", "check_roster"):  # no honest device joins such a session
        monkeypatch.setattr(Policy, check, lambda *given: None)
    weak = logged_of([{}], devices=4, threshold=2, minimum_survivors=2)
    only(weak.audit(), Check.THRESHOLDS, "2 of 4 devices open a secret")


def test_a_quorum_that_two_groups_can_reach_is_found(
    logged_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    for check in ("check", "check_roster"):  # no honest device joins such a session
        monkeypatch.setattr(Policy, check, lambda *given: None)
    session = {"devices": 11, "degree": 6, "threshold": 5}  # on a circle, where the threshold is a neighbourhood's
    weak, least = (logged_of([{}], minimum_survivors=count, **session) for count in (5, 6))
    only(weak.audit(), Check.THRESHOLDS, "5 of 11 devices agree on survivors")
    assert least.audit().failed == ()
    assert "even if 0 others side" in next(
        each.text for each in least.audit().findings if each.check is Check.THRESHOLDS
    )


def test_a_plan_for_too_few_is_found(logged_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as weakened:
        for check in ("enough_devices", "enough_neighbors"):
            weakened.setattr(checks, check, lambda *given: None)
        weak = logged_of([{}], devices=5, threshold=4, minimum_survivors=4)
        small = logged_of([{Step.PLAN: ["device-000", "device-001"]}], devices=5, threshold=4, minimum_survivors=4)
    assert weak.audit().failed == ()
    place = only(small.audit(), Check.THRESHOLDS, "3 survivors, 4 are needed")
    assert (place.kind, place.round) == ("survivors", 1)


# Survivors


def test_an_update_that_arrived_and_is_not_counted_is_found(logged: Any) -> None:
    raw = logged.rewritten(lambda entries: [e for e in entries if e != logged.find(MaskedInput, 1, OTHER)])
    place = only(logged.audit(raw), Check.SURVIVORS, f"{OTHER} is not counted with the update")
    assert (place.kind, place.round) == ("survivors", 1)


def test_an_agreement_that_nobody_sent_is_found(logged: Any) -> None:
    raw = logged.rewritten(lambda entries: [e for e in entries if e != logged.find(ConsistencySignature, 1, OTHER)])
    assert only(logged.audit(raw), Check.SURVIVORS, "is not in the log").kind == "unmask"


def test_an_agreement_that_does_not_fit_is_found(logged: Any) -> None:
    raw = logged.with_changed(Unmask, 1, consistency_signatures=dict.fromkeys([ME, OTHER, "device-003"], bytes(64)))
    assert only(logged.audit(raw), Check.SURVIVORS, "is not valid").kind == "unmask"


def test_a_sum_without_a_request_to_open_it_is_found(logged: Any) -> None:
    """With the request go the agreements in it, without which nothing shows that a quorum agreed."""
    gone = {Unmask.TAG, ConsistencySignature.TAG}
    raw = logged.rewritten(lambda entries: [e for e in entries if e.kind not in gone])
    place = only(logged.audit(raw), Check.SURVIVORS, "answers no request to open")
    assert (place.kind, place.round) == ("unmask-response", 1)


# Shares and secrets


def opening_of(logged: Any, name: str, round_: int = 1) -> Any:
    entry = logged.find(UnmaskResponse, round_, name)
    return envelope.open_verified(UnmaskResponse, entry.message, logged.fleet.devices[name].identity.public, name)


def test_a_share_of_the_other_kind_is_found(logged: Any) -> None:
    opening = opening_of(logged, OTHER)
    raw = logged.with_changed(UnmaskResponse, 1, OTHER, keys={**opening.keys, ME: bytes(33)})
    place = only(logged.audit(raw), Check.SHARES, f"a share of {ME} is opened that would show its update")
    assert (place.kind, place.round, place.peer) == ("unmask-response", 1, OTHER)


def test_wrong_shares_that_leave_a_secret_closed_are_found(logged: Any) -> None:
    opening = opening_of(logged, OTHER)
    raw = logged.with_changed(UnmaskResponse, 1, OTHER, seeds={**opening.seeds, ME: bytes(33)})
    place = only(logged.audit(raw), Check.SECRETS, f"do not open what {ME} had committed to")
    assert (place.kind, place.round) == ("result", 1)


def test_a_wrong_share_that_did_no_harm_is_told_with_its_author(logged_of: Callable[..., Any]) -> None:
    session = logged_of([{}], devices=5)
    opening = opening_of(session, ME)
    report = session.audit(session.with_changed(UnmaskResponse, 1, ME, seeds={**opening.seeds, OTHER: bytes(33)}))
    assert report.failed == ()
    assert report.rounds[0].blamed == (ME,)
    assert f"wrong shares came from {ME}" in report.findings[list(Check).index(Check.SECRETS)].text


# Results and sums


def test_a_sum_that_is_not_the_sum_is_found(logged: Any) -> None:
    raw = logged.with_changed(Result, 2, sum=bytes(32))
    place = only(logged.audit(raw), Check.SUMS, "do not add up")
    assert (place.kind, place.round) == ("result", 2)
    assert logged.audit(raw, kept=False).failed == ()  # what it takes to find it: the vectors


def test_a_vector_that_was_altered_where_it_is_kept_is_found_whatever_became_of_its_round(logged: Any) -> None:
    headers = [entry for entry in logged.entries if entry.kind == MaskedInput.TAG]
    assert {header.round for header in headers} == {1, 2, 3}  # of which the last ended without a sum
    for header, digest in zip(headers, logged.vectors, strict=True):
        altered = {**logged.vectors, digest: bytes(len(logged.vectors[digest]))}
        report = audit(logged.raw, logged.fleet.authority.root, logged.fleet.key.public, altered.get)
        assert only(report, Check.SUMS, "not the one that was signed") == header.place


def test_where_no_round_made_a_sum_none_is_said_to_be_skipped(logged_of: Callable[..., Any]) -> None:
    report = logged_of([{Step.PLAN: ["device-000", "device-001"]}]).audit()
    finding = report.findings[list(Check).index(Check.SUMS)]
    assert (finding.status, finding.text) == (Status.PASS, "no sum was made")


def test_a_round_that_lacks_a_vector_is_left_out_of_the_sums(logged: Any) -> None:
    left = dict(list(logged.vectors.items())[1:])
    report = audit(logged.raw, logged.fleet.authority.root, logged.fleet.key.public, left.get)
    assert report.failed == ()
    assert "1 of 2 sums added up again" in report.findings[list(Check).index(Check.SUMS)].text


@pytest.mark.parametrize(
    ("changes", "reason", "kind"),
    [
        ({"version": 9}, "not the next version", "result"),
        ({"adapter": "cd" * 32}, "starts from another adapter", "assignment"),
    ],
)
def test_an_adapter_that_comes_from_elsewhere_is_found(
    logged: Any, changes: dict[str, Any], reason: str, kind: str
) -> None:
    assert only(logged.audit(logged.with_changed(Result, 1, **changes)), Check.RESULTS, reason).kind == kind


def test_a_round_without_an_ending_is_told(logged: Any) -> None:
    raw = logged.rewritten(lambda entries: [e for e in entries if e.kind != Abort.TAG])
    report = logged.audit(raw)
    assert report.failed == ()
    assert report.rounds[2].ending == "was not ended"


def test_a_result_that_is_left_out_is_missed_by_the_next_round(logged: Any) -> None:
    raw = logged.rewritten(lambda entries: [e for e in entries if e != logged.find(Result, 2)])
    place = only(logged.audit(raw), Check.RESULTS, "starts from another adapter")
    assert (place.kind, place.round) == ("assignment", 3)


# Checkpoints


def test_a_checkpoint_of_another_session_is_found(logged: Any) -> None:
    log, raw = Transcript(bytes(32)), MAGIC
    for entry in logged.entries:
        if entry.kind != Checkpoint.TAG:
            log.round = entry.round
            raw += log._append(entry.kind, entry.peer, entry.message)
    raw += log.checkpoint(logged.fleet.key, Stage.CLOSED)
    assert only(logged.audit(raw), Check.IDENTITIES, "of another session").index == 0


def test_checkpoints_that_name_different_sessions_before_are_found(logged: Any) -> None:
    """The first names the one that ``chain`` looks at; another in the same log could name one that was left out."""
    log, raw = Transcript(logged.log.offer), MAGIC
    for entry in logged.entries:
        log.round = entry.round
        if entry.kind != Checkpoint.TAG:
            raw += log._append(entry.kind, entry.peer, entry.message)
        else:
            raw += log.checkpoint(logged.fleet.key, Stage.CLOSED if entry == logged.entries[-1] else Stage.OPEN)
            log.previous = bytes([1]) * 32
    second = [entry.index for entry in logged.entries if entry.kind == Checkpoint.TAG][1]
    assert only(logged.audit(raw), Check.LOG, "of another session").index == second


def test_shares_of_a_device_that_is_not_on_the_roster_are_found(logged_of: Callable[..., Any]) -> None:
    """It is certified and in the cohort, but came too late with its advert."""
    session, late = logged_of([], devices=5), "device-004"
    old = session.find(Roster)
    message = envelope.open_verified(Roster, old.message, session.fleet.key.public, "coordinator")
    kept = tuple(raw for raw in message.adverts if Advert.decode(envelope.unverified_body(raw)).device != late)
    context = context_of(message.offer, replace(message, adverts=kept).digest())
    dealt = session.resigned(session.find(Shares, 0, late), Shares, context=context)
    new = {Roster.TAG: session.resigned(old, Roster, adverts=kept), Shares.TAG: dealt}
    raw = session.rewritten(
        lambda entries: [
            new.get(entry.kind, entry)
            for entry in entries
            if entry.peer != late and (entry.kind != Shares.TAG or entry.peer == ME)
        ]
    )
    place = only(session.audit(raw), Check.ORDER, "the device is not on the roster")
    assert (place.kind, place.peer) == ("shares", late)


def test_a_box_that_cannot_hold_the_shares_of_every_round_is_found(logged_of: Callable[..., Any]) -> None:
    session = logged_of([])
    entry = session.find(Shares, 0, ME)
    encrypted_shares = envelope.open_verified(
        Shares, entry.message, session.fleet.devices[ME].identity.public, ME
    ).encrypted_shares
    for spoiled in (
        replace(encrypted_shares[OTHER], ciphertext=encrypted_shares[OTHER].ciphertext + bytes(1)),
        replace(encrypted_shares[OTHER], digests=encrypted_shares[OTHER].digests[1:]),
    ):
        raw = session.with_changed(Shares, 0, ME, encrypted_shares={**encrypted_shares, OTHER: spoiled})
        assert only(session.audit(raw), Check.ORDER, "a box has not the size of one").index == entry.index


def test_the_offer_must_come_first(logged: Any) -> None:
    raw = logged.rewritten(lambda entries: [e for e in entries if e.kind != Offer.TAG])
    assert only(logged.audit(raw), Check.IDENTITIES, "advert came where offer belongs").index == 0


@pytest.mark.parametrize("kind", [Checkpoint, Offer])
def test_whatever_comes_after_the_end_of_a_log_is_found(logged: Any, kind: type[Message]) -> None:
    """Though the coordinator signed it: a log that was closed says that there is no more."""
    log, raw = Transcript(logged.log.offer), MAGIC
    for entry in logged.entries:
        log.round = entry.round
        if entry.kind != Checkpoint.TAG:
            raw += log._append(entry.kind, entry.peer, entry.message)
        else:
            raw += log.checkpoint(logged.fleet.key, Stage.CLOSED if entry == logged.entries[-1] else Stage.OPEN)
    size = log.tree.size
    after = log.checkpoint(logged.fleet.key) if kind is Checkpoint else log._append("offer", "*", b"")
    found = next(each for each in logged.audit(raw + after).findings if each.check is Check.LOG)
    assert "was closed before" in found.text
    assert found.place is not None
    assert found.place.index == size
