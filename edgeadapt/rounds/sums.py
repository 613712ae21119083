"""The sums of a round, whichever kind it is: their bounds, what they publish, and the noise that is added to them.

A sum without noise counts examples as well: devices weigh by them. With noise every device has the weight 1, and only
one vector is summed: an exact count of examples would say much about one device, and metrics that are hidden by noise
of their own are worth less than the budget that they cost (``docs/decisions/0038-privacy-of-a-session.md``)."""

import hashlib
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from aggregation import rotation
from aggregation.errors import ConfigError, DataError
from aggregation.keystream import Keystream
from aggregation.privacy import noise
from aggregation.privacy.noise import norm_squared, round_within
from aggregation.ring import MAX_BITS, Ring
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec, noise_reach

MAX_LOSS = 20.0  # nats; a device's loss is clipped to it, so that the metric has a bound
NORM_ERROR = 2.0**-20  # relative: a norm of 2^27 numbers in float64 is off by less than 2^-26
LEAST_RING_BITS = 16  # two bytes in memory and on the wire
LENGTHENED = 1.01  # norm of a rounded vector in the ring over that in the widest one, at most
UNIFORMS = 8  # numbers in the noise of one coordinate of the mean
SHRINK = 1 - 2.0**-40  # keeps a clipped coordinate within the codec's bound however the division rounds

# Published with the survivors' names, an exact count of examples is an equation, and rounds have different survivors:
# the equations give the counts of single devices. So no count is published, nor the exact accuracy, a fraction whose
# denominator is such a count. To two decimals, an accuracy excludes no denominator from 100 on, but many below.
DECIMALS = 2
MINIMUM_HELD_OUT = 10**DECIMALS  # examples

Vector = NDArray[np.float64]
Sums = Mapping[str, Vector]  # segment → sum over the survivors, shape (size,), in the segment's unit


@dataclass(frozen=True, slots=True)
class Bounds:
    clip_norm: float  # L2 bound on a device's contribution, in its own unit
    weight_cap: int  # largest weight of one device, in examples
    ring_bits: int  # width of an element
    max_clients: int  # largest number of contributions in one sum
    noise: float = 0.0  # standard deviation of one device's noise on each number, in the unit of ``clip_norm``; 0: none

    @classmethod
    def of(cls, spec: SessionSpec) -> "Bounds":
        vector = spec.vector
        return cls(spec.clip_norm, spec.weight_cap, vector.ring_bits, vector.max_clients, vector.segments[0].noise)


class HeldOut(Protocol):
    @property
    def correct(self) -> float: ...
    @property
    def count(self) -> int: ...
    @property
    def loss(self) -> float: ...


def metric_segments(weight_cap: int) -> tuple[Segment, ...]:
    """Return every round's sums: the weight, and what ``metrics_of`` publishes of the adapter that it began with."""
    return (
        Segment("weight", 1, float(weight_cap)),
        Segment("correct", 1, float(weight_cap)),
        Segment("loss", 1, MAX_LOSS * weight_cap),
        Segment("held_out", 1, float(weight_cap)),
    )


def require_exact(spec: VectorSpec, weight_cap: int) -> VectorSpec:
    """Check that the spec counts examples one by one, and return it: sums are divided by weights, which must be exact.
    Raises ConfigError if a step of the weight is above one."""
    if spec.max_steps < weight_cap:
        raise ConfigError(
            f"a ring of {spec.ring_bits} bits cannot count {weight_cap} examples of each of {spec.max_clients} devices:"
            " take more bits or a lower weight cap",
            about="ring_bits",
        )
    return spec


def require_weight(spec: SessionSpec, sums: Sums, survivors: int) -> float:
    """Return the total weight, a whole number and at most ``weight_cap`` for each. Raises DataError if it is not."""
    weight = float(sums["weight"][0])
    if not (weight.is_integer() and 0 <= weight <= spec.weight_cap * survivors):
        text = f"the examples of the survivors are not a whole number between 0 and {spec.weight_cap} for each"
        raise DataError(text, about="vector.weight")
    return weight


def published(sums: Sums) -> dict[str, float]:
    """Return the metrics of a round, as they are published, from the sums of its survivors: ``accuracy`` (a share) and
    ``loss`` (nats), means over the held-out examples, of the adapter that the round began with, to ``DECIMALS``. Empty
    below ``MINIMUM_HELD_OUT``, if honest survivors cannot have these sums, or if these have noise and no metrics."""
    if "held_out" not in sums:
        return {}
    correct, held_out, loss = (float(sums[name][0]) for name in ("correct", "held_out", "loss"))
    if not (held_out >= MINIMUM_HELD_OUT and 0 <= correct <= held_out):
        return {}
    mean_loss = min(max(loss / held_out, 0.0), MAX_LOSS)  # rounding, or a device that lies
    return {"accuracy": round(correct / held_out, DECIMALS), "loss": round(mean_loss, DECIMALS)}


def noise_key(spec: SessionSpec, sums: Sums, adapter: bytes) -> bytes:
    """Derive the key of a round's noise, which takes the sums and the SHA-256 of the adapter that it began with."""
    key = hashlib.sha256(b"edgeadapt/dither/1\x00" + adapter)
    for segment in spec.vector.segments:
        key.update(sums[segment.name].astype("<f8").tobytes())
    return key.digest()


