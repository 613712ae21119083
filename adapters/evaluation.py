"""A round of federated evaluation: how many held-out examples of the devices two releases answer rightly, as one sum.

Devices train nothing. Each runs the release that it has on its own held-out examples and contributes four counts: right
answers and examples under the newest release, and the same under the one before; two of them are zero. So the sums say
how good either release is, and not which device has which. A device with another release, or with too few examples,
contributes zeros.

The vector is masked, summed and accounted for as every other. What is published of the sums are ``evaluated``'s
metrics. The adapter of the round stays what it was, up to a noise that only gives it other bytes (``renewed``).
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
from adapters.task import DECIMALS, MINIMUM_HELD_OUT, Sums, decode_as, dither, require_exact
from aggregation import rotation
from aggregation.errors import DataError, ProtocolError
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec

COUNTS = "counts"  # the segment: right answers and examples of the newest release, then of the one before
SIZE = 4
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
        least: Fewest held-out examples of a device that contributes.
        most: Most held-out examples of a device that count: its first ones.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    peft_config: PeftConfig
    labels: tuple[str, ...]
    newest: Sha256
    previous: Sha256
    least: Annotated[int, Field(ge=1, le=2**16)]
    most: Annotated[int, Field(ge=1, le=2**16)]

    def encode(self) -> bytes:
        """JSON, the same bytes for equal tasks: ``EvaluationTask.decode(task.encode()) == task``."""
        return jsontext.encode(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read a task.

        Raises:
            ProtocolError: A field is missing, unknown or out of range, or no example could count.
        """
        found = decode_as(cls, raw)
        if found.least > found.most or found.newest == found.previous:
            raise ProtocolError("the task compares a release with itself, or on no example", about="task.newest")
        return found

    @property
    def norm(self) -> float:
        """Largest L2 norm of a contribution: all of ``most`` examples right."""
        return math.sqrt(2.0) * self.most


def counts_spec(
    task: EvaluationTask, *, clip_norm: float, noise: float, ring_bits: int, max_clients: int
) -> VectorSpec:
    """The sum of a round: the counts, exact without noise.

    Args:
        task: Of the round.
        clip_norm, noise: L2 bound on a contribution, and the standard deviation of one device's noise on each count, in
            examples; without noise (0) each count has the bound ``task.most``.
        ring_bits, max_clients: As of ``VectorSpec``.

    Raises:
        ConfigError: The ring cannot hold the sum of so many devices, or not count their examples one by one.
    """
    if noise:
        return noisy_spec(COUNTS, SIZE, clip_norm=clip_norm, noise=noise, ring_bits=ring_bits, max_clients=max_clients)
    return require_exact(VectorSpec((Segment(COUNTS, SIZE, float(task.most)),), ring_bits, max_clients), task.most)


def exact_ring_bits(task: EvaluationTask, max_clients: int) -> int:
    """The least ring in which the sums of all devices are exact."""
    return (task.most * max_clients).bit_length() + 1


def require_counts(spec: SessionSpec, sums: Sums, survivors: int) -> None:
    """Return if honest survivors can have these sums of a round without noise: else a device lied.

    Counts are whole numbers, no release has more right answers than examples, and both together have at most as many
    examples as the bound allows to each survivor, because a device has one release.

    Raises:
        DataError: They cannot have them. The text names no number of the sum, because it is published.
    """
    right, examples, right_before, examples_before = sums[COUNTS]
    most = spec.vector.segment(COUNTS).bound * survivors
    whole = bool((sums[COUNTS] == np.rint(sums[COUNTS])).all())
    if not (whole and 0 <= right <= examples and 0 <= right_before <= examples_before):
        raise DataError("the counts of the survivors are not those of answers and examples", about="vector.counts")
    if examples + examples_before > most:
        raise DataError("the survivors count more examples than each may have", about="vector.counts")


def evaluated(spec: SessionSpec, sums: Sums, survivors: int, digest: bytes) -> dict[str, float]:
    """The metrics of a round, as they are published.

    With noise they are the sums themselves, and ``deviation``. Without noise an exact count, published with the names
    of the survivors, would be an equation of single devices' counts (``task.metrics_of``): accuracies are published to
    ``DECIMALS``, and instead of the number of examples the greatest power of two that is not above it.

    Args:
        spec: Of the session.
        sums: Decoded, of all survivors.
        survivors: Their number.
        digest: SHA-256 of the adapter's file, which seeds the rotation of sums with noise.

    Returns:
        ``accuracy_newest``, ``examples_newest``, ``accuracy_previous`` and ``examples_previous``, and ``deviation``:
        the standard deviation of the noise in each of the four sums, in examples, 0 without noise. A release with fewer
        than ``MINIMUM_HELD_OUT`` examples is missing.
    """
    counts, deviation = sums[COUNTS], 0.0
    if spec.privacy is not None:
        counts = rotation.rotate_back(counts, rotation.seed(digest))
        deviation = spec.vector.segment(COUNTS).noise * math.sqrt(survivors)
    found = {DEVIATION: deviation}
    for release, (right, examples) in ((NEWEST, counts[:2]), (PREVIOUS, counts[2:])):
        if examples < MINIMUM_HELD_OUT:
            continue
        published = float(np.rint(examples)) if deviation else 2.0 ** (math.frexp(float(examples))[1] - 1)
        accuracy = min(max(float(right / examples), 0.0), 1.0)
        found |= {f"{ACCURACY}_{release}": round(accuracy, DECIMALS), f"{EXAMPLES}_{release}": published}
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
