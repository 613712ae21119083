"""A round of federated evaluation: how many held-out examples of the devices two releases answer rightly, as one sum.

Devices train nothing. Each runs the release that it has on its own held-out examples and contributes four counts: right
answers and examples under the newest release, and the same under the one before; two of them are zero. So the sums say
how good either release is, and not which device has which. A device with another release contributes zeros.

How many devices have a release, nobody can tell a device: rollouts change, and devices update when they like. Exact
sums could be those of one device. So every evaluation has noise, also in a federation whose training has none
(``docs/decisions/0066-secure-evaluation.md``). The vector is masked, summed and accounted for as every other. What is
published of the sums are ``evaluated``'s metrics. The adapter of the round stays what it was, up to a noise that only
gives it other bytes (``renewed``).
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import ConfigDict, Field

from adapters import jsontext
from adapters.analytic import LARGEST, ClassifierHead
from adapters.layout import Layout, Tensors
from adapters.manifest import Sha256
from adapters.noisysum import noisy_spec
from adapters.peftconfig import PeftConfig
from adapters.rollout import NEWEST, PREVIOUS
from adapters.task import DECIMALS, MINIMUM_HELD_OUT, Sums, decode_as, dither
from aggregation import rotation
from aggregation.errors import ConfigError, ProtocolError
from aggregation.spec import COUNTS, SessionSpec
from aggregation.vector import VectorSpec

SIZE = 4  # of ``COUNTS``: right answers and examples of the newest release, then of the one before
RENEWAL = 2.0**-16  # width of the noise in the head's weights, whose logits are about 1 to 16
ACCURACY, EXAMPLES, DEVIATION = "accuracy", "examples", "deviation"  # metrics, the first two of each release


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """One round of evaluation, the same for every device of the cohort.

    Args:
        peft_config: Of the adapter in the plan.
        labels: Of both releases, in the order of the devices' examples.
        newest: ``AdapterManifest.content`` of the adapter in the newest release.
        previous: The same of the release before.
        most: Most held-out examples of a device that count: its first ones.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    peft_config: PeftConfig
    labels: tuple[str, ...]
    newest: Sha256
    previous: Sha256
    most: Annotated[int, Field(ge=1, le=2**16)]

    def encode(self) -> bytes:
        """JSON, the same bytes for equal tasks: ``EvaluationTask.decode(task.encode()) == task``."""
        return jsontext.encode(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read a task.

        Raises:
            ProtocolError: A field is missing, unknown or out of range, or both releases are the same.
        """
        found = decode_as(cls, raw)
        if found.newest == found.previous:
            raise ProtocolError("the task compares a release with itself", about="task.newest")
        return found

    @property
    def norm(self) -> float:
        """Largest L2 norm of a contribution: all of ``most`` examples right."""
        return math.sqrt(2.0) * self.most


def counts_spec(*, clip_norm: float, noise: float, ring_bits: int, max_clients: int) -> VectorSpec:
    """The sum of a round: the counts, with noise.

    Args:
        clip_norm: L2 bound on a contribution: ``EvaluationTask.norm``.
        noise: Standard deviation of one device's noise on each count, in examples.
        ring_bits, max_clients: As of ``VectorSpec``.

    Raises:
        ConfigError: There is no noise, or the ring cannot hold the sum of so many devices.
    """
    if not noise:
        raise ConfigError("right answers are not summed without noise: set evaluation.noise_multiplier", about="noise")
    return noisy_spec(COUNTS, SIZE, clip_norm=clip_norm, noise=noise, ring_bits=ring_bits, max_clients=max_clients)


def evaluated(spec: SessionSpec, sums: Sums, survivors: int, digest: bytes) -> dict[str, float]:
    """The metrics of a round, as they are published.

    Args:
        spec: Of the session, which has noise.
        sums: Decoded, of all survivors.
        survivors: Their number.
        digest: SHA-256 of the adapter's file, which seeds the rotation of the sums.

    Returns:
        ``accuracy_newest``, ``examples_newest``, ``accuracy_previous`` and ``examples_previous``, and ``deviation``:
        the standard deviation of the noise in each of the four sums, in examples. A release with fewer than
        ``MINIMUM_HELD_OUT`` examples is missing.
    """
    counts = rotation.rotate_back(sums[COUNTS], rotation.seed(digest))
    found = {DEVIATION: spec.vector.segment(COUNTS).noise * math.sqrt(survivors)}
    for release, (right, examples) in ((NEWEST, counts[:2]), (PREVIOUS, counts[2:])):
        if examples < MINIMUM_HELD_OUT:
            continue
        accuracy = min(max(float(right / examples), 0.0), 1.0)
        found |= {f"{ACCURACY}_{release}": round(accuracy, DECIMALS), f"{EXAMPLES}_{release}": float(np.rint(examples))}
    return found


def is_evaluation(metrics: Mapping[str, float]) -> bool:
    """Whether metrics are those of ``evaluated``."""
    return DEVIATION in metrics


def renewed(tensors: Tensors, digest: bytes) -> Tensors:
    """The next adapter: the one before, with noise of ``RENEWAL`` in its head.

    Devices reveal shares for sums from one adapter over one set of survivors only, so each sum has an adapter of its
    own. The noise follows from the adapter alone: from noise that followed from the sums, anybody could find out four
    small numbers by trial.

    Args:
        tensors: Of the adapter of the round.
        digest: SHA-256 of its file.

    Returns:
        float32 tensors. Guarantee: equal arguments give equal bits on every machine; no weight exceeds ``LARGEST``.

    Raises:
        DataError: It has no classification head.
    """
    head = ClassifierHead.of(Layout.of(tensors))
    before = tensors[head.weight]
    key = hashlib.sha256(b"edgeadapt/evaluation/1\x00" + digest).digest()
    noise = dither(key, before.size).reshape(before.shape)
    weight = np.clip(before.astype(np.float64) + RENEWAL * noise, -LARGEST, LARGEST)
    return tensors | {head.weight: weight.astype(np.float32)}
