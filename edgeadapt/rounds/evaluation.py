"""A round of federated evaluation: how good two releases are on the held-out examples of the devices, as one sum.

Devices train nothing. Each contributes four counts: its right answers and examples under the newest release, and under
the previous one; those of the release that it does not have are zero. So the sums say how good either release is, and
not which device has which.

A device with a language model contributes the logarithm of its release's nats per byte over those of the adapter on
offer, on the same texts. What makes one device's texts harder than another's is in both, and so hides no difference.

No device can know how many devices have a release, and exact sums could be those of one. So every evaluation has noise,
also where training has none (``docs/decisions/0066-secure-evaluation.md``). Only ``evaluated``'s metrics are published
of the sums. The adapter stays what it was, up to a noise that only gives it other bytes (``renewed``)."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from aggregation import rotation
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.ring import Ring
from aggregation.spec import COUNTS, SessionSpec
from aggregation.vector import VectorSpec
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import Sha256
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.release import NEWEST, PREVIOUS
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.analytic import LARGEST, ClassifierHead
from edgeadapt.rounds.roundtask import DeviceRound, KindSettings, RoundOf, RoundTask, ServerStep, SummedRound, noisy
from edgeadapt.rounds.sums import DECIMALS, MINIMUM_HELD_OUT, Bounds, Sums, Vector, dither

SIZE = 4  # right answers and examples of the newest release, then of the previous one
TEXT_SIZE = 5  # devices and relative nats per byte of the newest release, then of the previous one; squares of both
NORM = math.sqrt(3.0)  # of a device's three numbers, of which each is 1 at most; they are scaled to the clip norm
SPREAD = 0.15  # natural logarithm: a device's nats per byte count as at most 16 % from the adapter on offer's
LEAST_LOSS = 2.0**-20  # nats per byte; less counts as so much
LEAST_DEVICES = 10  # of a release whose figures are published, and three deviations of the noise in their number
RENEWAL = 2.0**-16  # width of the noise in the head's weights, whose logits are about 1 to 16
ACCURACY, EXAMPLES, DEVIATION = "accuracy", "examples", "deviation"  # metrics, the first two of each release
RELATIVE, DEVICES, SQUARE = "relative_nats", "devices", "relative_square"  # of a language model; the first two of each

Most = Annotated[int, Field(ge=1, le=2**16)]


class CountingTask(RoundTask):
    """A kind of round that counts and trains nothing: its sum always has noise, and the adapter is ``renewed``."""

    __slots__ = ()
    EXACT_SEGMENT: ClassVar[str | None] = None
    EXACT: ClassVar[str | None] = None
    NO_NOISE: ClassVar[str]  # what is said where a sum has none

    def exact_vector(self, layout: Layout, bounds: Bounds) -> VectorSpec:
        raise ConfigError(self.NO_NOISE, about="noise")

    def exact_ring_bits(self, layout: Layout, bounds: Bounds) -> int:
        raise ConfigError(self.NO_NOISE, about="noise")

    @classmethod
    def check_exact(cls, spec: SessionSpec, values: Sums, survivors: int) -> None:
        raise DataError(cls.NO_NOISE, about=f"vector.{cls.SEGMENT}")

    def next_adapter(self, summed: SummedRound, step: ServerStep) -> tuple[optimizer.State, Tensors]:
        return step.state, renewed(summed.tensors, summed.digest)


@dataclass(frozen=True, slots=True)
class EvaluationTask(CountingTask):
    RULE: ClassVar[optimizer.ServerOptimizer | None] = optimizer.Evaluation()
    SEGMENT: ClassVar[str] = COUNTS
    NEEDS_LABELS: ClassVar[bool] = False
    NO_NOISE: ClassVar[str] = "right answers are not summed without noise: set evaluation.noise_multiplier"
    NEED_NO_LIMIT: ClassVar[dict[str, str]] = {"most": "1 to 65536: a device counts its first examples up to it"}

    peft_config: PeftConfig
    labels: tuple[str, ...]
    newest: Sha256  # ``AdapterManifest.content`` of the adapter in the newest release
    previous: Sha256  # the same in the previous release
    most: Most  # most held-out examples of a device that count: its first ones

    def check(self) -> None:
        RoundTask.check(self)
        if self.newest == self.previous:
            raise ProtocolError("the task compares a release with itself", about="task.newest")

    def terms(self) -> dict[str, float | str]:
        return {f"evaluation.{name}": getattr(self, name) for name in ("newest", "previous", "most")}

    def noisy_size(self, layout: Layout) -> int:
        return SIZE if self.labels else TEXT_SIZE

    def contribute(self, device: DeviceRound) -> Ring:
        scale = 1.0 if self.labels else device.spec.clip_norm / NORM
        nothing = np.zeros(self.noisy_size(device.layout))
        return noisy(device, lambda: scale * device.compared(self), lambda: nothing)

    def metrics(self, spec: SessionSpec, values: Sums, survivors: int, digest: bytes) -> dict[str, float]:
        return evaluated(spec, values, survivors, digest)


class EvaluationRounds(KindSettings):
    """Rounds that count the right answers of two releases on the devices that have them, after all others."""

    KIND: ClassVar[type[RoundTask]] = EvaluationTask

    rounds: int = Field(default=0, ge=0)
    """how many of the rounds, the last ones, evaluate and do not train"""
    newest: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """SHA-256 of what the adapter of the newest release is"""
    previous: str = Field(default="", pattern="^([0-9a-f]{64})?$")
    """SHA-256 of what the adapter of the release before is"""
    most: Most = 32
    """most held-out examples of a device that count; the noise of right answers is in proportion to it"""
    noise_multiplier: float = Field(default=1.1, gt=0, le=1000)
    """standard deviation of the noise in the counts, as privacy.noise_multiplier, also in a federation without noise;
    in one that has more, that"""
    every: float = Field(default=0.0, ge=0, le=8760)
    """hours after which a rollout is evaluated, and evaluated again, on top of rounds, until it is decided; the run
    then has no end; 0: by hand"""
    releases: str = ""
    """with every: the repository of channels, relative to the state directory"""
    channel: str = ""
    """with every: the channel with the rollouts of an adapter 'global'"""

    @model_validator(mode="after")
    def _compares_two_releases(self) -> Self:
        if self.rounds and (not self.newest or not self.previous or self.newest == self.previous):
            raise ValueError("evaluation.newest and evaluation.previous must name the adapters of two releases")
        if self.every and (self.rounds or not self.releases or not self.channel):
            raise ValueError("evaluation.every needs evaluation.releases and .channel, and evaluation.rounds = 0")
        return self

    def task(self, of: RoundOf) -> EvaluationTask:
        return EvaluationTask(of.peft_config, of.labels, self.newest, self.previous, self.most)

    def bound(self, clip_norm: float, noisy: bool) -> float:
        return math.sqrt(2.0) * self.most

    def multiplier(self, federation: float) -> float:
        return max(federation, self.noise_multiplier)


def evaluated(spec: SessionSpec, sums: Sums, survivors: int, digest: bytes) -> dict[str, float]:
    """Return the metrics of a round, as they are published.

    ``sums`` are decoded, of all survivors; ``digest``, the SHA-256 of the adapter's file, seeds the rotation of the
    sums.

    Returns:
        ``accuracy_newest``, ``examples_newest``, ``accuracy_previous`` and ``examples_previous``, and ``deviation``:
        the standard deviation of the noise in each of the four sums, in examples. A release with fewer than
        ``MINIMUM_HELD_OUT`` examples is missing. Of a language model, ``RELATIVE`` is the mean of ``relative``,
        ``SQUARE`` that of its square over the devices of both, and the deviation is in devices.
    """
    counts = rotation.rotate_back(sums[COUNTS], rotation.seed(digest))
    table = {DEVIATION: spec.vector.segment(COUNTS).noise * math.sqrt(survivors)}
    if texts := counts.size == TEXT_SIZE:
        counts, table = counts * NORM / spec.clip_norm, {DEVIATION: table[DEVIATION] * NORM / spec.clip_norm}
    least = max(LEAST_DEVICES, 3 * table[DEVIATION]) if texts else MINIMUM_HELD_OUT
    for release, (right, examples) in ((NEWEST, counts[:2]), (PREVIOUS, counts[2:4])):
        if examples < least:
            continue
        mean = min(max(float(right / examples), -1.0 if texts else 0.0), 1.0)
        if texts:
            table |= {f"{RELATIVE}_{release}": mean, f"{DEVICES}_{release}": float(examples)}
        else:
            table |= {f"{ACCURACY}_{release}": round(mean, DECIMALS), f"{EXAMPLES}_{release}": float(np.rint(examples))}
    if texts and len(table) == TEXT_SIZE:
        table[SQUARE] = min(max(float(counts[4] / (counts[1] + counts[3])), 0.0), 1.0)
    return table


def relative(newest: bool, release: float, reference: float) -> Vector:
    """Return what a device with a language model contributes, shape ``(TEXT_SIZE,)``: the logarithm of ``release`` over
    ``reference``, from -1 to 1 in units of ``SPREAD``, and a one at the places of its release, and the square. Both are
    a mean of nats per byte over the same texts."""
    ratio = math.log(max(release, LEAST_LOSS) / max(reference, LEAST_LOSS))
    place = min(max(ratio / SPREAD, -1.0), 1.0)
    return np.array([*([place, 1.0, 0.0, 0.0] if newest else [0.0, 0.0, place, 1.0]), place**2])


def is_evaluation(metrics: Mapping[str, float]) -> bool:
    return DEVIATION in metrics


def renewed(tensors: Tensors, digest: bytes) -> Tensors:
    """Return the next adapter: the previous one, with noise of ``RENEWAL`` in its head or, without one, a last tensor.

    Devices reveal shares for sums from one adapter over one set of survivors only, so each sum has an adapter of its
    own. The noise follows from the adapter alone (``digest``, the SHA-256 of its file): noise that followed from the
    sums would let anybody find four small numbers by trial.

    Returns:
        float32 tensors. Guarantee: equal arguments give equal bits on every machine; no weight exceeds ``LARGEST``.
    """
    name = max(tensors)
    with suppress(DataError):  # a language model's
        name = ClassifierHead.of(Layout.of(tensors)).weight
    before = tensors[name]
    key = hashlib.sha256(b"edgeadapt/evaluation/1\x00" + digest).digest()
    noise = dither(key, before.size).reshape(before.shape)
    weight = np.clip(before.astype(np.float64) + RENEWAL * noise, -LARGEST, LARGEST)
    return tensors | {name: weight.astype(np.float32)}
