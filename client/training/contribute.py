"""A device's contribution: from a trained adapter to a clipped, weighted vector in fixed point.

This vector is all that a device sends of its data, and it is sent under the mask.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from adapters.layout import Layout, Tensors
from adapters.ridge import EmbeddingMoments, pack
from adapters.task import rounding_noise
from adapters.taskkinds import AnyTask, vector_spec
from aggregation import rotation
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.privacy import noise
from aggregation.privacy.rounding import round_within
from aggregation.ring import Ring
from aggregation.session import COORDINATOR
from aggregation.spec import SessionSpec
from client.training.examples import Score

Vector = NDArray[np.float64]
SHRINK = 1 - 2.0**-40  # keeps a clipped coordinate within the codec's bound however the division rounds


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one round of local training."""

    start: Tensors
    trained: Tensors
    examples: int  # trained on
    held_out: Score  # of ``start`` on the device's held-out examples

    @classmethod
    def untrained(cls, start: Tensors, examples: int, held_out: int) -> Self:
        """The outcome of a device that could not train: an update of zero, with the weight of its examples.

        With weight zero, whatever made other devices fail would show how much this one counts.
        """
        return cls(start, start, examples, Score.worst(held_out))


def require_bounds(spec: SessionSpec, layout: Layout, task: AnyTask) -> None:
    """Return if the bounds in the offer admit every contribution that a device can make.

    A tighter bound would tell devices apart by whether they can answer: those that cannot have more examples, or a
    greater loss, than a number that the coordinator chose.

    Args:
        spec: Of the session, from the offer.
        layout: Of the adapter.
        task: Of the plan.

    Raises:
        ProtocolError: The vector in the offer is not that of this task, layout, clip norm and weight cap, or the
            adapter lacks what the task asks for.
    """
    vector = spec.vector
    try:
        fair = vector_spec(
            task,
            layout,
            clip_norm=spec.clip_norm,
            weight_cap=spec.weight_cap,
            ring_bits=vector.ring_bits,
            max_clients=vector.max_clients,
            noise=vector.segments[0].noise,
        )
    except DataError as error:  # the adapter and the task are the coordinator's
        raise ProtocolError.of(error, COORDINATOR) from None
    except ConfigError as error:
        raise ProtocolError(f"the vector in the offer: {error}", COORDINATOR, about="offer.spec.vector") from None
    if vector != fair:
        reason = "the bounds of the vector in the offer do not follow from its clip norm and weight cap"
        raise ProtocolError(reason, COORDINATOR, about="offer.spec.vector")


def contribution(outcome: Outcome, layout: Layout, spec: SessionSpec, adapter: bytes, rng: np.random.Generator) -> Ring:
    """Encode the outcome of a round as the vector that is masked and summed.

    Args:
        outcome: Finite tensors, those of ``layout`` and maybe others, which stay on the device.
        layout: Of the shared tensors.
        spec: Of the session, from the offer that the device accepted.
        adapter: SHA-256 of the adapter's file; the seed of the rotation follows from it.
        rng: Stochastic rounding.

    Returns:
        Ring elements, shape ``(spec.vector.size,)``. Decoded with the segments of ``spec.vector``, in weight units:
        ``delta`` is ``clip(trained - start, clip_norm) * weight``, rotated; ``weight`` is the number of examples, at
        most ``spec.weight_cap``; ``correct``, ``loss`` and ``held_out`` are the score of ``start``. Guarantee: each
        value is off by less than one step of its segment, without bias; a coordinate of ``delta`` by less than 1.5
        steps with a variance of a quarter of a squared step (``task.rounding_noise``), or more if it is beyond its
        bound, with a probability of at most 2^-40 for all coordinates (``rotation.peak``).

    Raises:
        DataError: A tensor has another layout, NaN or infinity, or a metric is outside its bound.
    """
    trained, start = (layout.flatten(layout.select(tensors)) for tensors in (outcome.trained, outcome.start))
    weight, segment = min(outcome.examples, spec.weight_cap), spec.vector.segment("delta")
    delta = clip(trained.astype(np.float64) - start, spec.clip_norm) * weight
    rotated = rotation.rotate(delta, rotation.seed(adapter))
    rotated += rounding_noise(spec.vector.step(segment), delta.size, rng)
    values = {"delta": np.clip(rotated, -segment.bound, segment.bound)}
    return spec.vector.encode(values | _counted(weight, outcome.held_out), rng)


