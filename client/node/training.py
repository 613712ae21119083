"""Train for a plan: check what the coordinator asks for, and then contribute, whatever the examples are.

The order of the two keeps a refusal from saying anything about the examples.
"""

import logging
import math
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from adapters import evaluation, files, taskkinds
from adapters.analytic import AnalyticTask, ClassifierHead
from adapters.bundle import VerifiedBase
from adapters.evaluation import EvaluationTask
from adapters.layout import Layout, Tensors
from adapters.lorasb import unfolded
from adapters.parts import Part, part_of
from adapters.ridge import moments_of
from adapters.task import Task, shared_layout
from adapters.taskkinds import AnyTask
from aggregation.client import Planned
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, ProtocolError
from aggregation.messages import Plan
from aggregation.ring import Ring
from aggregation.session import COORDINATOR
from client.node.eligibility import EligibilityError
from client.node.privateparts import PrivateParts, check_unshared, ever_private
from client.node.snapshot import Draw, Snapshot
from client.training.contribute import (
    Outcome,
    contribution,
    moment_contribution,
    noisy_contribution,
    noisy_vector,
    require_bounds,
)
from client.training.control import TrainingControl
from client.training.engine import TrainerOf, classifier_trainer, trainer_of
from client.training.examples import Example, Score, Split, in_split, parse_examples
from client.training.limits import TrainingLimits
from client.training.moments import own_moments, own_projected_moments
from client.training.private import private_of, subject_of, with_private
from client.training.trainer import ClassifierTrainer, FrozenBase, LocalTrainer

log = logging.getLogger("edgeadapt.device")
Made = TypeVar("Made")


def train(
    base: FrozenBase,
    planned: Planned,
    blob: bytes,
    snapshot: Snapshot,
    path: Path,
    limits: TrainingLimits,
    kept: PrivateParts | None,
    choose: TrainerOf = trainer_of,
    step: Callable[[], object] = lambda: None,
) -> tuple[Ring, PrivateParts | None]:
    """Train the adapter in ``blob`` on the snapshot's examples, embed them with it for an analytic head, or count the
    right answers of the release in the device's bundle.

    Args:
        base: The frozen base, or that of a bundle with a training graph.
        planned: The session, in which the device accepted a plan.
        blob: The adapter's file.
        snapshot: Of the session.
        path: Of the examples, for messages.
        limits: Of the device.
        kept: Its private parts.
        choose: Gives what makes its updates.
        step: Called before each batch; ``EligibilityError`` from it ends the training.

    Returns:
        The contribution; and the private parts to keep, None if there are none. What fails once the examples matter
        counts as an update of zero, of examples that were answered wrongly: the weight is that of the examples all the
        same, so that no failure shows in another device's share of the sum.

    Raises:
        ProtocolError: What is on offer cannot or must not be trained. This is known before an example is read.
        EligibilityError: From ``step``.
    """
    plan, spec = planned.plan, planned.spec
    task, start = taskkinds.decode(plan.training), adapter_of(plan, blob)
    try:
        limits.check(task, start)
        config, labels = task.peft_config, len(task.labels)
        trainer = choose(base, labels, config)
    except (DataError, ConfigError) as error:  # adapter and task are the coordinator's, so it may receive the reason
        raise ProtocolError(f"adapter and task: {error}", COORDINATOR, about=error.about or "plan.training") from error
    if not Layout.of(start).digest == trainer.layout.digest == spec.layout_digest:
        raise ProtocolError("offer, task and adapter have different layouts", COORDINATOR, about="plan.layout")
    require_bounds(spec, trainer.layout, task)
    rounding = snapshot.generator(plan, Draw.ROUNDING)

    if isinstance(task, Task):
        check_unshared(kept, spec.base_digest, task)
    elif not task.labels:
        reason = "a language model has no analytic head, and gives no right answers"
        raise ProtocolError(reason, COORDINATOR, about="task.labels")

    def usable() -> tuple[Example, ...]:
        return _usable(parse_examples(snapshot.examples, path, None if task.labels else 0), task)

    examples = _or_else(usable, lambda: ())  # none in a file that cannot be read
    if isinstance(task, AnalyticTask):  # of all devices in one space of embeddings, so without private parts
        chosen = classifier_trainer(base, labels, config)
        return _sum_moments(chosen, start, task, planned, examples, rounding, snapshot), None
    if isinstance(task, EvaluationTask):
        return _sum_counts(base, task, planned, examples, rounding, snapshot), None
    return _sum_update(trainer, start, task, planned, examples, rounding, snapshot, kept, step, limits.control())


