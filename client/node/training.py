"""Contribute to a round: check what the coordinator asks for, and then contribute, whatever the examples are. The order
of the two keeps a refusal from saying anything about the examples. What is contributed, the kind of round says
(``edgeadapt.rounds.roundtask``)."""

import logging
import math
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from aggregation.client import Planned
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, ProtocolError
from aggregation.messages import Plan
from aggregation.ring import Ring
from aggregation.session import COORDINATOR, refused
from aggregation.spec import SessionSpec
from client.inference.usage import Usage
from client.node.eligibility import EligibilityError
from client.node.keptstates import StatesFile
from client.node.policy import TrainingLimits
from client.node.privateparts import PrivateParts, check_unshared, ever_private
from client.node.snapshot import Draw, Snapshot
from client.training.engine import TrainerOf, classifier_trainer, trainer_of
from client.training.examples import Example, Score, Split, TargetOf, in_split, parse_examples
from client.training.personal import embedded
from client.training.private import private_of, subject_of, with_private
from client.training.trainer import ClassifierTrainer, FrozenBase, Trainer
from edgeadapt.bases.tasks import OwnTask
from edgeadapt.formats import files
from edgeadapt.formats.bundle import VerifiedBase
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods.parts import part_of
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.roundtask import Outcome, RoundTask
from edgeadapt.rounds.sums import Bounds, Vector
from edgeadapt.rounds.task import Task

log = logging.getLogger("edgeadapt.device")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TrainingDevice:
    """What a device trains with. ``step``: called before each batch; ``EligibilityError`` from it ends the training."""

    base: FrozenBase  # a plain one, or that of a bundle with a training graph
    examples: Path  # for messages
    limits: TrainingLimits
    kept: PrivateParts | None = None  # the private parts
    states: StatesFile | None = None  # where states of its texts are kept
    choose: TrainerOf = trainer_of
    step: Callable[[], object] = lambda: None


def contribute(
    device: TrainingDevice, planned: Planned, task: RoundTask, blob: bytes, snapshot: Snapshot
) -> tuple[Ring, PrivateParts | None]:
    """Contribute to a round of a session in which the device accepted a plan.

    Returns:
        The contribution; and the private parts to keep, None if there are none. What fails once the examples matter
        counts as an update of zero, of examples that were answered wrongly: the weight is that of the examples all the
        same, so that no failure shows in another device's share of the sum.

    Raises ProtocolError: what is on offer cannot or must not be trained. This is known before an example is read.
    EligibilityError: From ``device.step``."""
    plan, spec = planned.plan, planned.spec
    start = adapter_of(plan, blob)
    try:
        device.limits.check(task, start)
        target = _target_of(device.base, task)
        trainer = device.choose(device.base, len(task.labels), task.peft_config)
    except (DataError, ConfigError) as error:  # adapter and task are the coordinator's, so it may receive the reason
        raise refused(f"adapter and task: {error}", error.about or "plan.training") from error
    if not Layout.of(start).digest == trainer.layout.digest == spec.layout_digest:
        raise refused("offer, task and adapter have different layouts", "plan.layout")
    check_bounds(spec, trainer.layout, task)
    check_unshared(device.kept, spec.base_digest, task)

    def usable() -> tuple[Example, ...]:
        return _usable(
            parse_examples(snapshot.examples, device.examples, None if task.labels else 0, target), task, target
        )

    examples = _or_else(usable, lambda: ())  # none in a file that cannot be read
    local = LocalRound(device, planned, task, start, trainer, examples, snapshot)
    file, cache = device.states, trainer.engine.states
    if file is None or cache is None:
        return task.contribute(local), local.parts
    file.load(cache)
    vector = task.contribute(local)
    file.save(cache)
    return vector, local.parts


def _target_of(base: FrozenBase, task: RoundTask) -> TargetOf | None:
    """Return what makes targets of labels in the base's task; None in classification and of a language model. Raises
    ConfigError: a task of others does not have this kind of round, which counts labels."""
    if isinstance(base, VerifiedBase) or not isinstance(base.task, OwnTask) or not task.labels:
        return None
    if task.NEEDS_LABELS:
        reason = f"a round that counts labels is of classification, and this device learns {base.task.name!r}"
        raise ConfigError(f"{reason}: set federation.analytic.rounds=0", about="task.labels")
    return partial(base.task.target, outputs=task.labels)


def adapter_of(plan: Plan, blob: bytes) -> Tensors:
    """Read the adapter of a plan from its file. Raises ProtocolError: the file is not the plan's, or damaged."""
    if files.sha256(blob) != plan.adapter_digest:
        raise refused("the adapter in the message does not match the digest in the plan", "plan.adapter_digest")
    try:
        return files.decode(blob)
    except DataError as error:
        raise refused(f"adapter: {error}", error.about) from error


def check_bounds(spec: SessionSpec, layout: Layout, task: RoundTask) -> None:
    """Check that the bounds in the offer admit every contribution that a device can make.

    A tighter bound would tell devices apart by whether they can answer: those that cannot have more examples, or a
    greater loss, than a number that the coordinator chose. Raises ProtocolError: the vector in the offer is not that of
    this task, layout, clip norm and weight cap, or the adapter lacks what the task asks for."""
    try:
        fair = task.vector(layout, Bounds.of(spec))
    except DataError as error:  # the adapter and the task are the coordinator's
        raise ProtocolError.of(error, COORDINATOR) from None
    except ConfigError as error:
        raise refused(f"the vector in the offer: {error}", "offer.spec.vector") from None
    if spec.vector != fair:
        reason = "the bounds of the vector in the offer do not follow from its clip norm and weight cap"
        raise refused(reason, "offer.spec.vector")


