"""A language model learns on the device that answers: from corrections, at once, and from the device's own texts."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from adapters.bundle import TOKENIZER
from adapters.layout import Tensors
from adapters.parts import PARTS
from adapters.peftconfig import PeftConfig
from adapters.task import Task
from aggregation.errors import ConfigError, DataError
from client.inference.text import checked, require_plain, special_tokens
from client.learning.corrections import Correction, check_count
from client.learning.learner import (
    BATCH_SIZE,
    MAX_REHEARSED,
    PERSONAL_RATE,
    TRAINING_STATE,
    Learner,
    stated_config,
    step_digest,
)
from client.learning.tune import descend_until
from client.training.control import UNLIMITED, TrainingCheckpoint, TrainingControl
from client.training.examples import MAX_TEXT, Example, Split, in_split, read_examples
from client.training.languagegraph import LanguageGraphTrainer
from client.training.personal import PersonalMethod, PersonalStep

LIKELY = 0.5  # probability of each token of an answer at which training ends: the answering graph rounds otherwise
LEARNING_RATE = 0.005  # of a correction, whose few steps have to change several tokens
VIRTUAL_RATE = 0.1  # of virtual tokens, which are few numbers (Lester et al. 2021 train prompts at 0.3)


@dataclass(frozen=True, slots=True)
class LanguagePersonalized:
    """What a personal step of a language model did.

    Attributes:
        adapter, version: The adapter that is in use now.
        made: Whether the step made it; else another one predicts the held-out examples better.
        seconds: Of the step.
        trained, held_out: Examples.
        bits: For each byte of the held-out examples, by adapter: ``global``, ``personal``, and ``in use`` before the
            step; none without them.
    """

    adapter: str
    version: int
    made: bool
    seconds: float
    trained: int
    held_out: int
    bits: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TextBits:
    """A text, and what it costs before and after learning, in bits per byte.

    Attributes:
        prompt, text: The text, and what it answers; empty without a prompt.
        before, after: Bits per byte.
        known: Whether each of its tokens is the most likely one after learning: without sampling it is the answer.
    """

    prompt: str = field(repr=False)
    text: str = field(repr=False)
    before: float
    after: float
    known: bool


@dataclass(frozen=True, slots=True)
class LanguageLearned:
    """What learning did to a language model.

    Attributes:
        adapter, version: The private adapter that is in use now.
        steps, seconds: Of training.
        taught: The corrections.
        others: Earlier corrections, and the texts that were given to be compared.
    """

    adapter: str
    version: int
    steps: int
    seconds: float
    taught: tuple[TextBits, ...]
    others: tuple[TextBits, ...]


def teach_language_model(
    learner: Learner,
    corrections: Sequence[Correction],
    compared: Sequence[Example] = (),
    report: Callable[[int], object] = lambda _: None,
) -> LanguageLearned:
    """Tune the adapter in use until it answers prompts as taught, and put it into use; earlier ones are rehearsed.

    Args:
        learner: Opened for any task.
        corrections: Prompts, and the right answer to each.
        compared: Texts that are not trained, to see what is forgotten.
        report: Gets the number of each step of training, of at most ``MAX_STEPS``, before it.

    Raises:
        DataError: A prompt or answer cannot be learned, there are none or too many, none was learned, or a loss is not
            finite.
        ConfigError: The bundle has no training graph, or not one for this adapter.
        OSError: The disk is full, for example.
    """
    check_count(corrections)
    special = special_tokens(learner.library.base.files[TOKENIZER])
    for number, one in enumerate(corrections, 1):
        for about, text in (("prompt", one.text), ("answer", one.label)):
            if not text.strip() or len(text) > MAX_TEXT:
                size = f"has {len(text)} characters" if text.strip() else "is empty"
                reason = f"the {about} of correction {number} {size}: 1 to {MAX_TEXT} can be learned"
                raise DataError(reason, about=about, value=len(text))
            require_plain(checked(text), special, about)
    manifest = learner.adapter.manifest
    trainer = LanguageGraphTrainer(learner.base, stated_config(manifest))
    start, begun = trainer.tensors_of(learner.adapter.inputs), time.perf_counter()
    taught, prompts = _examples(corrections), {one.text for one in corrections}
    for number, example in enumerate(taught, 1):
        if trainer.is_cut(example):
            reason = f"correction {number} has more tokens than can be learned: teach a shorter answer"
            raise DataError(reason, about="answer", value=number)
    earlier = _examples([one for one in learner.history.corrections[::-1] if one.text not in prompts][:MAX_REHEARSED])

    def learned(adapter: Tensors) -> bool:
        return trainer.least_probability(adapter, taught) >= LIKELY

    tuned = descend_until(learned, trainer, start, taught, earlier, _rate(trainer.config, LEARNING_RATE), report=report)
    seconds = time.perf_counter() - begun
    found = [_text_bits(trainer, one, start, tuned.adapter) for one in (*taught, *earlier, *compared)]
    own = tuple(found[: len(taught)])
    if not any(one.known for one in own):
        reason = f"nothing was learned in {tuned.steps} steps; the adapter in use stays: teach other answers"
        raise DataError(reason, about="corrections")
    made = learner.put_into_use(manifest, corrections, trainer.inputs_of(tuned.adapter))
    return LanguageLearned(made.name, made.version, tuned.steps, seconds, own, tuple(found[len(taught) :]))


def _rate(config: PeftConfig, usual: float) -> float:
    """The learning rate of an adapter, where none is named."""
    return VIRTUAL_RATE if config.num_virtual_tokens else usual


def _examples(corrections: Sequence[Correction]) -> list[Example]:
    return [Example(one.label, prompt=one.text) for one in corrections]


def _text_bits(trainer: LanguageGraphTrainer, text: Example, before: Tensors, after: Tensors) -> TextBits:
    old, new = (trainer.score(adapter, [text]) for adapter in (before, after))
    bits = old.loss / math.log(2), new.loss / math.log(2)
    return TextBits(text.prompt, text.text, *bits, new.correct == 1)


def personalize_language_model(
    learner: Learner,
    examples: Path,
    how: PersonalStep,
    learning_rate: float | None,
    control: TrainingControl = UNLIMITED,
) -> LanguagePersonalized:
    """The personal step of a language model: the global adapter, fine-tuned on the device's texts, is put into use.

    Texts are also what the device was taught. The adapter is not put into use, if the global adapter, or the one in
    use, predicts the held-out examples better.

    Args:
        learner: Opened for any task.
        examples: The device's examples file.
        how: The step, whose method is fine-tuning.
        learning_rate: As of ``Learner.personalize``; None: ``VIRTUAL_RATE`` for virtual tokens, else ``PERSONAL_RATE``.
        control: As of ``Learner.personalize``.

    Raises:
        DataError, ConfigError, OSError: As ``Learner.personalize``.
    """
    origin, begun = learner.global_adapter(), time.perf_counter()
    if how.method is not PersonalMethod.FINE_TUNE:
        raise ConfigError("a language model has no head to fit: leave out --method", about="--method")
    own, taught = read_examples(examples, 0), _examples(learner.history.corrections)
    training, held_out = [*in_split(own, Split.TRAIN), *taught], in_split(own, Split.VALIDATION)
    config = stated_config(origin.manifest)
    trainer = LanguageGraphTrainer(learner.base, config)
    start, rate = trainer.tensors_of(origin.inputs), learning_rate or _rate(config, PERSONAL_RATE)
    subject = step_digest(origin.manifest, rate, how, [*own, *taught])

    def bits(adapter: Tensors) -> float:
        return trainer.score(adapter, held_out).loss / len(held_out) / math.log(2)

    checkpoint = TrainingCheckpoint(learner.folder / TRAINING_STATE, learner.keys[1], subject)
    bounded = replace(control, checkpoint=checkpoint)
    if how.patience and held_out:
        bounded = replace(bounded, patience=how.patience, held_out=bits)
    task = Task(config, (), how.epochs, BATCH_SIZE, rate, 0.0, 0.0, PARTS, PARTS)
    rng = np.random.default_rng(list(subject))
    tuned = trainer.train(start, training, task, epochs=how.epochs, rng=rng, control=bounded)
    candidates, old = {"global": start, "personal": tuned}, learner.adapter.manifest
    if old.parent and old.peft_config == config:
        candidates["in use"] = trainer.tensors_of(learner.adapter.inputs)
    found = {name: bits(adapter) for name, adapter in candidates.items()} if held_out else {}
    made = not found or found["personal"] <= min(found.values())
    used = learner.put_into_use(origin.manifest, (), trainer.inputs_of(tuned)) if made else old
    checkpoint.delete()
    seconds = time.perf_counter() - begun
    return LanguagePersonalized(used.name, used.version, made, seconds, len(training), len(held_out), found)