def adapter_of(plan: Plan, blob: bytes) -> Tensors:
    """The adapter of a plan, from its file.

    Raises:
        ProtocolError: The file is not the plan's, or damaged.
    """
    if files.sha256(blob) != plan.adapter_digest:
        reason = "the adapter in the message does not match the digest in the plan"
        raise ProtocolError(reason, COORDINATOR, about="plan.adapter_digest")
    try:
        return files.decode(blob)
    except DataError as error:
        raise ProtocolError(f"adapter: {error}", COORDINATOR, about=error.about) from error


def _sum_update(
    trainer: LocalTrainer,
    start: Tensors,
    task: Task,
    planned: Planned,
    examples: Sequence[Example],
    rounding: np.random.Generator,
    snapshot: Snapshot,
    kept: PrivateParts | None,
    step: Callable[[], object],
    control: TrainingControl,
) -> tuple[Ring, PrivateParts | None]:
    """The update of the adapter, which is trained from the device's private parts, and these parts after it."""
    plan, spec, shared = planned.plan, planned.spec, shared_layout(trainer.layout, task)
    subject, digest = subject_of(spec.base_digest, task, trainer.layout), plan.digest()
    adapter = bytes.fromhex(plan.adapter_digest)
    start = with_private(start, kept.start(subject, digest) if kept else None, task)
    begun = unfolded(start) if Part.R in task.shared else start

    def encoded(outcome: Outcome) -> Ring:
        if spec.privacy is None:
            return contribution(outcome, shared, spec, adapter, rounding)
        return noisy_contribution(outcome, shared, spec, adapter, rounding, snapshot.key(plan, Draw.NOISE))

    def after(trained: Tensors) -> PrivateParts | None:
        if not (own := private_of(start, task)):
            return None
        ever = ever_private(kept, spec.base_digest, map(part_of, own))
        return PrivateParts(subject, digest, files.encode(own), files.encode(private_of(trained, task)), ever)

    def trained() -> tuple[Ring, PrivateParts | None]:
        order, cap = snapshot.generator(plan, Draw.ORDER), spec.weight_cap
        outcome = _outcome(trainer, start, task, examples, cap=cap, rng=order, step=step, control=control)
        return encoded(replace(outcome, start=begun)), after(outcome.trained)

    def untrained() -> tuple[Ring, PrivateParts | None]:
        own, held_out = _counted(examples, spec.weight_cap)
        return encoded(Outcome.untrained(begun, len(own), len(held_out))), after(start)

    return _or_else(trained, untrained)


def _sum_moments(
    trainer: ClassifierTrainer,
    adapter: Tensors,
    task: AnalyticTask,
    planned: Planned,
    examples: Sequence[Example],
    rounding: np.random.Generator,
    snapshot: Snapshot,
) -> Ring:
    """The moments of the examples; without noise also the score of the adapter on at most ``weight_cap`` others."""
    plan, spec = planned.plan, planned.spec
    digest = bytes.fromhex(plan.adapter_digest)

    def hidden() -> Ring:
        vector = own_projected_moments(trainer, adapter, examples, task, digest)
        return noisy_vector(vector, spec, digest, rounding, snapshot.key(plan, Draw.NOISE))

    def noise() -> Ring:
        zeros = np.zeros(spec.vector.size)
        return noisy_vector(zeros, spec, digest, rounding, snapshot.key(plan, Draw.NOISE))

    own, held_out = _counted(examples, spec.weight_cap)

    def embedded() -> Ring:
        begin = time.perf_counter()
        found, score = own_moments(trainer, adapter, examples), _score(trainer, adapter, held_out)
        log.info("embedded %d examples", found.weight, extra={"training_seconds": time.perf_counter() - begin})
        return moment_contribution(found, score, spec, rounding)

    def nothing() -> Ring:
        head, labels = ClassifierHead.of(trainer.layout), np.array([example.label for example in own], np.int64)
        none = moments_of(np.zeros((len(own), head.hidden)), labels, head.labels)
        return moment_contribution(none, Score.worst(len(held_out)), spec, rounding)

    return _or_else(embedded, nothing) if spec.privacy is None else _or_else(hidden, noise)


