"""Every round of a log has an ending, and a checkpoint right before it: logs in which one of the two was left out."""

from dataclasses import replace

import pytest

from aggregation import envelope
from aggregation.messages import Assignment
from aggregation.transcript import ENTRY, MAGIC, Abort, Checkpoint, Result
from edgeadapt.auditing import Check
from tests.support.sessions import LoggedSession, failure, record


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
    raw = MAGIC + b"".join(
        record(ENTRY.encode(replace(entry, index=index)))
        for index, entry in enumerate(left)
        if entry.kind != Checkpoint.TAG or index < begun.index - 1
    )
    place = failure(logged.audit(raw, unfinished=True), Check.ORDER, "checkpoint.missing")
    assert (place.kind, place.round) == ("assignment", round_)
