"""What a device rehearses when it makes its personal adapter, and that it keeps none that forgets public examples."""

from dataclasses import replace
from typing import Any

import pytest

from client.training.examples import Example, Score, Split
from client.training.personal import Candidate, Choice, PersonalStep, personalize, rehearsal
from client.training.trainer import ClassifierTrainer
from edgeadapt.formats.layout import Tensors
from tests.client.training.test_trainer import EXAMPLES, MINE, STEP, TASK, distance, rng, start, trainer

__all__ = ["start", "trainer"]  # fixtures

pytestmark = pytest.mark.usefixtures("one_thread")

ENGLISH, GERMAN = "turn on the kitchen lights", "mach das licht in der küche an"
PUBLIC = tuple(
    Example(f"{text} {number}", label) for number in range(3) for label in range(2) for text in (ENGLISH, GERMAN)
)


@pytest.mark.parametrize(("own", "first", "other"), [(GERMAN, "mach", "turn"), (ENGLISH, "turn", "mach")])
def test_a_device_rehearses_public_examples_in_its_own_words_and_counts_others_in_other_words_too(
    trainer: ClassifierTrainer, own: str, first: str, other: str
) -> None:
    found = rehearsal(trainer, [Example(own, 0)], PUBLIC, 2)
    assert [example.label for example in found.trained] == [0, 0, 1, 1]
    assert all(example.text.startswith(first) for example in found.trained)
    assert [(example.text.split()[0], example.label) for example in found.counted] == [
        (first, 0),
        (first, 1),
        (other, 0),
        (other, 1),
    ]
    assert not {*found.trained} & {*found.counted}


def test_few_public_examples_are_rehearsed_none_is_counted_twice_and_those_of_the_device_are_neither(
    trainer: ClassifierTrainer,
) -> None:
    three = [Example(text, 1) for text in ("stop", "next song", "play music")]
    assert [len(found) for found in counted(trainer, three, 2)] == [2, 1]
    assert [len(found) for found in counted(trainer, three, 9)] == [3, 0]
    assert [len(found) for found in counted(trainer, three, 0)] == [0, 0]
    assert [len(found) for found in counted(trainer, three, 2, own="  STOP")] == [2, 0]


def counted(trainer: ClassifierTrainer, public: list[Example], each: int, own: str = "lights") -> tuple[Any, Any]:
    """What is rehearsed and what is counted."""
    found = rehearsal(trainer, [Example(own, 0, Split.VALIDATION)], public, each)
    return found.trained, found.counted


def test_rehearsal_keeps_what_a_device_never_says(trainer: ClassifierTrainer, start: Tensors) -> None:
    """The personal adapter forgets a label without an example, unless it rehearses public ones of it."""
    begin = trainer.train(start, EXAMPLES, TASK, epochs=12, rng=rng())
    lost = [example for example in EXAMPLES if example.label == 2]
    own, public = [example for example in EXAMPLES if example.label != 2], [Example("set timers", 2)]
    forgot, kept = (
        trainer.train(begin, [*own, *rehearsal(trainer, own, public, each).trained], TASK, epochs=12, rng=rng())
        for each in (0, 1)
    )
    assert trainer.score(kept, lost).loss < 0.5 * trainer.score(forgot, lost).loss


@pytest.mark.parametrize("method", ["fine-tune", "ridge"])
def test_a_personal_adapter_that_forgets_public_examples_is_moved_back_or_not_kept(
    trainer: ClassifierTrainer, start: Tensors, method: str
) -> None:
    """The device's examples give the public ones other labels, so that a personal adapter cannot do both."""
    shared = trainer.train(start, EXAMPLES, TASK, epochs=40, rng=rng())
    plain = [example for example in EXAMPLES if trainer.score(shared, [example]).correct]
    others = [replace(example, label=(example.label + 1) % 3) for example in plain]
    both, how = {Candidate.GLOBAL: shared}, PersonalStep(40, 64.0, method, choice=Choice.NEVER)
    forgot = personalize(trainer, both, others, TASK, how, rng=rng())
    kept = personalize(trainer, both, others, TASK, how, rng=rng(), plain=plain)
    assert trainer.score(forgot.adapter, plain).correct < len(plain) == trainer.score(kept.adapter, plain).correct
    assert distance(kept.adapter, shared) < distance(forgot.adapter, shared)


def test_a_personal_adapter_that_forgets_in_each_quarter_of_the_way_is_no_candidate(
    trainer: ClassifierTrainer, start: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, score = list[Tensors](), trainer.score

    def scored(adapter: Tensors, examples: Any) -> Score:
        if examples is not plain:
            return score(adapter, examples)
        asked.append(adapter)
        return Score(int(adapter is start), 1, 0.0)

    monkeypatch.setattr(trainer, "score", scored)
    plain, both = [EXAMPLES[0]], {Candidate.GLOBAL: start}
    kept = personalize(trainer, both, MINE, TASK, replace(STEP, epochs=1), rng=rng(), plain=plain)
    assert (kept.chosen, set(kept.scores)) == (Candidate.GLOBAL, {Candidate.GLOBAL})
    steps = [distance(adapter, start) / distance(asked[1], start) for adapter in asked]
    assert steps == pytest.approx([0, 1, 0.75, 0.5, 0.25], abs=1e-3)