def _sum_counts(
    base: FrozenBase,
    task: EvaluationTask,
    planned: Planned,
    examples: Sequence[Example],
    rounding: np.random.Generator,
    snapshot: Snapshot,
) -> Ring:
    """Right answers and examples of the release that this device has, if it is one of the task's."""
    plan, spec = planned.plan, planned.spec

    def encoded(counts: NDArray[np.float64]) -> Ring:
        adapter, key = bytes.fromhex(plan.adapter_digest), snapshot.key(plan, Draw.NOISE)
        return noisy_vector(counts, spec, adapter, rounding, key)

    def counted() -> Ring:
        held_out = in_split(examples, Split.VALIDATION)[: task.most]
        if not isinstance(base, VerifiedBase):
            return nothing()
        from client.training.evaluate import own_counts  # ONNX Runtime: only some devices train with it

        return encoded(own_counts(base.folder.parent, task, held_out))

    def nothing() -> Ring:
        return encoded(np.zeros(evaluation.SIZE))

    return _or_else(counted, nothing)


def _or_else(attempt: Callable[[], Made], otherwise: Callable[[], Made]) -> Made:
    """What ``attempt`` makes of the examples; what ``otherwise`` makes, if anything fails."""
    try:
        return attempt()
    except (KeyboardInterrupt, SystemExit, EligibilityError):
        raise
    except BaseException as error:  # the tokenizer is in Rust, whose panics are no Exception
        about = error.about if isinstance(error, EdgeAdaptError) else type(error).__name__
        log.warning("contributed nothing: %s", _unquoted(error), extra={"about": about})
        return otherwise()


def _usable(examples: Sequence[Example], task: AnyTask) -> tuple[Example, ...]:
    """The examples whose labels the task has."""
    usable = tuple(example for example in examples if example.label < len(task.labels))
    if len(usable) < len(examples):
        log.warning("%d examples have a label that the task lacks", len(examples) - len(usable))
    return usable


def _counted(examples: Sequence[Example], cap: int) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The examples to train on, and at most ``cap`` of those that are held out."""
    return in_split(examples, Split.TRAIN), in_split(examples, Split.VALIDATION)[:cap]


def _score(trainer: LocalTrainer, adapter: Tensors, held_out: Sequence[Example]) -> Score:
    """The score of an adapter; where a loss is not a number, the worst."""
    found = trainer.score(adapter, held_out)
    return found if math.isfinite(found.loss) else Score.worst(found.count)


def _outcome(
    trainer: LocalTrainer,
    start: Tensors,
    task: Task,
    examples: Sequence[Example],
    *,
    cap: int,
    rng: np.random.Generator,
    step: Callable[[], object],
    control: TrainingControl,
) -> Outcome:
    """Score ``start`` on at most ``cap`` held-out examples, and train it on the others."""
    own, held_out = _counted(examples, cap)
    begin = time.perf_counter()
    score = _or_else(lambda: _score(trainer, start, held_out), lambda: Score.worst(len(held_out)))

    def trained() -> Tensors:
        return trainer.train(start, own, task, epochs=task.epochs, rng=rng, step=step, control=control)

    after = _or_else(trained, lambda: start) if own else start
    log.info("trained on %d examples", len(own), extra={"training_seconds": time.perf_counter() - begin})
    return Outcome(start, after, len(own), score)


def _unquoted(error: BaseException) -> str:
    """What failed, without the text of a library's exception, which may quote an example."""
    if isinstance(error, EdgeAdaptError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.name}, line {place.lineno} of {place.filename}"
