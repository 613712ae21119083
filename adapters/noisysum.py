"""The sum of a round with noise: its vector, what honest survivors can reach, and the mean of a round of training.

With noise every device has the weight 1, whatever it has examples of, and nothing but the update is in the vector: an
exact number, such as a count of examples, has no place in a sum that is to say little about one device, and metrics
that are hidden by noise of their own are worth less than the budget that they cost
(``docs/decisions/0038-privacy-of-a-session.md``).
"""

import math
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from adapters.layout import Layout
from adapters.parts import mask
from adapters.task import LEAST_RING_BITS, NORM_ERROR, Sums, Task, dither, noise_key
from aggregation import rotation
from aggregation.errors import ConfigError, DataError
from aggregation.privacy.rounding import norm_squared
from aggregation.ring import MAX_BITS
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec, noise_reach

LENGTHENED = 1.01  # norm of a rounded vector in the ring over that in the widest one, at most


def noisy_spec(name: str, size: int, *, clip_norm: float, noise: float, ring_bits: int, max_clients: int) -> VectorSpec:
    """The sum of one round: a clipped and rotated vector, in one segment with noise.

    Args:
        name: Of the segment.
        size: Numbers of the vector.
        clip_norm: L2 bound on it, in its own unit.
        noise: Standard deviation of the noise of one device on each coordinate, in the same unit.
        ring_bits: Width of an element.
        max_clients: Largest number of contributions in one sum.

    Raises:
        ConfigError: The ring cannot hold the sum of so many devices.
    """
    bound = clip_norm * rotation.peak(size)
    return VectorSpec((Segment(name, size, bound, noise),), ring_bits, max_clients)


def least_ring_bits(size: int, *, clip_norm: float, noise: float, max_clients: int) -> int:
    """The least ring, from ``task.LEAST_RING_BITS`` on, whose rounding costs next to nothing.

    The norm that a device's vector is accounted for (``rounding.norm_squared``), and so the noise that an epsilon
    needs, is at most ``LENGTHENED`` times that in the widest ring. Arguments are those of ``noisy_spec``.

    Raises:
        ConfigError: The noise is too large for any ring: a thousand times the bound of a coordinate.
    """

    def longest(bits: int) -> float:
        """In clip norms."""
        spec = noisy_spec("", size, clip_norm=clip_norm, noise=noise, ring_bits=bits, max_clients=max_clients)
        steps = clip_norm / spec.step(spec.segments[0])
        return math.sqrt(norm_squared(steps, size)) / steps

    least = longest(MAX_BITS)
    for bits in range(LEAST_RING_BITS, MAX_BITS):
        with suppress(ConfigError):
            if longest(bits) <= LENGTHENED * least:
                return bits
    return MAX_BITS


def require_reach(spec: SessionSpec, sums: Sums, survivors: int) -> None:
    """Return if honest survivors can have the sum of a round with noise: else a device lied.

    With n survivors and d coordinates of step s, the norm of the sum is at most n · s · √``norm_squared`` + s · √d · r,
    where the noise of no coordinate is beyond r steps except with a probability of 2^-40 (``vector.noise_reach``).

    Raises:
        DataError: They cannot. The text names no number of the sum.
    """
    (segment,) = spec.vector.segments
    step = spec.vector.step(segment)
    added = noise_reach(segment, step, survivors) * math.sqrt(segment.size)
    longest = survivors * math.sqrt(norm_squared(spec.clip_norm / step, segment.size)) + added
    if not float(np.linalg.norm(sums[segment.name])) <= longest * step * (1 + NORM_ERROR):
        text = f"the sum is longer than the clip norm {spec.clip_norm:g} and the noise allow"
        raise DataError(text, about=f"vector.{segment.name}")


def noisy_mean(
    spec: SessionSpec, task: Task, layout: Layout, sums: Sums, survivors: int, adapter: bytes
) -> NDArray[np.float32]:
    """The mean of the survivors' deltas and noise; zero in the parts that the task does not train.

    Noise of the width of a step is added, as in ``task.weighted_mean``: the next adapter has other bytes than the last
    one also if the sum counts as zero.

    Args:
        spec: Of the session.
        task: Of the round's plan.
        layout: Of the shared tensors.
        sums: Decoded.
        survivors: Their number.
        adapter: SHA-256 of the adapter from which they trained.

    Raises:
        DataError: As ``require_reach``, or the sum has another size than the shared tensors.
    """
    require_reach(spec, sums, survivors)
    (segment,) = spec.vector.segments
    found = sums[segment.name]
    if found.shape != (layout.size,):
        text = f"the sum is of {found.size} numbers, and the shared tensors have {layout.size}"
        raise DataError(text, about="shape", value=found.size)
    update = rotation.rotate_back(found, rotation.seed(adapter))
    update += spec.vector.step(segment) * dither(noise_key(spec, sums, adapter), found.size)
    mean = (update / survivors).astype(np.float32)
    return np.where(mask(layout, task.trained), mean, np.float32(0))
