"""Forgeries by a coordinator or a device with its own key: the check that finds one names the field and the message."""

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
from aggregation.transcript.entries import MAGIC, Abort, Checkpoint, Entry, Result, Stage, write
from aggregation.transcript.log import Transcript
from edgeadapt.auditing import Check, Status, audit
from tests.support.sessions import SEED, LoggedSession, append, failure, finding_of

Sessions = Callable[..., LoggedSession]
ME, OTHER, ABSENT = "device-000", "device-002", "device-001"


def test_rewriting_alone_changes_nothing(logged: LoggedSession) -> None:
    assert logged.rewritten() == logged.raw


def test_a_device_of_another_authority_is_found(logged: LoggedSession, entropy: Any) -> None:
    times = (dt.datetime(2026, 1, 1, tzinfo=dt.UTC), dt.datetime(2036, 1, 1, tzinfo=dt.UTC))
    stranger = Authority.create("another", entropy, *times)
    report = audit(logged.raw, stranger.root, logged.fleet.key.public)
    assert failure(report, Check.IDENTITIES, "certificate.issuer").index == 0


# Signatures


def test_a_message_in_the_name_of_another_device_is_found(logged: LoggedSession) -> None:
    mine, theirs = (logged.find(MaskedInput, 1, name) for name in (ME, OTHER))
    raw = logged.rewritten(
        lambda entries: [replace(mine, peer=OTHER) if e == mine else e for e in entries if e != theirs]
    )
    place = failure(logged.audit(raw), Check.SIGNATURES, "signature")
    assert (place.kind, place.round, place.peer) == ("masked-input", 1, OTHER)


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"peer": "device-999"}, "entry.peer"),
        ({"kind": "letter"}, "entry.kind"),
        ({"kind": "unmask-response"}, "envelope.tag"),
    ],
    ids=["peer", "unknown kind", "another kind"],
)
def test_an_entry_that_contradicts_its_message_is_found(
    logged: LoggedSession, change: dict[str, Any], about: str
) -> None:
    old = logged.find(MaskedInput, 1)
    raw = logged.replaced(old, replace(old, **change))
    assert failure(logged.audit(raw), Check.SIGNATURES, about).index == old.index


# Order


@pytest.mark.parametrize(
    ("kind", "round_", "changes", "about"),
    [
        (Advert, 0, {"device": OTHER}, "advert.device"),
        (Advert, 0, {"share_key": bytes([7]) * 32}, "roster.adverts"),
        (Roster, 0, {"adverts": ()}, "roster.size"),
        (Shares, 0, {"context": bytes(32)}, "shares.context"),
        (Shares, 0, {"encrypted_shares": {}}, "shares.encrypted_shares"),
        (MaskedInput, 1, {"plan": bytes(32)}, "masked-input.plan"),
        (Survivors, 1, {"plan": bytes(32)}, "survivors.plan"),
        (ConsistencySignature, 1, {"survivors": bytes(32)}, "consistency-signature.survivors"),
        (UnmaskResponse, 1, {"survivors": bytes(32)}, "unmask-response.survivors"),
        (Result, 1, {"plan": bytes(32)}, "result.plan"),
        (Result, 1, {"survivors": ()}, "result.survivors"),
    ],
    ids=lambda value: getattr(value, "TAG", None),
)
def test_a_message_that_does_not_belong_is_found(
    logged: LoggedSession, kind: type[Message], round_: int, changes: dict[str, Any], about: str
) -> None:
    raw = logged.with_changed(kind, round_, **changes)
    expected = logged.find(Roster) if about == "roster.adverts" else logged.find(kind, round_)
    assert failure(logged.audit(raw), Check.ORDER, about).index == expected.index


@pytest.mark.parametrize(
    "kind", [Advert, Roster, Shares, MaskedInput, Survivors, ConsistencySignature, Unmask, UnmaskResponse, Result]
)
def test_a_step_that_is_answered_twice_is_found(logged: LoggedSession, kind: type[Message]) -> None:
    old = logged.find(kind, int(kind not in (Advert, Roster, Shares)))
    report = logged.audit(logged.replaced(old, old, old))
    assert failure(report, Check.ORDER, f"{kind.TAG}.repeated").index == old.index + 1


def test_a_second_offer_is_found(logged: LoggedSession) -> None:
    raw = logged.rewritten(lambda entries: [entries[0], replace(entries[0], peer=ME), *entries[1:]])
    assert failure(logged.audit(raw), Check.ORDER, "offer.repeated").index == 1