def dither(key: bytes, size: int) -> NDArray[np.float64]:
    """Make noise of shape ``(size,)`` and width 1: sums of ``UNIFORMS`` numbers that are uniform over (-1/2, 1/2).

    One uniform number removes a period of the width from the distribution of a coordinate, each further one from a
    further derivative (Wannamaker et al. 2000, "A Theory of Nonsubtractive Dither"). At most a share of 6e-6 of any
    shorter period is left: the eighth power of sin(πx) / πx for x > 1. The bits are the same on every machine."""
    stream, total, drawn = Keystream(key), np.zeros(size, np.int64), np.empty(size, "<i4")
    for _ in range(UNIFORMS):
        stream.read_into(drawn.data.cast("B"))
        total += drawn
    return total.astype(np.float64) * 2.0**-32


def noisy_spec(name: str, size: int, bounds: Bounds) -> VectorSpec:
    """Return the sum of a round with noise: a clipped and rotated vector of ``size`` numbers in the segment ``name``.
    Raises ConfigError if the ring cannot hold the sum of all devices."""
    bound = bounds.clip_norm * rotation.peak(size)
    return VectorSpec((Segment(name, size, bound, bounds.noise),), bounds.ring_bits, bounds.max_clients)


def noisy_ring_bits(size: int, bounds: Bounds) -> int:
    """Return the least ring, from ``LEAST_RING_BITS`` on, whose rounding costs next to nothing.

    The norm that a device's vector is accounted for (``rounding.norm_squared``), and so the noise that an epsilon
    needs, is at most ``LENGTHENED`` times that in the widest ring. Raises ConfigError: the noise is too large for any
    ring: a thousand times the bound of a coordinate."""

    def longest(bits: int) -> float:
        spec = noisy_spec("", size, replace(bounds, ring_bits=bits))
        steps = bounds.clip_norm / spec.step(spec.segments[0])
        return math.sqrt(norm_squared(steps, size)) / steps

    least = longest(MAX_BITS)
    for bits in range(LEAST_RING_BITS, MAX_BITS):
        with suppress(ConfigError):
            if longest(bits) <= LENGTHENED * least:
                return bits
    return MAX_BITS


def check_noisy(spec: SessionSpec, sums: Sums, survivors: int) -> None:
    """Check that honest survivors can have the sum of a round with noise: else some device lied.

    With n survivors and d coordinates of step s, the norm of the sum is at most n · s · √``norm_squared`` + s · √d · r,
    where the noise of no coordinate is beyond r steps except with a probability of 2^-40 (``vector.noise_reach``).
    Raises DataError: they cannot. The text names no number of the sum."""
    (segment,) = spec.vector.segments
    step = spec.vector.step(segment)
    added = noise_reach(segment, step, survivors) * math.sqrt(segment.size)
    longest = survivors * math.sqrt(norm_squared(spec.clip_norm / step, segment.size)) + added
    if not float(np.linalg.norm(sums[segment.name])) <= longest * step * (1 + NORM_ERROR):
        text = f"the sum is longer than the clip norm {spec.clip_norm:g} and the noise allow"
        raise DataError(text, about=f"vector.{segment.name}")


def noisy_vector(vector: Vector, spec: SessionSpec, adapter: bytes, rng: np.random.Generator, noise_key: bytes) -> Ring:
    """Encode a device's vector in a session with noise, as it is masked and summed.

    It is clipped, rotated, and rounded until its norm is within that for which the session accounts
    (``rounding.norm_squared``); noise is then added to whole numbers. So the guarantee does not depend on how floating
    point rounds.

    Args:
        vector: Shape ``(spec.vector.size,)``, finite.
        adapter: SHA-256 of the adapter's file; the seed of the rotation follows from it.
        noise_key: 32 secret bytes, for this round only.

    Returns:
        Ring elements, shape ``(spec.vector.size,)``. A coordinate of the rotated vector is beyond its bound, and is
        clipped to it, with a probability of at most 2^-40 for all of them (``rotation.peak``).
    """
    if spec.privacy is None:
        raise ValueError("a session without noise has another contribution")
    (segment,) = spec.vector.segments
    step = spec.vector.step(segment)
    delta = clip(vector, spec.clip_norm)
    steps = np.clip(rotation.rotate(delta, rotation.seed(adapter)), -segment.bound, segment.bound) / step

    def rounded() -> NDArray[np.int64]:
        return np.floor(steps + rng.random(steps.size)).astype(np.int64)

    whole = round_within(steps, spec.clip_norm / step, rounded)
    whole += noise.draw(spec.privacy.mechanism, (segment.noise / step) ** 2, segment.size, noise_key)
    return spec.vector.to_ring(whole)


def counted(weight: float, held_out: HeldOut) -> dict[str, Vector]:
    values = {"weight": weight, "correct": held_out.correct, "loss": held_out.loss, "held_out": held_out.count}
    return {name: np.array([float(value)]) for name, value in values.items()}


def clip(delta: Vector, norm: float) -> Vector:
    """Clip a vector to an L2 norm above 0, as DP-FedAvg does (McMahan et al. 2018, algorithm 1).

    Returns:
        Shape ``(n,)``: ``delta`` if its norm is at most ``norm``, else ``delta`` scaled to ``norm``, shorter by at most
        a relative 2^-39. Guarantee: no coordinate exceeds ``norm`` in absolute value, whatever the rounding.

    >>> clip(np.array([3.0, 4.0]), 10.0).tolist()
    [3.0, 4.0]
    >>> clip(np.array([3.0, 4.0]), 1.0).round(9).tolist()
    [0.6, 0.8]
    """
    length = float(np.linalg.norm(delta))
    # The length can round down to the norm while a coordinate is just above it, which the codec would refuse.
    return np.clip(delta, -norm, norm) if length <= norm else delta * (norm / length * SHRINK)
