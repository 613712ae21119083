"""From a trained adapter to the numbers that may leave the device: clipped, weighted, in fixed point.

One function, so that there is one place to read to know what a device gives away: nothing but this vector travels,
and it travels under the mask.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from adapters.layout import Layout, Tensors
from adapters.task import MAX_SECONDS, contribution_spec
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.ring import Ring
from aggregation.session import COORDINATOR
from aggregation.spec import SessionSpec
from client.training.trainer import Score

Vector = NDArray[np.float64]
SHRINK = 1 - 2.0**-40  # keeps a clipped coordinate within the codec's bound whatever way the division rounds


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one round of local training produced."""

    start: Tensors
    trained: Tensors
    examples: int  # trained on
    held_out: Score  # of ``start`` on the device's held-out part
    seconds: float  # of training


def require_bounds(spec: SessionSpec, layout: Layout) -> None:
    """Return if whatever a device may contribute is within the bounds on offer.

    A tighter one would be met by some devices and not by others: who cannot answer has more examples, or a greater
    loss, than a number that the coordinator chose.

    Raises:
        ProtocolError: The vector is not the one of this layout, clip norm and weight cap.
    """
    vector = spec.vector
    cap, bits, clients = spec.weight_cap, vector.ring_bits, vector.max_clients
    try:
        fair = contribution_spec(layout, clip_norm=spec.clip_norm, weight_cap=cap, ring_bits=bits, max_clients=clients)
    except ConfigError as error:
        raise ProtocolError(f"the vector on offer: {error}", COORDINATOR) from None
    if vector != fair:
        raise ProtocolError("the vector on offer has other bounds than its clip norm and weight cap make", COORDINATOR)


def contribution(outcome: Outcome, layout: Layout, spec: SessionSpec, rng: np.random.Generator) -> Ring:
    """The vector to be masked.

    The delta is clipped to the L2 norm ``spec.clip_norm`` and multiplied by the device's weight, its number of examples
    up to ``spec.weight_cap``. The metrics are those of at most ``spec.weight_cap`` held-out examples.

    Args:
        outcome: Finite tensors in ``layout``.
        layout: Of the adapter; its digest is in the offer.
        spec: The session's, from the offer that the device accepted.
        rng: Rounding coins; not secret.

    Raises:
        DataError: A tensor holds NaN or infinity, or there is no example.
    """
    if outcome.examples < 1:
        raise DataError("a device without examples has nothing to contribute")
    delta = layout.flatten(outcome.trained).astype(np.float64) - layout.flatten(outcome.start)
    weight = min(outcome.examples, spec.weight_cap)
    values = {
        "delta": clip(delta, spec.clip_norm) * weight,
        "weight": np.array([float(weight)]),
        "correct": np.array([float(outcome.held_out.correct)]),
        "loss": np.array([outcome.held_out.loss]),
        "held_out": np.array([float(outcome.held_out.count)]),
        "seconds": np.array([min(outcome.seconds, MAX_SECONDS)]),
    }
    return spec.vector.encode(values, rng)


def clip(delta: Vector, norm: float) -> Vector:
    """``delta`` scaled down to L2 norm ``norm`` where it is longer. A vector within the bound comes back unchanged."""
    length = float(np.linalg.norm(delta))
    # A length can round down to the norm with a coordinate just above it, which the codec would refuse.
    return np.clip(delta, -norm, norm) if length <= norm else delta * (norm / length * SHRINK)