@pytest.mark.parametrize(("kind", "about"), [(Roster, "roster"), (Assignment, "plan")])
def test_a_missing_message_that_others_refer_to_is_found(
    logged: LoggedSession, kind: type[Message], about: str
) -> None:
    raw = logged.rewritten(lambda entries: [e for e in entries if not (e.kind == kind.TAG and e.round < 2)])
    failure(logged.audit(raw), Check.ORDER, about)


def test_a_message_that_comes_too_early_or_late_is_found(logged: LoggedSession) -> None:
    late, unmask = logged.find(ConsistencySignature, 1, "device-003"), logged.find(Unmask, 1)
    raw = logged.rewritten(lambda entries: reordered(entries, [late, unmask], [unmask, late]))
    assert failure(logged.audit(raw), Check.ORDER, "entry.order").kind == "consistency-signature"


def reordered(entries: list[Entry], old: list[Entry], new: list[Entry]) -> list[Entry]:
    at = entries.index(old[0])
    assert entries[at : at + len(old)] == old
    return entries[:at] + new + entries[at + len(old) :]


def with_assignment(logged: LoggedSession, peer: str, plan: Plan, holder: str, *, body: bool) -> bytes:
    """The log with another assignment for ``peer``: a plan, and the encrypted shares that were dealt to ``holder``.

    ``body``: with its body; otherwise the signature only.
    """
    dealt = logged.session.encrypted_shares
    shares = {dealer: to[holder] for dealer, to in dealt.items() if holder in to}
    raw = envelope.sign(logged.fleet.key, Assignment(plan, shares))
    old = logged.find(Assignment, 1, peer)
    return logged.replaced(old, replace(old, message=raw if body else envelope.with_body(raw, b"")))


def logged_plan(logged: LoggedSession) -> Plan:
    plan: Plan = logged.message(Assignment, 1).plan
    return plan


@pytest.mark.parametrize("body", [True, False])
def test_an_assignment_may_be_logged_with_its_body_or_without(logged: LoggedSession, body: bool) -> None:
    raw = with_assignment(logged, OTHER, logged_plan(logged), OTHER, body=body)
    assert (raw == logged.raw) != body
    assert logged.audit(raw).failed == ()


@pytest.mark.parametrize(("body", "about"), [(True, "assignment.plan"), (False, "assignment.signature")])
def test_different_plans_for_different_devices_are_found(logged: LoggedSession, body: bool, about: str) -> None:
    plan = replace(logged_plan(logged), training=b"for you alone")
    raw = with_assignment(logged, OTHER, plan, OTHER, body=body)
    assert failure(logged.audit(raw), Check.ORDER, about).index == logged.find(Assignment, 1, OTHER).index


@pytest.mark.parametrize(("body", "about"), [(True, "assignment.encrypted_shares"), (False, "assignment.signature")])
def test_encrypted_shares_that_no_dealer_sent_are_found(logged: LoggedSession, body: bool, about: str) -> None:
    raw = with_assignment(logged, OTHER, logged_plan(logged), ME, body=body)
    assert failure(logged.audit(raw), Check.ORDER, about).index == logged.find(Assignment, 1, OTHER).index


@pytest.mark.parametrize(
    ("changes", "about"),
    [
        ({"context": bytes(32)}, "plan.context"),
        ({"round": 2}, "plan.round"),
        ({"members": (OTHER, ME)}, "plan.order"),
        ({"members": (ME, ME, OTHER)}, "plan.order"),
        ({"members": (ME, OTHER, "stranger")}, "plan.members"),
    ],
    ids=["another session", "another round", "out of order", "a member twice", "a stranger"],
)
def test_a_plan_that_no_device_would_accept_is_found(
    logged: LoggedSession, changes: dict[str, Any], about: str
) -> None:
    raw = with_assignment(logged, ME, replace(logged_plan(logged), **changes), ME, body=True)
    assert failure(logged.audit(raw), Check.ORDER, about).index == logged.find(Assignment, 1, ME).index


def signed_by(logged: LoggedSession, entry: Entry, device: str, message: Message) -> Entry:
    """An entry like another one, but of this device and with this message."""
    return replace(entry, peer=device, message=envelope.sign(logged.fleet.devices[device].identity, message))


