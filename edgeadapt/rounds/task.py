"""A round of training: devices train the adapter, and the mean of their updates is the server's next step. The
coordinator signs the task as part of its plan, in which it is opaque to the protocol. The engine of a device trains
(``client/training``); ``coordinator/`` steps the mean, and an audit does so again."""

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from aggregation import rotation
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.ring import MAX_BITS, Ring
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec
from edgeadapt.bases.media import MAX_VARIANTS
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.lorasb import folded, unfolded, with_squares
from edgeadapt.methods.parts import Part, mask, only
from edgeadapt.rounds import roundtask
from edgeadapt.rounds.combination import combine, distances
from edgeadapt.rounds.optimizer import LARGEST, State, advance
from edgeadapt.rounds.sums import DECIMALS as DECIMALS
from edgeadapt.rounds.sums import (
    LEAST_RING_BITS,
    NORM_ERROR,
    UNIFORMS,
    Bounds,
    Sums,
    Vector,
    check_noisy,
    clip,
    counted,
    dither,
    metric_segments,
    noise_key,
    noisy_vector,
    require_exact,
    require_weight,
)
from edgeadapt.rounds.sums import MAX_LOSS as MAX_LOSS

RESOLUTION = 1 / 8  # norm of one step in every coordinate of the mean, in clip norms, at most
UNSTABLE = "the learning rate times the proximal weight and the weight decay together must be below 1"