class LocalRound:
    """A round on a device (``edgeadapt.rounds.roundtask.DeviceRound``). ``parts``: the private parts to keep."""

    def __init__(
        self,
        device: TrainingDevice,
        planned: Planned,
        task: RoundTask,
        start: Tensors,
        trainer: Trainer,
        examples: tuple[Example, ...],
        snapshot: Snapshot,
    ) -> None:
        self.device, self.plan, self.task, self.start, self.trainer = device, planned.plan, task, start, trainer
        self.spec, self.layout, self.snapshot = planned.spec, trainer.layout, snapshot
        self.digest = bytes.fromhex(self.plan.adapter_digest)
        self.rounding = snapshot.generator(self.plan, Draw.ROUNDING)
        self.own = in_split(examples, Split.TRAIN)
        self.held_out = in_split(examples, Split.VALIDATION)
        self.parts: PrivateParts | None = None

    def noise_key(self) -> bytes:
        return self.snapshot.key(self.plan, Draw.NOISE)

    def attempt(self, contribution: Callable[[], T], otherwise: Callable[[], T]) -> T:
        return _or_else(contribution, otherwise)

    def updated(self, task: Task) -> Outcome:
        start, held_out, begin = self._begun(task), self._counted, time.perf_counter()
        score = _or_else(lambda: _score(self.trainer, start, held_out), self.unscored)
        order, control = self.snapshot.generator(self.plan, Draw.ORDER), self.device.limits.control(self.device.step)

        def trained() -> Tensors:
            return self.trainer.train(start, self.own, task, epochs=task.epochs, rng=order, control=control)

        after = _or_else(trained, lambda: start) if self.own else start
        log.info("trained on %d examples", len(self.own), extra={"training_seconds": time.perf_counter() - begin})
        self._keep(task, start, after)
        return Outcome(start, after, len(self.own), score)

    def unchanged(self, task: Task) -> Outcome:
        start = self._begun(task)
        self._keep(task, start, start)
        return Outcome(start, start, len(self.own), self.unscored())

    def embedded(self) -> NDArray[np.floating]:
        begin = time.perf_counter()
        embeddings = embedded(self._classifier, self.start, self.own)
        log.info("embedded %d examples", len(self.own), extra={"training_seconds": time.perf_counter() - begin})
        return embeddings

    def labels(self) -> NDArray[np.int64]:
        return np.array([example.label for example in self.own], np.int64)

    def scored(self) -> Score:
        return _score(self._classifier, self.start, self._counted)

    def unscored(self) -> Score:
        return Score.worst(len(self._counted))

    def compared(self, task: EvaluationTask) -> Vector:
        if not isinstance(self.device.base, VerifiedBase):
            return np.zeros(task.noisy_size(self.layout))
        from client.training.evaluate import own_counts  # ONNX Runtime: only some devices train with it

        return own_counts(self.device.base, task, self.held_out[: task.most], self.trainer, self.start)

    def used(self, since: int, days: int) -> Mapping[str, int]:
        return Usage(self.snapshot.usage).counts(since, days)

    @property
    def _counted(self) -> tuple[Example, ...]:
        return self.held_out[: self.spec.weight_cap]

    @cached_property
    def _classifier(self) -> ClassifierTrainer:
        """Embed with the adapter on offer alone: devices are in one space of embeddings, without private parts."""
        return classifier_trainer(self.device.base, len(self.task.labels), self.task.peft_config)

    def _begun(self, task: Task) -> Tensors:
        kept = self.device.kept
        own = kept.start(self._subject(task), self.plan.digest()) if kept else None
        return with_private(self.start, own, task)

    def _subject(self, task: Task) -> bytes:
        return subject_of(self.spec.base_digest, task, self.layout)

    def _keep(self, task: Task, start: Tensors, trained: Tensors) -> None:
        if own := private_of(start, task):
            ever = ever_private(self.device.kept, self.spec.base_digest, map(part_of, own))
            before, after = files.encode(own), files.encode(private_of(trained, task))
            self.parts = PrivateParts(self._subject(task), self.plan.digest(), before, after, ever)


def _or_else(attempt: Callable[[], T], otherwise: Callable[[], T]) -> T:
    """Return what ``attempt`` makes of the examples; what ``otherwise`` makes, if anything fails."""
    try:
        return attempt()
    except (KeyboardInterrupt, SystemExit, EligibilityError):
        raise
    except BaseException as error:  # a panic of the tokenizer, in Rust, is not an Exception
        about = error.about if isinstance(error, EdgeAdaptError) else type(error).__name__
        log.warning("contributed nothing: %s", _unquoted(error), extra={"about": about})
        return otherwise()


def _usable(examples: Sequence[Example], task: RoundTask, target: TargetOf | None) -> tuple[Example, ...]:
    """Keep the examples whose labels the task has, or can read."""
    usable = tuple(one for one in examples if (one.target if target else one.label < len(task.labels)))
    if len(usable) < len(examples):
        log.warning("%d examples have a label that the task lacks", len(examples) - len(usable))
    return usable


def _score(trainer: Trainer, adapter: Tensors, held_out: Sequence[Example]) -> Score:
    """Score an adapter; where a loss is not a number, the worst."""
    score = trainer.score(adapter, held_out)
    return score if math.isfinite(score.loss) else Score.worst(score.count)


def _unquoted(error: BaseException) -> str:
    """Say what failed, without the text of a library's exception, which may quote an example."""
    if isinstance(error, EdgeAdaptError):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {place.name}, line {place.lineno} of {place.filename}"