def test_an_update_of_a_device_that_is_not_in_the_plan_is_found(logged: LoggedSession) -> None:
    plan = replace(logged_plan(logged), members=(ME, ABSENT, "device-003"))
    assignment = replace(logged.find(Assignment, 1, ME), message=envelope.sign(logged.fleet.key, Assignment(plan, {})))
    update = signed_by(logged, logged.find(MaskedInput, 1), OTHER, MaskedInput(plan.digest(), OTHER, bytes(32)))
    raw = logged.rewritten(
        lambda entries: [*(e for e in entries if e.round == 0), assignment, update, logged.find(Abort, 3), entries[-1]]
    )
    place = failure(logged.audit(raw), Check.ORDER, "masked-input.device")
    assert (place.kind, place.peer) == ("masked-input", OTHER)


def test_two_survivor_sets_for_two_devices_are_found(logged: LoggedSession) -> None:
    named, vectors = logged.find(Survivors, 1), logged.message(Survivors, 1).vectors
    fewer = logged.resigned(named, Survivors, vectors={device: vectors[device] for device in (ME, OTHER)})
    raw = logged.replaced(named, named, replace(fewer, peer=OTHER))
    assert failure(logged.audit(raw), Check.ORDER, "survivors.repeated").index == named.index + 1


def test_an_unmask_request_for_another_survivor_set_is_found(logged: LoggedSession) -> None:
    survivors = logged.message(Unmask, 1).survivors
    fewer = replace(survivors, vectors={device: survivors.vectors[device] for device in (ME, OTHER)})
    raw = logged.with_changed(Unmask, 1, survivors=fewer)
    assert failure(logged.audit(raw), Check.ORDER, "unmask.survivors").index == logged.find(Unmask, 1).index


@pytest.mark.parametrize("kind", [ConsistencySignature, UnmaskResponse])
def test_an_answer_of_a_device_that_is_not_a_survivor_is_found(logged: LoggedSession, kind: type[Message]) -> None:
    """Otherwise devices that dropped out could make up a quorum."""
    named = logged.message(Survivors, 1)
    assert ABSENT not in named.vectors
    answer = (
        ConsistencySignature(named.digest(), ABSENT)
        if kind is ConsistencySignature
        else UnmaskResponse(named.digest(), ABSENT, {}, {})
    )
    old = logged.find(kind, 1)
    raw = logged.replaced(old, old, signed_by(logged, old, ABSENT, answer))
    assert failure(logged.audit(raw), Check.ORDER, f"{kind.TAG}.device").index == old.index + 1


def test_a_round_with_two_endings_is_found(logged: LoggedSession) -> None:
    """A sum was unmasked, and the log also says that none was."""
    result = logged.find(Result, 1)
    abort = envelope.sign(logged.fleet.key, Abort(logged_plan(logged).digest(), "too-few"))
    raw = logged.replaced(result, result, replace(result, kind=Abort.TAG, message=abort))
    assert failure(logged.audit(raw), Check.ORDER, "abort.repeated").index == result.index + 1


def test_a_round_whose_plan_is_nowhere_in_full_is_found(logged: LoggedSession) -> None:
    raw = with_assignment(logged, ME, logged_plan(logged), ME, body=False)  # the first: the others refer to it
    assert failure(logged.audit(raw), Check.ORDER, "plan").index == logged.find(Assignment, 1, ME).index


# Thresholds