Epochs = Annotated[int, Field(gt=0, le=100)]
BatchSize = Annotated[int, Field(gt=0, le=1024)]
LearningRate = Annotated[float, Field(gt=0, le=1)]
WeightDecay = Annotated[float, Field(ge=0, le=1)]
Proximal = Annotated[float, Field(ge=0, le=1000)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
GradientNorm = Annotated[float, Field(ge=0)]
Variants = Annotated[int, Field(ge=0, le=MAX_VARIANTS)]


class OptimizerName(StrEnum):
    """Chooses what makes a step of a gradient (``client.training.descent``)."""

    ADAMW = "adamw"
    SGD = "sgd"


class RateSchedule(StrEnum):
    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


def is_stable(learning_rate: float, proximal: float, weight_decay: float) -> bool:
    """Check whether the pull to an adapter's start and to zero shrinks its distance in a step of SGD. From 1 on a step
    overshoots, and from 2 on the distance grows: how far a device gets then shows its number of steps."""
    return learning_rate * (proximal + weight_decay) < 1


@dataclass(frozen=True, slots=True)
class Task(roundtask.RoundTask):
    SEGMENT: ClassVar[str] = "delta"
    EXACT_SEGMENT: ClassVar[str | None] = "delta"
    EXACT: ClassVar[str | None] = "updates"
    NEEDS_LABELS: ClassVar[bool] = False
    LATER: ClassVar[tuple[str, ...]] = ("variants",)
    NEED_NO_LIMIT: ClassVar[Mapping[str, str]] = {"variants": "a pass over each counts as one of `epochs`"}

    peft_config: PeftConfig
    labels: tuple[str, ...]
    epochs: Epochs
    batch_size: BatchSize
    learning_rate: LearningRate
    weight_decay: WeightDecay
    proximal: Proximal  # μ of FedProx, which adds μ/2 · ‖w - w₀‖² to the loss
    trained: tuple[Part, ...]  # parts of the adapter; the others stay as they are
    shared: tuple[Part, ...]  # parts whose updates are summed; those of ``trained`` that are not stay on the device
    optimizer: OptimizerName = OptimizerName.ADAMW
    momentum: Momentum = 0.0
    schedule: RateSchedule = RateSchedule.CONSTANT
    gradient_norm: GradientNorm = 0.0  # L2 norm to which a step's gradient is clipped; 0: never
    variants: Variants = 0  # of each picture or sound, which are trained as well (``edgeadapt.bases.media``)

    def check(self) -> None:
        """Check that training is stable, and that parts are trained and shared without contradiction. Raises
        ProtocolError: otherwise, or nothing is both trained and shared. R is both, without A and B, or neither; a
        frozen part is neither."""
        if not is_stable(self.learning_rate, self.proximal, self.weight_decay):
            raise ProtocolError(f"task.proximal: {UNSTABLE}", about="task.proximal")
        if not set(self.trained) & set(self.shared):
            raise ProtocolError("task.shared: no part of the adapter is both trained and shared", about="task.shared")
        if Part.FROZEN in {*self.trained, *self.shared}:
            raise ProtocolError("task: a frozen part is neither trained nor shared", about="task.parts")
        for parts in (self.trained, self.shared):
            if Part.R in {*self.trained, *self.shared} and (Part.R not in parts or {Part.A, Part.B} & {*parts}):
                raise ProtocolError("task: R is trained and shared without A and B, or not at all", about="task.parts")

    def numbers(self) -> dict[str, float]:
        return roundtask.RoundTask.numbers(self) | {"epochs": self.epochs * (1 + self.variants)}

    def terms(self) -> dict[str, float | str]:
        names = ("epochs", "batch_size", "optimizer", "learning_rate", "momentum", "schedule", "weight_decay")
        others = ("proximal", "gradient_norm", "variants")
        numbers = {f"training.{name}": getattr(self, name) for name in (*names, *others)}
        parts = {name: ", ".join(part.value for part in getattr(self, name)) for name in ("trained", "shared")}
        return numbers | {f"method, which has as {name}": value for name, value in parts.items()}

    @property
    def private(self) -> frozenset[Part]:
        return frozenset(self.trained) - frozenset(self.shared)

    @property
    def changes(self) -> frozenset[Part]:
        """Return the changed parts; R of Fed-SB is added to B."""
        return frozenset(Part.B if part is Part.R else part for part in self.shared)

    def influencing(self) -> frozenset[Part]:
        """Return all parts but the private ones, which each device replaces: A counts in a round of B."""
        return frozenset(Part) - self.private

    def least_movement(self, clip_norm: float, size: int, share: float) -> float:
        """Scale AdamW's longest step, or SGD's for gradients of norm 1 or ``gradient_norm``, to the clip norm. A step
        longer than ``LEAST_STEP`` raises what is demanded: an honest adapter then moves farther."""
        if self.optimizer is OptimizerName.ADAMW:
            step = self.learning_rate * math.sqrt(size)
        else:
            step = self.learning_rate * min(self.gradient_norm or 1.0, 1.0) / (1 - self.momentum)
        return share * max(min(clip_norm, step), roundtask.LEAST_STEP)

    def noisy_size(self, layout: Layout) -> int:
        return shared_layout(layout, self).size

    def exact_vector(self, layout: Layout, bounds: Bounds) -> VectorSpec:
        return contribution_spec(shared_layout(layout, self), bounds)

    def exact_ring_bits(self, layout: Layout, bounds: Bounds) -> int:
        return least_ring_bits(shared_layout(layout, self), bounds)

    @classmethod
    def check_exact(cls, spec: SessionSpec, values: Sums, survivors: int) -> None:
        require_reach(spec, values, survivors)

    def contribute(self, device: roundtask.DeviceRound) -> Ring:
        shared = shared_layout(device.layout, self)

        def encoded(outcome: roundtask.Outcome) -> Ring:
            if Part.R in self.shared:
                outcome = replace(outcome, start=unfolded(outcome.start))
            if device.spec.privacy is None:
                return contribution(outcome, shared, device.spec, device.digest, device.rounding)
            update = update_of(outcome, shared)
            return noisy_vector(update, device.spec, device.digest, device.rounding, device.noise_key())

        return device.attempt(lambda: encoded(device.updated(self)), lambda: encoded(device.unchanged(self)))

    def state_size(self, layout: Layout) -> int:
        return shared_layout(layout, self).size

    def next_adapter(self, summed: roundtask.SummedRound, step: roundtask.ServerStep) -> tuple[State, Tensors]:
        shared, means = self._means(summed)
        mean = means[0] if step.combination is None else combine(step.combination, means)
        begin = unfolded(summed.tensors) if Part.R in self.shared else summed.tensors
        state, after = advance(step.rule, step.state, begin, shared, mean)
        return state, folded(after, LARGEST)

    def distances(self, summed: roundtask.SummedRound, step: roundtask.ServerStep) -> tuple[float, ...]:
        if step.combination is None:
            return ()
        _, means = self._means(summed)
        return distances(means, combine(step.combination, means))

    def _means(self, summed: roundtask.SummedRound) -> tuple[Layout, list[Floats]]:
        spec, shared = summed.spec, shared_layout(Layout.of(summed.tensors), self)
        mean_of = weighted_mean if spec.privacy is None else noisy_mean
        digest, sums = summed.digest, summed.groups
        return shared, [mean_of(spec, self, shared, each.values, len(each.survivors), digest) for each in sums]


class Training(roundtask.KindSettings):
    """Training on a device, in one round."""

    KIND: ClassVar[type[roundtask.RoundTask]] = Task

    epochs: Epochs = 1
    """passes over the device's examples in a round"""
    batch_size: BatchSize = 16
    """examples in a step"""
    learning_rate: LearningRate = 2e-3
    """learning rate of the first step"""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """what makes a step of a gradient: adamw, or sgd"""
    momentum: Momentum = 0.0
    """momentum of sgd, 0 to 1; not used by adamw"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """how the learning rate falls to 0 over the steps of a device in a round: constant (it does not), linear or
    cosine"""
    weight_decay: WeightDecay = 0.0
    """weight decay: decoupled with adamw, in the gradient with sgd"""
    gradient_norm: GradientNorm = 0.0
    """largest L2 norm of a step's gradient, to which it is clipped; 0: any"""
    variants: Variants = 0
    """variants of each picture or sound that are trained as well, moved, lighter or with noise; a text has none"""
    proximal: Proximal = 0.0
    """weight of FedProx's term in the loss: half of it times the squared distance from the global adapter"""

    @model_validator(mode="after")
    def _is_stable(self) -> Self:
        if not is_stable(self.learning_rate, self.proximal, self.weight_decay):
            raise ValueError(f"training.proximal is {self.proximal:g}: {UNSTABLE}")
        return self

    def task(self, of: roundtask.RoundOf) -> Task:
        config, method = of.peft_config, of.method
        if method.splits_factors and (config.peft_type != "LORA" or config.use_dora or config.bias != "none"):
            kind = "DoRA" if config.use_dora else "LoRA with biases" if config.bias != "none" else config.peft_type
            reason = f"method {method.name} trains LoRA's matrices apart from each other, and the adapter is {kind}"
            raise ConfigError(f"{reason}: choose fedit, fedper, fedbabu or head", about="method")
        own = self.model_dump() | {"optimizer": OptimizerName(self.optimizer), "schedule": RateSchedule(self.schedule)}
        return Task(config, of.labels, trained=method.trained(of.version), shared=method.shared, **own)


def shared_layout(layout: Layout, task: Task) -> Layout:
    """Return the tensors whose updates are summed; in a round of Fed-SB, R of each LoRA layer is one of them. Raises
    DataError: the adapter has no part that is both trained and shared, or as ``with_squares``."""
    layout = with_squares(layout) if Part.R in task.shared else layout
    only(layout, set(task.trained) & set(task.shared))
    return only(layout, task.shared)


def contribution_spec(layout: Layout, bounds: Bounds) -> VectorSpec:
    """Return the sums of one round: the weighted delta, the weights and the metrics, each with its own bound.

    A device's weight is its number of examples, at most ``weight_cap``. ``delta`` is the clipped delta times the
    weight, rotated, so that a coordinate is within ``rotation.peak`` of its norm, ``clip_norm * weight_cap``.
    ``correct``, ``loss`` and ``held_out`` are of the received adapter with the device's private parts, on held-out
    examples before training. ``layout`` is that of the shared tensors. Raises ConfigError: the ring cannot hold the sum
    of all devices, or cannot count their examples one by one."""
    cap = bounds.weight_cap
    delta = Segment("delta", layout.size, bounds.clip_norm * cap * rotation.peak(layout.size))
    return require_exact(VectorSpec((delta, *metric_segments(cap)), bounds.ring_bits, bounds.max_clients), cap)


def least_ring_bits(layout: Layout, bounds: Bounds) -> int:
    """Return the least ring for ``contribution_spec``, from ``LEAST_RING_BITS`` on, with a fine enough step. It counts
    examples one by one, and s · √d / n is at most ``RESOLUTION`` times the clip norm, with the step s, d coordinates
    and n devices: ``weighted_mean`` adds noise of about this norm. Raises ConfigError: no ring can."""
    clients = bounds.max_clients
    for bits in range(LEAST_RING_BITS, MAX_BITS):
        with suppress(ConfigError):
            spec = contribution_spec(layout, replace(bounds, ring_bits=bits))
            if spec.step(spec.segment("delta")) * math.sqrt(layout.size) / clients <= RESOLUTION * bounds.clip_norm:
                return bits
    text = f"no ring can hold the sum of {clients} updates of {bounds.weight_cap} examples with the clip norm "
    raise ConfigError(f"{text}{bounds.clip_norm}", about="clip_norm")


def contribution(
    outcome: roundtask.Outcome, layout: Layout, spec: SessionSpec, adapter: bytes, rng: np.random.Generator
) -> Ring:
    """Encode the outcome of a round as the vector that is masked and summed.

    Returns:
        Ring elements, shape ``(spec.vector.size,)``. Decoded with the segments of ``spec.vector``, in weight units:
        ``delta`` is ``clip(trained - start, clip_norm) * weight``, rotated; ``weight`` is the number of examples, at
        most ``spec.weight_cap``; ``correct``, ``loss`` and ``held_out`` are the score of ``start``. Guarantee: each
        value is off by less than one step of its segment, without bias; a coordinate of ``delta`` by less than 1.5
        steps with a variance of a quarter of a squared step (``rounding_noise``), or more if it is beyond its
        bound, with a probability of at most 2^-40 for all coordinates (``rotation.peak``).

    ``outcome``: finite tensors, those of ``layout`` and maybe others, which stay on the device. ``adapter``: SHA-256 of
    the adapter's file; the seed of the rotation follows from it. Raises DataError: a tensor has another layout, NaN or
    infinity, or a metric is outside its bound."""
    weight, segment = min(outcome.examples, spec.weight_cap), spec.vector.segment("delta")
    delta = clip(update_of(outcome, layout), spec.clip_norm) * weight
    rotated = rotation.rotate(delta, rotation.seed(adapter))
    rotated += rounding_noise(spec.vector.step(segment), delta.size, rng)
    values = {"delta": np.clip(rotated, -segment.bound, segment.bound)}
    return spec.vector.encode(values | counted(weight, outcome.held_out), rng)


def update_of(outcome: roundtask.Outcome, layout: Layout) -> Vector:
    """Return what training changed of the shared tensors, before it is clipped. Raises as ``Layout.check``."""
    trained, start = (layout.flatten(layout.select(tensors)) for tensors in (outcome.trained, outcome.start))
    return trained.astype(np.float64) - start


def require_reach(spec: SessionSpec, sums: Sums, survivors: int) -> None:
    """Check that honest survivors can have the sum of a round: else some device lied.

    With W the total weight, n survivors, and s the step of the d coordinates of ``delta``:

    - W is a whole number between 0 and ``weight_cap * n``. Weights are examples, counted without error.
    - ‖Σ delta‖ ≤ ``clip_norm`` · W + ``rounding_norm``. Each delta has at most the norm ``clip_norm`` before it is
      weighted, and the rotation keeps norms.

    Guarantee: a sum of honest contributions is refused with a probability of at most 2^-40. The mean of a sum that
    passes has at most the norm ``clip_norm`` + ``rounding_norm`` / W, or 0 if W = 0; ``weighted_mean`` adds its noise.

    Raises DataError: honest survivors cannot have it. The text names no number of the sum, because it is published."""
    if not {"delta", "weight"} <= {segment.name for segment in spec.vector.segments}:
        raise DataError("the sum does not consist of an update and its examples", about="vector.segments")
    weight, rounding = require_weight(spec, sums, survivors), rounding_norm(spec, survivors)
    if not float(np.linalg.norm(sums["delta"])) <= (spec.clip_norm * weight + rounding) * (1 + NORM_ERROR):
        text = f"the sum of the updates is longer than the clip norm {spec.clip_norm:g} allows for its examples"
        raise DataError(text, about="vector.delta")


def rounding_norm(spec: SessionSpec, survivors: int) -> float:
    """Bound the norm of the rounding errors in the sum of ``survivors`` updates, in weight units.

    An error of one device and coordinate is below 1.5 steps, has a mean of 0 and a variance of s² / 4
    (``rounding_noise``), and is independent of the others. So the norm E of their sum has E‖E‖² = n · d · s² / 4. It is
    a convex function of the errors that changes by at most √n times their distance, so ‖E‖ exceeds its mean by
    3 s √n · √(80 ln 2) with a probability of at most 2^-40 (Boucheron, Lugosi and Massart 2013, "Concentration
    Inequalities", theorem 6.10). It never exceeds 1.5 · n · s · √d."""
    delta = spec.vector.segment("delta")
    step, root = spec.vector.step(delta), math.sqrt(delta.size)
    likely = math.sqrt(survivors) * (root / 2 + 3 * math.sqrt(2 * math.log(2) * rotation.EXCESS_BITS))
    return step * min(likely, 1.5 * survivors * root)


def rounding_noise(step: float, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw what a device adds to its rotated update before rounding: uniform over half a step to either side.

    Stochastic rounding alone has no bias, but a variance between 0 and s² / 4 that depends on the number. With this
    noise it is s² / 4 for every number, also for 0: the two are the triangular dither of Wannamaker et al. 2000, "A
    Theory of Nonsubtractive Dither", section IV. So rounding errors show neither how many devices have examples nor how
    long their updates are."""
    return step * (rng.random(size) - 0.5)


def weighted_mean(
    spec: SessionSpec, task: Task, layout: Layout, sums: Sums, survivors: int, adapter: bytes
) -> NDArray[np.float32]:
    """Return the mean of the survivors' deltas, weighted by examples; zero in the parts that the task does not train.

    The mean is published, as the difference of two adapters. Without noise it can have a period, of which the total
    weight W is a factor:

    - s / W, where s is the step of ``delta``: the coordinates of the rotated sum are multiples of s, and anybody can
      rotate the mean.
    - 2 · lr · g / W, where every device trained one step: the first step of AdamW is ±lr in each coordinate, so that
      the sum differs by 2 · lr times multiples of g, the greatest common divisor of the weights. Clipping makes this
      period shorter. A step of SGD is in proportion to the gradient, and has no such period.

    The noise (``_width`` times ``dither``) is added to the sum. A rotation of it has the same variance and is nearer to
    a normal distribution, so what ``dither`` says of periods is true of both. With the rounding errors of n survivors,
    which the rotation spreads over all coordinates, its standard deviation in the mean is 0.8 / n times the larger of s
    and 2 · lr. If all survivors have κ examples (``_width``), the width of the noise is at least any such period,
    because W / n is at least g and κ. It is not where all devices trained k equal steps, as with a learning rate so
    small that no gradient changes: that period is k times as long, and can show if k · g is more than W / n. Noise and
    errors together do not depend on W, which could otherwise be read off the coordinates that no device changed. If
    W < κ · n, the greatest power of two that is not above W / κ replaces n, and shows. The noise is keyed by the digest
    of the adapter and of all sums: only who knows them can subtract it.

    If W = 0, the mean is this noise over n, as wide as if each survivor had one example. So the next adapter has other
    bytes, from which devices reveal shares again, and the noise of such rounds grows with the root of their number.

    ``adapter``: SHA-256 of the adapter from which they trained. Raises DataError as ``require_reach``, or the sum has
    another size than the shared tensors."""
    require_reach(spec, sums, survivors)
    delta, weight = sums["delta"], float(sums["weight"][0])
    if delta.shape != (layout.size,):
        text = f"the sum is of {delta.size} numbers, and the shared tensors have {layout.size}"
        raise DataError(text, about="shape")
    noise = _width(spec, task, weight, survivors) * dither(noise_key(spec, sums, adapter), delta.size)
    update = rotation.rotate_back(delta, rotation.seed(adapter)) if weight else np.zeros(delta.size)
    mean = ((update + noise) / (weight or survivors)).astype(np.float32)
    return np.where(mask(layout, task.trained), mean, np.float32(0))


def noisy_mean(
    spec: SessionSpec, task: Task, layout: Layout, sums: Sums, survivors: int, adapter: bytes
) -> NDArray[np.float32]:
    """Return the mean of the survivors' deltas and noise; zero in the parts that the task does not train.

    Noise of the width of a step is added, as in ``weighted_mean``: the next adapter has other bytes also if the sum
    counts as zero. Arguments are those of ``weighted_mean``. Raises DataError as ``check_noisy``, or the sum has
    another size than the shared tensors."""
    check_noisy(spec, sums, survivors)
    (segment,) = spec.vector.segments
    summed = sums[segment.name]
    if summed.shape != (layout.size,):
        text = f"the sum is of {summed.size} numbers, and the shared tensors have {layout.size}"
        raise DataError(text, about="shape")
    update = rotation.rotate_back(summed, rotation.seed(adapter))
    update += spec.vector.step(segment) * dither(noise_key(spec, sums, adapter), summed.size)
    return np.where(mask(layout, task.trained), (update / survivors).astype(np.float32), np.float32(0))


def _width(spec: SessionSpec, task: Task, weight: float, survivors: int) -> float:
    """Return the width of the noise in the sum, in weight units.

    In the mean, the variance of noise and rounding errors must not depend on W, and the noise must be at least as wide
    as a step. One variance for all W would be that of W = 1, n times as large as most need: therefore one for κ · n and
    above, and one for each power of two below. The errors of n survivors have the variance of noise with the width
    s · √(3 n / ``UNIFORMS``)."""
    step = spec.vector.step(spec.vector.segment("delta"))
    period = 2 * task.learning_rate if task.optimizer is OptimizerName.ADAMW else 0.0
    wide, errors = max(step, period), 3 * survivors / UNIFORMS * step**2
    least = max(1.0, math.sqrt(step**2 + errors) / wide)  # κ
    per_device = (weight or survivors) / least
    covered = survivors if per_device >= survivors else 2.0 ** (math.frexp(per_device)[1] - 1)
    return math.sqrt((wide * (weight or survivors) / covered) ** 2 - (errors if weight else 0.0))
