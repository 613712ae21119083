"""A coordinator offers an adapter that few examples move, and reads these from the sum of all devices.

Nothing that a device sees of such an adapter tells it from an honest one: the last trap here is made by ordinary
training, within ordinary numbers. What bounds what a sum says of one device is noise.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregation.errors import ProtocolError
from client.node.policy import TrainingLimits
from client.training import torchengine
from client.training.examples import Example
from client.training.trainer import ClassifierTrainer
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import Part
from edgeadapt.methods.trainable import configuration
from edgeadapt.rounds.roundtask import Outcome
from edgeadapt.rounds.task import OptimizerName, RateSchedule, Task, shared_layout
from tests.conftest import SAID
from tests.support import refused
from tests.support.crafted import (
    BIAS,
    EXACT,
    LABELS,
    LARGEST,
    TRAPPING,
    WEIGHT,
    Trap,
    likeliest_text,
    outcomes,
    phrases,
    seeded,
    seen,
    task_of,
    trap,
    with_noise,
    with_random_b,
    words_by_place,
)

WORDS = sorted({word for said in SAID.values() for phrase in said for word in phrase.split()})
DEVICES, EXAMPLES = 8, 10
LORA = PeftConfig.lora(8, 8)
STEPS: dict[str, dict[str, Any]] = {
    "one step": {},
    "steps of one example": {"batch_size": 1, "learning_rate": 1e-4},
    "three epochs": {"batch_size": 4, "epochs": 3, "learning_rate": 1e-4},
}
ADAMW = {"optimizer": OptimizerName.ADAMW}
FALLING = ADAMW | {"schedule": RateSchedule.LINEAR}
LIMITS = TrainingLimits(minimum_batch_size=1)  # of an owner who permits steps of one example
Vector = NDArray[np.float64]


@pytest.fixture(autouse=True)
def alone(one_thread: None) -> None: ...


@pytest.fixture(scope="module")
def lora(tiny_base: Any) -> ClassifierTrainer:
    return torchengine.classifier(tiny_base, LABELS, LORA)


@pytest.fixture(scope="module")
def trapped(lora: ClassifierTrainer) -> Trap:
    return trap(lora, with_random_b(seeded(lora)), phrases(WORDS, 1000, seed=1), one_in=DEVICES * EXAMPLES)


@pytest.fixture(scope="module")
def through(lora: ClassifierTrainer, trapped: Trap) -> list[str]:
    return split(lora, trapped)[0]


@pytest.fixture(scope="module")
def ordinary(lora: ClassifierTrainer, trapped: Trap) -> list[str]:
    return split(lora, trapped)[1]


def split(trainer: ClassifierTrainer, found: Trap) -> tuple[list[str], list[str]]:
    texts = sorted(set(phrases(WORDS, 2000, seed=2)))
    held = found.holds(trainer, texts)
    return [t for t, h in zip(texts, held, strict=True) if h], [t for t, h in zip(texts, held, strict=True) if not h]


def examples_of(others: Sequence[str], secret: str, seed: int) -> list[list[Example]]:
    """The examples of all devices, of which one has the secret text."""
    rng = np.random.default_rng(seed)
    texts = list(rng.choice(np.array(others), DEVICES * EXAMPLES))
    texts[rng.integers(len(texts))] = secret
    labelled = [Example(str(text), int(rng.integers(TRAPPING))) for text in texts]
    return [labelled[at : at + EXAMPLES] for at in range(0, len(labelled), EXAMPLES)]


def read_alone(trainer: ClassifierTrainer, secret: str, update: Tensors) -> bool:
    """Whether an update shows the words of one text in order, and nothing else."""
    words = secret.split()
    return words_by_place(trainer, update)[1 : 2 + len(words)] == [[word] for word in words] + [[]]


@pytest.mark.parametrize("steps", STEPS)
def test_the_words_of_one_example_are_read_in_order_from_the_sum_and_from_what_is_published(
    lora: ClassifierTrainer, trapped: Trap, through: list[str], ordinary: list[str], steps: str
) -> None:
    task = task_of(LORA, (Part.A, Part.B), **STEPS[steps])
    LIMITS.check(task, trapped.adapter)
    for seed, secret in enumerate(through[:2]):
        shown = seen(lora, task, outcomes(lora, trapped.adapter, task, examples_of(ordinary, secret, seed), seed), seed)
        assert read_alone(lora, secret, shown.by_name(shown.total))
        assert read_alone(lora, secret, shown.by_name(shown.mean))


# Which of some texts it is, from the update of any part of any method


FORMS: dict[str, tuple[dict[str, Any], Part]] = {
    "A": ({"method": "lora"}, Part.A),
    "B": ({"method": "lora"}, Part.B),
    "R of Fed-SB": ({"method": "lora"}, Part.R),
    "magnitudes of DoRA": ({"method": "dora", "rank": 2}, Part.VECTORS),
    "IA3": ({"method": "ia3"}, Part.VECTORS),
    "normalizations": ({"method": "ln_tuning"}, Part.VECTORS),
    "biases": ({"method": "lora", "rank": 2, "bias": "all"}, Part.VECTORS),
    "head": ({"method": "lora", "rank": 2}, Part.HEAD),
}
CANDIDATES = 12


@pytest.mark.parametrize("form", FORMS)
def test_one_example_is_found_among_candidates_by_the_update_of(
    tiny_base: Any, trapped: Trap, through: list[str], ordinary: list[str], form: str
) -> None:
    """Also with AdamW, and from what is published, except for the few numbers of a head: it has noise of this rate."""
    given, part = FORMS[form]
    config = configuration(tiny_base, **given)
    trainer, candidates = torchengine.classifier(tiny_base, LABELS, config), through[:CANDIDATES]
    start = seeded(trainer) if part is not Part.A else with_random_b(seeded(trainer))
    start |= {name: trapped.adapter[name] for name in (WEIGHT, BIAS)}
    task = task_of(config, (part,), **ADAMW)
    LIMITS.check(task, start)
    from_each = outcomes(trainer, start, task, [[Example(text, 1)] for text in candidates])
    known = updates(trainer, task, from_each)
    for seed in range(2):
        which = int(np.random.default_rng(seed).integers(CANDIDATES))
        devices = outcomes(trainer, start, task, examples_of(ordinary, candidates[which], seed), seed)
        shown = seen(trainer, task, devices, seed)
        assert likeliest(known, shown.layout, shown.total) == which
        assert part is Part.HEAD or likeliest(known, shown.layout, shown.mean) == which


def updates(trainer: ClassifierTrainer, task: Task, devices: Sequence[Outcome]) -> Vector:
    """The update that each makes, of length 1; of a head, the row that traps, shape ``(outcomes, numbers)``."""
    layout = shared_layout(trainer.layout, task)
    made = [layout.flatten(layout.select(o.trained)) - layout.flatten(layout.select(o.start)) for o in devices]
    found = np.stack([trapping(layout, update.astype(np.float64)) for update in made])
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def trapping(layout: Layout, update: Vector) -> Vector:
    """Of a head, the row that traps; of anything else, all numbers."""
    parts = layout.unflatten(update.astype(np.float32))
    return parts[WEIGHT][TRAPPING].astype(np.float64) if WEIGHT in parts else update


def likeliest(known: Vector, layout: Layout, update: Vector) -> int:
    """The number of the candidate whose update is most like this one."""
    return int((known @ trapping(layout, update)).argmax())


# A row for each text that the coordinator looks for


SPARE, REAL = 200, 3


def test_rows_of_labels_that_nobody_has_show_each_text_that_was_guessed(tiny_base: Any) -> None:
    """A label more for each guess: its row is moved by the examples that are nearest to the guess, and by no other."""
    trainer = torchengine.classifier(tiny_base, REAL + SPARE, PeftConfig.lora(2, 4))
    guesses, devices = phrases(WORDS, SPARE, seed=1), list[list[Example]]()
    rng = np.random.default_rng(0)
    for _ in range(DEVICES):
        texts = rng.choice(np.array(guesses), EXAMPLES)
        devices.append([Example(str(text), int(rng.integers(REAL))) for text in texts])
    rows = trainer.embed(guesses).astype(np.float64)
    rows -= rows.mean(0)
    biases = -(rows**2).sum(1) / 2 - rows @ trainer.embed(guesses).mean(0)
    scale = LARGEST / max(np.abs(rows).max(), np.abs(biases - biases.mean()).max())
    weight = np.vstack([np.zeros((REAL, rows.shape[1])), scale * rows]).astype(np.float32)
    bias = np.concatenate([np.full(REAL, -LARGEST), scale * (biases - biases.mean())]).astype(np.float32)
    start = seeded(trainer) | {WEIGHT: weight, BIAS: bias}
    labels = tuple(map(str, range(REAL + SPARE)))
    for settings in ({}, ADAMW):
        task = task_of(PeftConfig.lora(2, 4), (Part.A, Part.B, Part.HEAD), labels=labels, **settings)
        LIMITS.check(task, start)
        with refused(ProtocolError, "task.labels", value=REAL + SPARE):  # an owner who knows the number of labels
            TrainingLimits(maximum_labels=REAL).check(task, start)
        shown = seen(trainer, task, outcomes(trainer, start, task, devices))
        moved = np.abs(shown.by_name(shown.total)[WEIGHT][REAL:]).max(1)
        present = {example.text for examples in devices for example in examples}
        read = {guesses[number] for number in np.argsort(-moved)[: len(present)]}
        assert len(read & present) >= 0.8 * len(present)
        assert len(present) < SPARE / 2


# The same with noise


TRIALS = 48


@pytest.mark.parametrize(
    ("settings", "least", "most"),
    [
        (EXACT, TRIALS, TRIALS),
        (with_noise(8.0), 0, TRIALS // 3),
        (with_noise(1.0), 0, TRIALS // CANDIDATES + 6),  # three deviations above chance
    ],
    ids=["without noise", "epsilon 8", "epsilon 1"],
)
def test_noise_hides_which_of_the_candidates_the_example_is(
    lora: ClassifierTrainer,
    trapped: Trap,
    through: list[str],
    ordinary: list[str],
    settings: Any,
    least: int,
    most: int,
) -> None:
    """With epsilon 1 nothing is left; with 8, which promises little against a guess, most is hidden."""
    task, candidates = task_of(LORA, (Part.A, Part.B), learning_rate=0.1), through[:CANDIDATES]
    from_each = outcomes(lora, trapped.adapter, task, [[Example(text, 1)] for text in candidates])
    others = outcomes(lora, trapped.adapter, task, examples_of(ordinary, ordinary[0], 0))[1:]
    known, hits = updates(lora, task, from_each), 0
    for trial in range(TRIALS):
        which = trial % CANDIDATES
        shown = seen(lora, task, [from_each[which], *others], trial, settings)
        hits += likeliest(known, shown.layout, shown.total) == which
        if settings is not EXACT:
            assert not read_alone(lora, candidates[which], shown.by_name(shown.total))
    assert least <= hits <= most


# No number of the adapter gives a trap away


def test_an_adapter_of_ordinary_numbers_made_by_ordinary_training_is_a_trap_too(lora: ClassifierTrainer) -> None:
    """It was trained to tell one word from all others. Of each example with this word, all words are read."""
    word, direction = "wake", np.random.default_rng(3).standard_normal(32)
    direction /= np.linalg.norm(direction)
    head = {
        WEIGHT: 16 * np.stack([-direction] * TRAPPING + [direction]).astype(np.float32),  # as long as a vendor's rows
        BIAS: np.zeros(LABELS, np.float32),
    }
    public = [Example(text, TRAPPING if word in text.split() else 0) for text in phrases(WORDS, 600, seed=1)]
    training = task_of(LORA, (Part.A, Part.B), epochs=20, batch_size=32, learning_rate=1e-2, **FALLING)
    start = lora.train(seeded(lora) | head, public, training, epochs=20, rng=np.random.default_rng(0))
    assert max(float(np.abs(value).max()) for value in start.values()) < 10
    texts = phrases(WORDS, 300, seed=2)
    secret = [text for text in texts if word in text.split()][:6]
    others = [text for text in texts if word not in text.split()]
    task, read = task_of(LORA, (Part.A, Part.B)), 0
    for seed, text in enumerate(secret):
        shown = seen(lora, task, outcomes(lora, start, task, examples_of(others, text, seed), seed), seed)
        read += likeliest_text(lora, shown.by_name(shown.total)) == text.split()
    assert read >= 4


# All examples at once


@pytest.mark.parametrize(("rank", "shown"), [(16, True), (2, False)])
def test_an_adapter_that_changes_nothing_shows_the_words_of_all_devices_if_its_rank_is_high(
    tiny_base: Any, rank: int, shown: bool
) -> None:
    """The rows of A's update in the first layer are more than the words: 32 of the queries and values, or four."""
    config, rng = PeftConfig.lora(rank, rank), np.random.default_rng(1)
    trainer = torchengine.classifier(tiny_base, LABELS, config)
    head = rng.standard_normal((LABELS, 32), np.float32)
    start = with_random_b(seeded(trainer)) | {WEIGHT: 16 * head / np.linalg.norm(head, axis=1, keepdims=True)}
    task = task_of(config, (Part.A, Part.B), learning_rate=0.05)
    LIMITS.check(task, start)
    texts = [" ".join(rng.choice(WORDS, 2)) for _ in range(DEVICES)]
    devices = [[Example(text, int(rng.integers(LABELS)))] for text in texts]
    found = seen(trainer, task, outcomes(trainer, start, task, devices))
    read = words_by_place(trainer, found.by_name(found.total), least=1e-5)[1:3]
    have = {word for text in texts for word in text.split()}
    assert ({word for words in read for word in words} == have) == shown
