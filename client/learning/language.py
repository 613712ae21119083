"""The personal step of a language model: its private adapter is made of a device's texts, and put into use."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from adapters.layout import Tensors
from adapters.parts import PARTS
from adapters.task import Task
from aggregation.errors import ConfigError
from client.learning.learner import BATCH_SIZE, TRAINING_STATE, Learner, stated_config, step_digest
from client.training.control import UNLIMITED, TrainingCheckpoint, TrainingControl
from client.training.examples import Split, in_split, read_examples
from client.training.languagegraph import LanguageGraphTrainer
from client.training.personal import PersonalMethod, PersonalStep


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


def personalize_language_model(
    learner: Learner, examples: Path, how: PersonalStep, learning_rate: float, control: TrainingControl = UNLIMITED
) -> LanguagePersonalized:
    """The personal step of a language model: the global adapter, fine-tuned on the device's texts, is put into use.

    It is not, if the global adapter, or the one in use, predicts the held-out examples better.

    Args:
        learner: Opened for any task.
        examples: The device's examples file.
        how: The step, whose method is fine-tuning.
        learning_rate, control: As of ``Learner.personalize``.

    Raises:
        DataError, ConfigError, OSError: As ``Learner.personalize``.
    """
    origin, begun = learner.global_adapter(), time.perf_counter()
    if how.method is not PersonalMethod.FINE_TUNE:
        raise ConfigError("a language model has no head to fit: leave out --method", about="--method")
    own = read_examples(examples, 0)
    training, held_out = in_split(own, Split.TRAIN), in_split(own, Split.VALIDATION)
    config = stated_config(origin.manifest)
    trainer = LanguageGraphTrainer(learner.library.base, config)
    start, subject = trainer.tensors_of(origin.inputs), step_digest(origin.manifest, learning_rate, how, own)

    def bits(adapter: Tensors) -> float:
        return trainer.score(adapter, held_out).loss / len(held_out) / math.log(2)

    checkpoint = TrainingCheckpoint(learner.folder / TRAINING_STATE, learner.keys[1], subject)
    bounded = replace(control, checkpoint=checkpoint)
    if how.patience and held_out:
        bounded = replace(bounded, patience=how.patience, held_out=bits)
    task = Task(config, (), how.epochs, BATCH_SIZE, learning_rate, 0.0, 0.0, PARTS, PARTS)
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
