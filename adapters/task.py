"""One round's training task, the layout of a device's contribution, and the mean of a round.

The coordinator signs the task as part of its plan, in which it is opaque to the protocol. The segments of the
contribution are the sums that are aggregated under the masks. ``client/training`` trains; ``coordinator/`` computes the
next adapter from the mean, and its auditor does so again.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Annotated, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationError

from adapters import jsontext
from adapters.layout import Layout
from adapters.lorasb import with_squares
from adapters.parts import Part, mask, only
from adapters.peftconfig import PeftConfig
from aggregation import rotation
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.keystream import Keystream
from aggregation.ring import MAX_BITS
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec

MAX_LOSS = 20.0  # nats; a device's loss is clipped to it, so that the metric has a bound

NORM_ERROR = 2.0**-20  # relative: a norm of 2^27 numbers in float64 is off by less than 2^-26
LEAST_RING_BITS = 16  # two bytes in memory and on the wire
RESOLUTION = 1 / 8  # norm of one step in every coordinate of the mean, in clip norms, at most

UNIFORMS = 8  # numbers in the noise of one coordinate of the mean

# Published with the survivors' names, an exact count of examples is an equation, and rounds have different survivors:
# the equations give the counts of single devices. So no count is published, nor the exact accuracy, a fraction whose
# denominator is such a count. To two decimals, an accuracy excludes no denominator from 100 on, but many below.
DECIMALS = 2
MINIMUM_HELD_OUT = 10**DECIMALS  # examples

Sums = Mapping[str, NDArray[np.float64]]  # segment → sum over the survivors, shape (size,), in the segment's unit
Positive = Annotated[int, Field(gt=0)]
T = TypeVar("T")


def decode_as(kind: type[T], raw: bytes) -> T:
    """A task of one kind, from JSON. Raises ProtocolError for the first field that is missing, unknown or refused."""
    try:
        return jsontext.decode_as(kind, raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = f"task.{'.'.join(map(str, first['loc']))}"
        raise ProtocolError(f"{field}: {first['msg']}", about=field) from error


UNSTABLE = "the learning rate times the proximal weight and the weight decay together must be below 1"


def is_stable(learning_rate: float, proximal: float, weight_decay: float) -> bool:
    """Whether the terms that pull an adapter to its start and to zero shrink its distance in a step of SGD.

    From 1 on a step reaches past what it is pulled to, and from 2 on each distance is greater than the one before, so
    that how far a device gets says how many steps it makes.
    """
    return learning_rate * (proximal + weight_decay) < 1


class OptimizerName(StrEnum):
    """What makes a step of a gradient (``client.training.descent``)."""

    ADAMW = "adamw"
    SGD = "sgd"


class RateSchedule(StrEnum):
    """How the learning rate falls over the steps of a training."""

    CONSTANT = "constant"
    LINEAR = "linear"
    COSINE = "cosine"


@dataclass(frozen=True, slots=True)
class Task:
    """One round's training, the same for every device of the cohort."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    peft_config: PeftConfig
    labels: tuple[str, ...]
    epochs: Annotated[int, Field(gt=0, le=100)]
    batch_size: Annotated[int, Field(gt=0, le=1024)]
    learning_rate: Annotated[float, Field(gt=0, le=1)]  # of the first step
    weight_decay: Annotated[float, Field(ge=0, le=1)]
    proximal: Annotated[float, Field(ge=0, le=1000)]  # μ of FedProx: adds μ/2 · ‖w - w₀‖² to the loss
    trained: tuple[Part, ...]  # parts of the adapter; the others stay as they are
    shared: tuple[Part, ...]  # parts whose updates are summed; those of ``trained`` that are not stay on the device
    optimizer: OptimizerName = OptimizerName.ADAMW
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of SGD
    schedule: RateSchedule = RateSchedule.CONSTANT
    gradient_norm: Annotated[float, Field(ge=0)] = 0.0  # L2 norm to which a step's gradient is clipped; 0: never

    def encode(self) -> bytes:
        """JSON, the same bytes for equal tasks: ``Task.decode(task.encode()) == task``."""
        return jsontext.encode(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read a task.

        Raises:
            ProtocolError: A field is missing, unknown or out of range, training is not stable, nothing is both trained
                and shared, R is not both or is with A or B, or a frozen part is either.
        """
        found = decode_as(cls, raw)
        if missing := [each.name for each in fields(cls) if each.name not in json.loads(raw)]:
            raise ProtocolError(f"task.{missing[0]}: Field required", about=f"task.{missing[0]}")
        if not is_stable(found.learning_rate, found.proximal, found.weight_decay):
            raise ProtocolError(f"task.proximal: {UNSTABLE}", about="task.proximal", value=found.proximal)
        if not set(found.trained) & set(found.shared):
            raise ProtocolError("task.shared: no part of the adapter is both trained and shared", about="task.shared")
        if Part.FROZEN in {*found.trained, *found.shared}:
            raise ProtocolError("task: a frozen part is neither trained nor shared", about="task.parts")
        for parts in (found.trained, found.shared):
            if Part.R in {*found.trained, *found.shared} and (Part.R not in parts or {Part.A, Part.B} & {*parts}):
                raise ProtocolError("task: R is trained and shared without A and B, or not at all", about="task.parts")
        return found

    @property
    def private(self) -> frozenset[Part]:
        """The parts that are trained and stay on the device."""
        return frozenset(self.trained) - frozenset(self.shared)


def shared_layout(layout: Layout, task: Task) -> Layout:
    """The tensors whose updates are summed; in a round of Fed-SB, R of each LoRA layer is one of them.

    Args:
        layout: Of the adapter.
        task: Of the round.

    Raises:
        DataError: The adapter has no part that is both trained and shared, or as ``with_squares``.
    """
    layout = with_squares(layout) if Part.R in task.shared else layout
    only(layout, set(task.trained) & set(task.shared))
    return only(layout, task.shared)


def contribution_spec(
    layout: Layout, *, clip_norm: float, weight_cap: int, ring_bits: int, max_clients: int
) -> VectorSpec:
    """The sums of one round: the weighted delta, the weights and the metrics, each with its own bound.

    A device's weight is its number of examples, at most ``weight_cap``. ``delta`` is the clipped delta times the
    weight, rotated, so that a coordinate is within ``rotation.peak`` of its norm, ``clip_norm * weight_cap``.
    ``correct``, ``loss`` and ``held_out`` come from the adapter that the device received, with the device's private
    parts, measured on its held-out part before training. ``layout`` is that of the shared tensors.

    Raises:
        ConfigError: The ring cannot hold the sum of so many devices, or cannot count their examples one by one.
    """
    segments = (
        Segment("delta", layout.size, clip_norm * weight_cap * rotation.peak(layout.size)),
        *metric_segments(weight_cap),
    )
    return require_exact(VectorSpec(segments, ring_bits, max_clients), weight_cap)


def least_ring_bits(layout: Layout, *, clip_norm: float, weight_cap: int, max_clients: int) -> int:
    """The least ring for ``contribution_spec``, from ``LEAST_RING_BITS`` on, with a fine enough step.

    It counts examples one by one, and s · √d / n is at most ``RESOLUTION`` times the clip norm, with the step s, d
    coordinates and n devices: ``weighted_mean`` adds noise of about this norm.

    Raises:
        ConfigError: No ring can.
    """
    for bits in range(LEAST_RING_BITS, MAX_BITS):
        with suppress(ConfigError):
            spec = contribution_spec(
                layout, clip_norm=clip_norm, weight_cap=weight_cap, ring_bits=bits, max_clients=max_clients
            )
            noise = spec.step(spec.segment("delta")) * math.sqrt(layout.size) / max_clients
            if noise <= RESOLUTION * clip_norm:
                return bits
    raise ConfigError(
        f"no ring can hold the sum of {max_clients} updates of {weight_cap} examples with the clip norm {clip_norm}",
        about="clip_norm",
        value=clip_norm,
    )


def metric_segments(weight_cap: int) -> tuple[Segment, ...]:
    """The sums of every round: the weight, and what ``metrics_of`` publishes of the adapter that it began with."""
    return (
        Segment("weight", 1, float(weight_cap)),
        Segment("correct", 1, float(weight_cap)),
        Segment("loss", 1, MAX_LOSS * weight_cap),
        Segment("held_out", 1, float(weight_cap)),
    )


def require_exact(spec: VectorSpec, weight_cap: int) -> VectorSpec:
    """Return the spec if it counts examples one by one: sums are divided by weights, which must be exact.

    Raises:
        ConfigError: A step of the weight is above one.
    """
    if spec.max_steps < weight_cap:
        raise ConfigError(
            f"a ring of {spec.ring_bits} bits cannot count {weight_cap} examples of each of {spec.max_clients} devices:"
            " take more bits or a lower weight cap",
            about="ring_bits",
            value=spec.ring_bits,
        )
    return spec


def require_reach(spec: SessionSpec, sums: Sums, survivors: int) -> None:
    """Return if honest survivors can have the sum of a round: else a device lied. Which one, nobody can tell.

    With W the total weight, n survivors, and s the step of the d coordinates of ``delta``:

    - W is a whole number between 0 and ``weight_cap * n``. Weights are examples, counted without error.
    - ‖Σ delta‖ ≤ ``clip_norm`` · W + ``rounding_norm``. Each delta has at most the norm ``clip_norm`` before it is
      weighted, and the rotation keeps norms.

    Guarantee: a sum of honest contributions is refused with a probability of at most 2^-40. The mean of a sum that is
    not refused has at most the norm ``clip_norm`` + ``rounding_norm`` / W, or 0 if W = 0, whoever lied;
    ``weighted_mean`` adds its noise.

    Args:
        spec: Of the session.
        sums: Decoded.
        survivors: Their number.

    Raises:
        DataError: Honest survivors cannot have it. The text names no number of the sum, because it is published.
    """
    if not {"delta", "weight"} <= {segment.name for segment in spec.vector.segments}:
        raise DataError("the sum does not consist of an update and its examples", about="vector.segments")
    weight, rounding = require_weight(spec, sums, survivors), rounding_norm(spec, survivors)
    if not float(np.linalg.norm(sums["delta"])) <= (spec.clip_norm * weight + rounding) * (1 + NORM_ERROR):
        text = f"the sum of the updates is longer than the clip norm {spec.clip_norm:g} allows for its examples"
        raise DataError(text, about="vector.delta")


def rounding_norm(spec: SessionSpec, survivors: int) -> float:
    """Bound on the norm of the rounding errors in the sum of ``survivors`` updates, in weight units.

    An error of one device and coordinate is below 1.5 steps, has a mean of 0 and a variance of s² / 4
    (``rounding_noise``), and is independent of the others. So the norm E of their sum has E‖E‖² = n · d · s² / 4. It is
    a convex function of the errors that changes by at most √n times their distance, so ‖E‖ exceeds its mean by
    3 s √n · √(80 ln 2) with a probability of at most 2^-40 (Boucheron, Lugosi and Massart 2013, "Concentration
    Inequalities", theorem 6.10). It never exceeds 1.5 · n · s · √d.
    """
    delta = spec.vector.segment("delta")
    step, root = spec.vector.step(delta), math.sqrt(delta.size)
    likely = math.sqrt(survivors) * (root / 2 + 3 * math.sqrt(2 * math.log(2) * rotation.EXCESS_BITS))
    return step * min(likely, 1.5 * survivors * root)


def rounding_noise(step: float, size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """What a device adds to its rotated update before it is rounded: uniform over half a step to either side.

    Stochastic rounding alone is an error without bias, but with a variance between 0 and s² / 4 that depends on the
    number. With this noise the variance is s² / 4 for every number, also for 0: the two are the triangular dither of
    Wannamaker et al. 2000, "A Theory of Nonsubtractive Dither", section IV. So the rounding errors of a round show
    neither how many devices have examples nor how long their updates are.
    """
    return step * (rng.random(size) - 0.5)


def require_weight(spec: SessionSpec, sums: Sums, survivors: int) -> float:
    """The total weight, if honest survivors can have it: a whole number between 0 and ``weight_cap`` for each.

    Raises:
        DataError: They cannot.
    """
    weight = float(sums["weight"][0])
    if not (weight.is_integer() and 0 <= weight <= spec.weight_cap * survivors):
        text = f"the examples of the survivors are not a whole number between 0 and {spec.weight_cap} for each"
        raise DataError(text, about="vector.weight")
    return weight


def weighted_mean(
    spec: SessionSpec, task: Task, layout: Layout, sums: Sums, survivors: int, adapter: bytes
) -> NDArray[np.float32]:
    """The mean of the survivors' deltas, weighted by their examples; zero in the parts that the task does not train.

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
    W < κ · n, the greatest power of two that is not above W / κ takes the place of n, and shows. The key of the noise
    is the digest of the adapter and of all sums: whoever knows them computes the same mean, and whoever knows the mean
    alone cannot subtract the noise.

    If W = 0, because no survivor has examples, the mean is this noise over n, as wide as if each had one. The next
    adapter then has other bytes than the last one, from which devices would reveal shares for a few more sums only; and
    the noise of many such rounds grows with the root of their number, because each begins with another adapter.

    Args:
        spec, sums, survivors: As of ``require_reach``.
        task: Of the round's plan.
        layout: Of the shared tensors.
        adapter: SHA-256 of the adapter from which they trained.

    Raises:
        DataError: As ``require_reach``, or the sum has another size than the shared tensors.
    """
    require_reach(spec, sums, survivors)
    delta, weight = sums["delta"], float(sums["weight"][0])
    if delta.shape != (layout.size,):
        text = f"the sum is of {delta.size} numbers, and the shared tensors have {layout.size}"
        raise DataError(text, about="shape", value=delta.size)
    noise = _width(spec, task, weight, survivors) * dither(noise_key(spec, sums, adapter), delta.size)
    update = rotation.rotate_back(delta, rotation.seed(adapter)) if weight else np.zeros(delta.size)
    mean = ((update + noise) / (weight or survivors)).astype(np.float32)
    return np.where(mask(layout, task.trained), mean, np.float32(0))


def _width(spec: SessionSpec, task: Task, weight: float, survivors: int) -> float:
    """The width of the noise in the sum, in weight units.

    In the mean, the variance of noise and rounding errors must not depend on W, and the noise must be at least as wide
    as a step. One variance for all W would be that of W = 1, n times as large as is needed for the most: therefore one
    for κ · n and above, and one for each power of two below. The errors of n survivors have the variance of noise with
    the width s · √(3 n / ``UNIFORMS``).
    """
    step = spec.vector.step(spec.vector.segment("delta"))
    period = 2 * task.learning_rate if task.optimizer is OptimizerName.ADAMW else 0.0
    wide, errors = max(step, period), 3 * survivors / UNIFORMS * step**2
    least = max(1.0, math.sqrt(step**2 + errors) / wide)  # κ
    per_device = (weight or survivors) / least
    covered = survivors if per_device >= survivors else 2.0 ** (math.frexp(per_device)[1] - 1)
    return math.sqrt((wide * (weight or survivors) / covered) ** 2 - (errors if weight else 0.0))


def metrics_of(sums: Sums) -> dict[str, float]:
    """The metrics of a round, from the sums of its survivors, as they are published.

    Returns:
        ``accuracy`` (a share) and ``loss`` (nats): means over the held-out examples, of the adapter that the round
        began with, to ``DECIMALS``. Empty if there are fewer than ``MINIMUM_HELD_OUT``, if honest survivors cannot have
        these sums, or if the sums have noise and no metrics.
    """
    if "held_out" not in sums:
        return {}
    correct, held_out, loss = (float(sums[name][0]) for name in ("correct", "held_out", "loss"))
    if not (held_out >= MINIMUM_HELD_OUT and 0 <= correct <= held_out):
        return {}
    mean_loss = min(max(loss / held_out, 0.0), MAX_LOSS)  # rounding, or a device that lies
    return {"accuracy": round(correct / held_out, DECIMALS), "loss": round(mean_loss, DECIMALS)}


def noise_key(spec: SessionSpec, sums: Sums, adapter: bytes) -> bytes:
    """The key of a round's noise, which whoever knows the sums can compute, and nobody else.

    Args:
        spec, sums: Of the round.
        adapter: SHA-256 of the adapter that it began with.
    """
    key = hashlib.sha256(b"edgeadapt/dither/1\x00" + adapter)
    for segment in spec.vector.segments:
        key.update(sums[segment.name].astype("<f8").tobytes())
    return key.digest()


def dither(key: bytes, size: int) -> NDArray[np.float64]:
    """Noise of shape ``(size,)`` and width 1: sums of ``UNIFORMS`` numbers that are uniform over (-1/2, 1/2).

    One uniform number removes a period of the width from the distribution of a coordinate, each further one from a
    further derivative (Wannamaker et al. 2000, "A Theory of Nonsubtractive Dither"). Of any shorter period, a share of
    at most 6e-6 is left: the eighth power of sin(πx) / πx for x > 1. The bits are the same on every machine.
    """
    stream, total, drawn = Keystream(key), np.zeros(size, np.int64), np.empty(size, "<i4")
    for _ in range(UNIFORMS):
        stream.read_into(drawn.data.cast("B"))
        total += drawn
    return total.astype(np.float64) * 2.0**-32