@pytest.fixture
def careless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices that join any session; honest ones refuse those of the tests below."""
    for check in ("check", "check_roster"):
        monkeypatch.setattr(Policy, check, lambda *given: None)


@pytest.mark.usefixtures("careless")
def test_a_threshold_that_two_groups_can_reach_is_found(logged_of: Sessions) -> None:
    weak = logged_of([{}], devices=4, threshold=2, minimum_survivors=2)
    failure(weak.audit(), Check.THRESHOLDS, "spec.threshold")


@pytest.mark.usefixtures("careless")
def test_a_quorum_that_two_groups_can_reach_is_found(logged_of: Sessions) -> None:
    session = {"devices": 11, "degree": 6, "threshold": 5}  # on a sparse graph: the threshold is a neighborhood's
    weak, least = (logged_of([{}], minimum_survivors=count, **session) for count in (5, 6))
    failure(weak.audit(), Check.THRESHOLDS, "spec.minimum_survivors")
    assert least.audit().failed == ()
    assert "take 1 colluding device or more" in finding_of(least.audit(), Check.THRESHOLDS).text


def test_a_round_with_too_few_survivors_is_found(logged_of: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as weakened:
        for check in ("enough_devices", "enough_neighbors"):
            weakened.setattr(checks, check, lambda *given, **named: None)
        full = logged_of([{}], devices=5, threshold=4, minimum_survivors=4)
        small = logged_of([{Step.PLAN: ["device-000", "device-001"]}], devices=5, threshold=4, minimum_survivors=4)
    assert full.audit().failed == ()
    place = failure(small.audit(), Check.THRESHOLDS, "survivors.size")
    assert (place.kind, place.round) == ("survivors", 1)


# Survivors


def test_an_update_that_arrived_and_is_not_counted_is_found(logged: LoggedSession) -> None:
    report = logged.audit(logged.without(logged.find(MaskedInput, 1, OTHER)))
    place = failure(report, Check.SURVIVORS, "survivors.members")
    assert (place.kind, place.round) == ("survivors", 1)
    assert OTHER in report.failed[0].text


def test_a_consistency_signature_that_no_device_sent_is_found(logged: LoggedSession) -> None:
    raw = logged.without(logged.find(ConsistencySignature, 1, OTHER))
    assert failure(logged.audit(raw), Check.SURVIVORS, "unmask.signers").kind == "unmask"


def test_a_consistency_signature_that_is_not_valid_is_found(logged: LoggedSession) -> None:
    raw = logged.with_changed(Unmask, 1, consistency_signatures=dict.fromkeys([ME, OTHER, "device-003"], bytes(64)))
    assert failure(logged.audit(raw), Check.SURVIVORS, "unmask.signature").kind == "unmask"


def test_a_sum_without_an_unmask_request_is_found(logged: LoggedSession) -> None:
    """The request has the consistency signatures, and without them nothing shows that a quorum signed."""
    removed = {Unmask.TAG, ConsistencySignature.TAG}
    raw = logged.rewritten(lambda entries: [e for e in entries if e.kind not in removed])
    place = failure(logged.audit(raw), Check.SURVIVORS, "unmask")
    assert (place.kind, place.round) == ("unmask-response", 1)


# Shares and secrets


def test_a_share_of_the_other_kind_is_found(logged: LoggedSession) -> None:
    response = logged.message(UnmaskResponse, 1, OTHER)
    raw = logged.with_changed(UnmaskResponse, 1, OTHER, keys={**response.keys, ME: bytes(33)})
    place = failure(logged.audit(raw), Check.SHARES, "unmask-response.shares")
    assert (place.kind, place.round, place.peer) == ("unmask-response", 1, OTHER)


def test_wrong_shares_that_do_not_recover_a_secret_are_found(logged: LoggedSession) -> None:
    response = logged.message(UnmaskResponse, 1, OTHER)
    raw = logged.with_changed(UnmaskResponse, 1, OTHER, seeds={**response.seeds, ME: bytes(33)})
    report = logged.audit(raw)
    place = failure(report, Check.SECRETS, "unmask-response.shares")
    assert (place.kind, place.round) == ("result", 1)
    assert ME in report.failed[0].text


def test_a_wrong_share_that_did_no_harm_is_reported_with_its_sender(logged_of: Sessions) -> None:
    session = logged_of([{}], devices=5)
    response = session.message(UnmaskResponse, 1, ME)
    report = session.audit(session.with_changed(UnmaskResponse, 1, ME, seeds={**response.seeds, OTHER: bytes(33)}))
    assert report.failed == ()
    assert report.rounds[0].blamed == (ME,)
    assert f"wrong shares of {ME}" in finding_of(report, Check.SECRETS).text


# Results and sums


def test_a_wrong_sum_is_found(logged: LoggedSession) -> None:
    raw = logged.with_changed(Result, 2, sum=bytes(32))
    place = failure(logged.audit(raw), Check.SUMS, "result.sum")
    assert (place.kind, place.round) == ("result", 2)
    assert logged.audit(raw, vectors=False).failed == ()  # only the vectors show it


def test_a_kept_vector_that_was_altered_is_found_also_in_an_aborted_round(logged: LoggedSession) -> None:
    headers = [entry for entry in logged.entries if entry.kind == MaskedInput.TAG]
    assert {header.round for header in headers} == {1, 2, 3}  # the last one was aborted
    for header, digest in zip(headers, logged.vectors, strict=True):
        altered = {**logged.vectors, digest: bytes(len(logged.vectors[digest]))}
        report = audit(logged.raw, logged.fleet.authority.root, logged.fleet.key.public, altered.get)
        assert failure(report, Check.SUMS, "masked-input.vector") == header.place


def test_without_a_sum_the_check_of_sums_passes(logged_of: Sessions) -> None:
    report = logged_of([{Step.PLAN: ["device-000", "device-001"]}]).audit()
    finding = finding_of(report, Check.SUMS)
    assert (finding.status, finding.about) == (Status.PASS, "")


def _kept(vectors: dict[bytes, bytes]) -> Callable[[bytes, int], bytes | None]:
    return lambda digest, limit: vectors.get(digest)


def test_a_round_that_lacks_one_of_its_vectors_is_found_also_if_it_was_aborted(logged: LoggedSession) -> None:
    """Otherwise a vector that is removed takes a sum that does not hold out of the audit."""
    headers = [entry for entry in logged.entries if entry.kind == MaskedInput.TAG]
    assert {header.round for header in headers} == {1, 2, 3}  # the last one was aborted
    for header, digest in zip(headers, logged.vectors, strict=True):
        left = {other: vector for other, vector in logged.vectors.items() if other != digest}
        for raw in (logged.raw, logged.with_changed(Result, 1, sum=bytes(32))):
            report = audit(raw, logged.fleet.authority.root, logged.fleet.key.public, _kept(left))
            assert failure(report, Check.SUMS, "vectors") == header.place


def test_a_round_that_lacks_its_vectors_is_left_out_of_the_sums(logged: LoggedSession) -> None:
    left = dict(list(logged.vectors.items())[3:])  # those of the first round are gone
    report = audit(logged.raw, logged.fleet.authority.root, logged.fleet.key.public, _kept(left))
    assert report.failed == ()
    finding = finding_of(report, Check.SUMS)
    assert (finding.status, finding.about) == (Status.SKIPPED, "vectors")
    assert finding.text.startswith("1 of 2 sums recomputed")


@pytest.mark.parametrize(
    ("changes", "about", "kind"),
    [({"version": 9}, "result.version", "result"), ({"adapter": "cd" * 32}, "plan.adapter", "assignment")],
    ids=["version", "adapter"],
)
def test_an_adapter_of_another_origin_is_found(
    logged: LoggedSession, changes: dict[str, Any], about: str, kind: str
) -> None:
    assert failure(logged.audit(logged.with_changed(Result, 1, **changes)), Check.RESULTS, about).kind == kind


# Checkpoints


def test_checkpoints_of_another_session_are_found(logged: LoggedSession) -> None:
    raw = logged.rewritten(offer=bytes([1]) * 32)
    assert failure(logged.audit(raw), Check.IDENTITIES, "checkpoint.offer").index == 0


def test_checkpoints_that_name_different_predecessors_are_found(logged: LoggedSession) -> None:
    """The first names the session that ``chain`` compares; another in the same log could name a removed one."""
    log, raw = Transcript(logged.log.offer, SEED), MAGIC
    for entry in logged.entries:
        if entry.kind != Checkpoint.TAG:
            raw += append(log, entry)
        else:
            raw += log.checkpoint(logged.fleet.key, Stage.CLOSED if entry == logged.entries[-1] else Stage.OPEN)
            log.previous = bytes([1]) * 32
    second = [entry.index for entry in logged.entries if entry.kind == Checkpoint.TAG][1]
    assert failure(logged.audit(raw), Check.LOG, "checkpoint.previous").index == second


def test_shares_of_a_device_that_is_not_on_the_roster_are_found(logged_of: Sessions) -> None:
    """The device is certified and in the cohort, but its advert came too late."""
    session, late = logged_of([], devices=5), "device-004"
    old, message = session.find(Roster), session.message(Roster)
    kept = tuple(raw for raw in message.adverts if Advert.decode(envelope.unverified_body(raw)).device != late)
    context = context_of(message.offer, replace(message, adverts=kept).digest())
    shares = session.resigned(session.find(Shares, 0, late), Shares, context=context)
    new = {Roster.TAG: session.resigned(old, Roster, adverts=kept), Shares.TAG: shares}
    raw = session.rewritten(
        lambda entries: [
            new.get(entry.kind, entry)
            for entry in entries
            if entry.peer != late and (entry.kind != Shares.TAG or entry.peer == ME)
        ]
    )
    place = failure(session.audit(raw), Check.ORDER, "shares.device")
    assert (place.kind, place.peer) == ("shares", late)


@pytest.mark.parametrize("longer", [True, False], ids=["longer", "shorter"])
def test_encrypted_shares_of_another_size_than_the_rounds_need_are_found(logged_of: Sessions, longer: bool) -> None:
    session = logged_of([])
    shares = session.message(Shares, 0, ME).encrypted_shares
    sound = shares[OTHER]
    wrong = (
        replace(sound, ciphertext=sound.ciphertext + bytes(1)) if longer else replace(sound, digests=sound.digests[1:])
    )
    raw = session.with_changed(Shares, 0, ME, encrypted_shares={**shares, OTHER: wrong})
    place = failure(session.audit(raw), Check.ORDER, "shares.ciphertext")
    assert place.index == session.find(Shares, 0, ME).index


def test_the_offer_must_come_first(logged: LoggedSession) -> None:
    raw = logged.rewritten(lambda entries: [e for e in entries if e.kind != Offer.TAG])
    report = logged.audit(raw)
    assert failure(report, Check.IDENTITIES, "envelope.tag").index == 0
    assert report.failed[0].place.kind == "advert"  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", [Checkpoint, Offer])
def test_an_entry_after_the_end_of_a_log_is_found(logged: LoggedSession, kind: type[Message]) -> None:
    """The coordinator signed it, but a closed log says that nothing follows."""
    log, raw = logged.signed_anew()
    size = log.tree.size
    offer = Entry(size, Offer.TAG, log.round, "*", b"", log.latest)
    after = log.checkpoint(logged.fleet.key) if kind is Checkpoint else append(log, offer)
    found = finding_of(logged.audit(raw + after), Check.LOG)
    assert (found.status, found.about) == (Status.FAIL, "checkpoint.stage")
    assert found.place is not None
    assert found.place.index == size


# Endings


@pytest.mark.parametrize("round_", [1, 2, 3])
def test_a_round_without_an_ending_is_found(logged: LoggedSession, round_: int) -> None:
    """The checkpoints after it are signed anew, and the log is closed."""
    ending = logged.find(Abort if round_ == 3 else Result, round_)
    place = failure(logged.audit(logged.without(ending)), Check.ORDER, "round.ending")
    assert (place.kind, place.round) == ("checkpoint", round_)


def test_a_round_without_an_ending_before_the_next_one_is_found(logged: LoggedSession) -> None:
    """Also without the checkpoint in between: a round begins after a checkpoint only."""
    ending = logged.find(Result, 2)
    raw = logged.without(ending, logged.entries[ending.index + 1])
    place = failure(logged.audit(raw), Check.ORDER, "checkpoint.missing")
    assert (place.kind, place.round) == ("assignment", 3)


def test_a_result_that_is_left_out_is_missed_in_the_next_round(logged: LoggedSession) -> None:
    """The coordinator has put an abort in its place."""
    result = logged.find(Result, 2)
    abort = Abort(logged.message(Result, 2).plan, "too-few")
    raw = logged.replaced(result, replace(result, kind=Abort.TAG, message=envelope.sign(logged.fleet.key, abort)))
    place = failure(logged.audit(raw), Check.RESULTS, "plan.adapter")
    assert (place.kind, place.round) == ("assignment", 3)


@pytest.mark.parametrize("round_", [1, 2, 3])
def test_an_unfinished_log_without_the_checkpoint_before_a_round_is_found(logged: LoggedSession, round_: int) -> None:
    """Without it nobody's key is needed to leave out entries of the round before, or of the session's beginning."""
    begun = next(entry for entry in logged.entries if (entry.kind, entry.round) == (Assignment.TAG, round_))
    assert logged.entries[begun.index - 1].kind == Checkpoint.TAG
    left = [*logged.entries[: begun.index - 1], *(e for e in logged.entries[begun.index :] if e.round == round_)]
    numbered = [replace(entry, index=index) for index, entry in enumerate(left)]
    raw = write([each for each in numbered if each.kind != Checkpoint.TAG or each.index < begun.index - 1])
    place = failure(logged.audit(raw, unfinished=True), Check.ORDER, "checkpoint.missing")
    assert (place.kind, place.round) == ("assignment", round_)