def noisy_contribution(
    outcome: Outcome, layout: Layout, spec: SessionSpec, adapter: bytes, rng: np.random.Generator, noise_key: bytes
) -> Ring:
    """Encode the outcome of a round in a session with noise, as the vector that is masked and summed.

    The update is clipped, rotated, and rounded until its norm is within that for which the session accounts
    (``rounding.norm_squared``); noise is then added to whole numbers. So the guarantee does not depend on how floating
    point rounds. A device without examples contributes the noise alone, with the weight 1 as every other.

    Args:
        outcome, layout: As of ``contribution``.
        spec: Of the session, whose offer the device accepted.
        adapter: SHA-256 of the adapter's file; the seed of the rotation follows from it.
        rng: Stochastic rounding.
        noise_key: 32 secret bytes, for this round only.

    Returns:
        Ring elements, shape ``(spec.vector.size,)``. A coordinate of the rotated update is beyond its bound, and is
        clipped to it, with a probability of at most 2^-40 for all of them (``rotation.peak``).

    Raises:
        DataError: A tensor has another layout, NaN or infinity.
    """
    trained, start = (layout.flatten(layout.select(tensors)) for tensors in (outcome.trained, outcome.start))
    return noisy_vector(trained.astype(np.float64) - start, spec, adapter, rng, noise_key)


def noisy_vector(vector: Vector, spec: SessionSpec, adapter: bytes, rng: np.random.Generator, noise_key: bytes) -> Ring:
    """Encode a vector of a session with noise: clipped, rotated, rounded within its norm, and with noise.

    Args:
        vector: Shape ``(spec.vector.size,)``, finite.
        spec, adapter, rng, noise_key: As of ``noisy_contribution``.
    """
    if spec.privacy is None:
        raise ValueError("a session without noise has another contribution")
    (segment,) = spec.vector.segments
    step = spec.vector.step(segment)
    delta = clip(vector, spec.clip_norm)
    steps = np.clip(rotation.rotate(delta, rotation.seed(adapter)), -segment.bound, segment.bound) / step

    def rounded() -> NDArray[np.int64]:
        return np.floor(steps + rng.random(steps.size)).astype(np.int64)

    found = round_within(steps, spec.clip_norm / step, rounded)
    found += noise.draw(spec.privacy.mechanism, (segment.noise / step) ** 2, segment.size, noise_key)
    return spec.vector.to_ring(found)


def moment_contribution(found: EmbeddingMoments, held_out: Score, spec: SessionSpec, rng: np.random.Generator) -> Ring:
    """Encode a device's moments as the vector that is masked and summed.

    Args:
        found: Of its training examples. If they are more than ``spec.weight_cap``, the moments are scaled down to it.
        held_out: The score of the adapter that it received, on its held-out examples.
        spec: Of the session, from the offer that the device accepted.
        rng: Stochastic rounding.

    Returns:
        Ring elements, shape ``(spec.vector.size,)``, in the segments of ``adapters.analytic.moment_spec``. Guarantee:
        each value is off by less than one step of its segment, without bias.

    Raises:
        DataError: A number is not finite, or a metric is outside its bound.
    """
    weight = min(found.weight, float(spec.weight_cap))
    share = weight / found.weight if found.weight else 0.0
    values = {
        "xx": np.clip(pack(found.xx) * share, -weight, weight),
        "xy": np.clip(found.xy.ravel() * share, -weight, weight),
    }
    return spec.vector.encode(values | _counted(weight, held_out), rng)


def _counted(weight: float, held_out: Score) -> dict[str, Vector]:
    counted = {"weight": weight, "correct": held_out.correct, "loss": held_out.loss, "held_out": held_out.count}
    return {name: np.array([float(value)]) for name, value in counted.items()}


def clip(delta: Vector, norm: float) -> Vector:
    """Clip a vector to an L2 norm, as DP-FedAvg does (McMahan et al. 2018, "Learning Differentially Private Recurrent
    Language Models", algorithm 1).

    Args:
        delta: Shape ``(n,)``, finite.
        norm: Greater than 0.

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
