"""The history of what was learned: sealed, bounded, and true of the adapter in use alone."""

from dataclasses import replace

import pytest

from aggregation.errors import DataError, TrustError
from client.training.corrections import MAX_CORRECTIONS, MAX_LESSONS, Before, Correction, Lesson, LessonHistory
from tests.support import refused
from tests.support.bundles import LENGTHS

KEY = bytes(range(32))


def digest(number: int) -> str:
    return f"{number:064x}"


def lesson(number: int, label: str = "Light") -> Lesson:
    before = Before(b"manifest", b"file") if number % 2 else None
    return Lesson((Correction(f"phrase {number} ✓", label),), digest(number + 1), digest(number), before)


def taught(count: int) -> LessonHistory:
    history = LessonHistory()
    for number in range(count):
        history = history.then(lesson(number))
    return history


def test_what_is_sealed_is_opened_and_hides_its_texts() -> None:
    sealed = taught(3).seal(KEY)
    assert LessonHistory.open(sealed, KEY) == taught(3)
    assert b"phrase" not in sealed
    assert "phrase" not in repr(taught(3))


@pytest.mark.parametrize("length", LENGTHS)
def test_a_history_of_another_length_is_refused(length: str) -> None:
    with refused(TrustError, "sealed.ciphertext"):
        LessonHistory.open(LENGTHS[length](taught(1).seal(KEY)), KEY)


def test_another_key_opens_nothing() -> None:
    with refused(TrustError, "sealed.ciphertext"):
        LessonHistory.open(taught(1).seal(KEY), KEY[::-1])


def test_steps_are_bounded_and_their_corrections_kept() -> None:
    history = taught(MAX_LESSONS + 2)
    assert (len(history.lessons), len(history.kept)) == (MAX_LESSONS, 2)
    assert len(history.corrections) == MAX_LESSONS + 2
    assert len(taught(MAX_CORRECTIONS + MAX_LESSONS + 3).kept) == MAX_CORRECTIONS


def test_the_newest_label_of_a_text_counts() -> None:
    history = taught(2).then(replace(lesson(2), corrections=(Correction("phrase 0 ✓", "Music"),)))
    assert {one.text: one.label for one in history.corrections}["phrase 0 ✓"] == "Music"
    assert len(history.corrections) == 2


def test_a_step_that_made_no_adapter_is_left_out() -> None:
    assert taught(3).current(digest(3)) == taught(3)
    assert taught(3).current(digest(2)) == taught(2)


def test_after_another_adapter_was_installed_corrections_stay_and_nothing_can_be_undone() -> None:
    history = taught(3).current(digest(99))
    assert (history.lessons, len(history.corrections)) == ((), 3)
    with refused(DataError, "--undo"):
        history.undone()


def test_undoing_returns_the_last_step() -> None:
    last, history = taught(3).undone()
    assert (last, history) == (lesson(2), taught(2))
