"""A round of the analytic head: every device's moments in one secure sum, and the head that a ridge regression fits.

Devices embed their examples and train nothing. The coordinator computes the head of the next adapter from the sum, and
its auditor does so again; LoRA's factors stay as they are. On the frozen base of day one this is a federation of one
round; after rounds of training, it fits the head to the adapted embeddings.

The sum itself is not published. Only the next adapter is, whose head a device can adapt to its own examples by the
same regression (``ridge.ridge``), without the moments of others.
"""

import math
from dataclasses import asdict, dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
from pydantic import ConfigDict, Field

from adapters import jsontext
from adapters.layout import Layout, Tensors
from adapters.peftconfig import PeftConfig
from adapters.ridge import EmbeddingMoments, cholesky, forward, packed_size, ridge, unpack
from adapters.task import NORM_ERROR, Sums, decode_as, dither, metric_segments, noise_key, require_exact, require_weight
from aggregation.errors import DataError
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec

XX, XY = "xx", "xy"  # segments
RING_BITS = 22  # unless a coordinator sets other ones; with 18 the demo's accuracy is lower (``analytic-head.md``)
WEIGHT = "classifier.weight"  # ends the name of the head's matrix, shape (labels, hidden)
BIAS = "classifier.bias"  # shape (labels,)

MINIMUM_EXAMPLES = 100  # of a sum, for its head to be published; see ``fewest_examples``
NOISE = 2.0**-10  # width of the noise in the head, in units of the regression's scores, which are about 0 to 1
LARGEST = 512.0  # of a weight, as of every number that the server's step makes (``coordinator.optimizer``)


@dataclass(frozen=True, slots=True)
class AnalyticTask:
    """One round of the analytic head, the same for every device of the cohort.

    Args:
        peft_config: Of the adapter with which devices embed.
        labels: Of the head.
        ridge: Strength of the regularization, for each example of the sum.
        scale: Logit of a score of 1: the regression fits scores of 0 and 1.
        dimensions: Coordinates of an embedding whose moments are summed with noise (``noisyhead``); 0: no noise, and
            all of them.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    peft_config: PeftConfig
    labels: tuple[str, ...]
    ridge: Annotated[float, Field(gt=0, le=1)]
    scale: Annotated[float, Field(gt=0, le=1000)]
    dimensions: Annotated[int, Field(ge=0, le=2**16)] = 0

    def encode(self) -> bytes:
        """JSON, the same bytes for equal tasks: ``AnalyticTask.decode(task.encode()) == task``."""
        return jsontext.encode(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> Self:
        """Read a task.

        Raises:
            ProtocolError: A field is missing, unknown or out of range.
        """
        return decode_as(cls, raw)


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """The head of a text classifier's adapter: the names of its tensors, and its sizes."""

    weight: str
    bias: str
    labels: int
    hidden: int

    @classmethod
    def of(cls, layout: Layout) -> Self:
        """The head in a layout.

        Raises:
            DataError: It has none, or more than one.
        """
        found = {end: [s for s in layout.tensors if s.name.endswith(end)] for end in (WEIGHT, BIAS)}
        match found[WEIGHT], found[BIAS]:
            case [weight], [bias] if len(weight.shape) == 2 and bias.shape == weight.shape[:1]:
                return cls(weight.name, bias.name, *weight.shape)
        raise DataError("the adapter has no classification head, so no analytic one can be fitted", about="task.head")


def moment_spec(head: ClassifierHead, *, weight_cap: int, ring_bits: int, max_clients: int) -> VectorSpec:
    """The sums of a round: the moments, the weights and the metrics, each with its own bound.

    Embeddings have norm 1, so that an entry of a device's moments is at most its number of examples, ``weight_cap`` at
    most. ``correct``, ``loss`` and ``held_out`` are as in a round of training.

    Raises:
        ConfigError: As ``task.require_exact`` and ``VectorSpec``.
    """
    segments = (
        Segment(XX, packed_size(head.hidden), float(weight_cap)),
        Segment(XY, head.hidden * head.labels, float(weight_cap)),
        *metric_segments(weight_cap),
    )
    return require_exact(VectorSpec(segments, ring_bits, max_clients), weight_cap)


def require_moments(spec: SessionSpec, sums: Sums, survivors: int) -> None:
    """Return if honest survivors can have these sums of a round: else a device lied. Which one, nobody can tell.

    With W the total weight, n survivors, d numbers in an embedding, k labels, and s the step of the moments, honest
    survivors have S = Σ x xᵀ + E and T = Σ x yᵀ + F, in which stochastic rounding leaves entries below n · s:

    - W is a whole number between 0 and ``weight_cap * n``. If W = 0, so are S and T.
    - The trace of S is at most W + n · s · d, because an embedding has norm 1.
    - S + ε · I is positive definite for ε = 2 · n · s · d: no eigenvalue of E is below - n · s · d.
    - ‖L⁻¹ T‖ ≤ √W + √(n · s · k), L Lᵀ = S + ε · I. No head has a squared error below 0: tr(T₀ᵀ S₀⁻¹ T₀) ≤ W.

    Guarantee: no sum of honest contributions is refused. So whoever lied, the sum is as that of W examples with some
    embeddings and real-valued labels, up to rounding.

    Args:
        spec: Of the session.
        sums: Decoded.
        survivors: Their number.

    Raises:
        DataError: Honest survivors cannot have it. The text names no number of the sum, because it is published.
    """
    names, sizes = zip(*((segment.name, segment.size) for segment in spec.vector.segments), strict=True)
    expected = (XX, XY, *(segment.name for segment in metric_segments(spec.weight_cap)))
    if names != expected or packed_size(_dimension(sizes[0])) != sizes[0] or sizes[1] % _dimension(sizes[0]):
        raise DataError("the sums are not those of an analytic head", about="vector.segments")
    step = spec.vector.step(spec.vector.segments[0])
    weight, found = require_weight(spec, sums, survivors), _moments(sums)
    if not weight:
        if found.xx.any() or found.xy.any():
            raise DataError("the survivors have no examples, but moments of some", about="vector.xx")
        return
    d, k = found.xy.shape
    slack = survivors * step * d
    if not float(np.trace(found.xx)) <= (weight + slack) * (1 + NORM_ERROR):
        raise DataError("the embeddings of the survivors are longer than 1", about="vector.xx")
    lower = cholesky(found.xx, 2 * slack)
    if lower is None:
        raise DataError("the second moments of the survivors are not those of embeddings", about="vector.xx")
    longest = math.sqrt(weight) + math.sqrt(survivors * step * k)
    if not float(np.linalg.norm(forward(lower, found.xy))) <= longest * (1 + NORM_ERROR):
        raise DataError("the moments of the survivors' labels are larger than labels allow", about="vector.xy")


def solved(
    spec: SessionSpec, task: AnalyticTask, tensors: Tensors, sums: Sums, survivors: int, digest: bytes
) -> Tensors:
    """The next adapter: the one before with the head that the sum gives.

    ``refit`` computes it, with the task's ``ridge`` times the total weight W as strength. If W is below
    ``fewest_examples``, the head stays.

    A total of examples shows in no period here: no constant is among the features, the products with which would be
    whole numbers over W. Small noise is added (``NOISE``, ``task.dither``). It makes sure that the next adapter has
    other bytes than the one before also if nobody has examples: devices reveal shares for a few sums from an adapter.

    Args:
        spec, sums, survivors: As of ``require_moments``.
        task: Of the round's plan.
        tensors: Of the adapter with which devices embedded.
        digest: SHA-256 of its file.

    Returns:
        float32 tensors. Guarantee: equal arguments give equal bits on every machine; no weight exceeds ``LARGEST``.

    Raises:
        DataError: As ``require_moments`` and ``ClassifierHead.of``.
    """
    require_moments(spec, sums, survivors)
    head, found = ClassifierHead.of(Layout.of(tensors)), _moments(sums)
    if found.xy.shape != (head.hidden, head.labels):
        raise DataError("the sums are not those of this adapter's head", about="vector.segments")
    if found.weight >= fewest_examples(head.labels):
        tensors = refit(tensors, found, strength=task.ridge * found.weight, scale=task.scale)
    return dithered(spec, task, tensors, sums, digest)


def dithered(spec: SessionSpec, task: AnalyticTask, tensors: Tensors, sums: Sums, digest: bytes) -> Tensors:
    """An adapter with small noise in its head, as ``solved`` says."""
    head = ClassifierHead.of(Layout.of(tensors))
    before = tensors[head.weight]
    noise = dither(noise_key(spec, sums, digest), before.size).reshape(before.shape)
    weight = np.clip(before.astype(np.float64) + task.scale * NOISE * noise, -LARGEST, LARGEST)
    return tensors | {head.weight: weight.astype(np.float32)}


def fewest_examples(labels: int) -> int:
    """Fewest examples of a sum whose head is published.

    The head of W examples has as many directions that the one before lacks, up to the number of labels: fewer would be
    counted. And the fewer they are, the more these directions are single embeddings.
    """
    return max(MINIMUM_EXAMPLES, labels)


def refit(tensors: Tensors, found: EmbeddingMoments, *, strength: float, scale: float) -> Tensors:
    """An adapter with another head: the one that fits some examples and stays near the one before.

    With H₀ the head before, b its bias, both divided by ``scale``, the new weights H minimize
    Σ ‖xᵀ H + b - y‖² + strength · ‖H - H₀‖². The bias stays.

    Args:
        tensors: Of the adapter.
        found: EmbeddingMoments of examples that were embedded with it.
        strength: As many examples as the head before counts for in each direction; above 0.
        scale: Logit of a score of 1.

    Returns:
        float32 tensors. Guarantee: as of ``ridge.ridge``; no weight exceeds ``LARGEST``.

    Raises:
        DataError: As ``ridge.ridge`` and ``ClassifierHead.of``.
    """
    head = ClassifierHead.of(Layout.of(tensors))
    before, bias = tensors[head.weight].T.astype(np.float64) / scale, tensors[head.bias].astype(np.float64) / scale
    total = np.zeros(len(found.xy))  # Σ x, added up in a fixed order, which ``numpy.sum`` does not promise
    for column in found.xy.T:
        total += column
    rest = EmbeddingMoments(found.xx, found.xy - total[:, None] * bias, found.weight)
    weight = np.clip(scale * ridge(rest, before, strength).T, -LARGEST, LARGEST)
    return tensors | {head.weight: np.ascontiguousarray(weight, np.float32)}


def _moments(sums: Sums) -> EmbeddingMoments:
    d = _dimension(sums[XX].size)
    return EmbeddingMoments(unpack(sums[XX], d), sums[XY].reshape(d, -1), float(sums["weight"][0]))


def _dimension(size: int) -> int:
    return (math.isqrt(8 * size + 1) - 1) // 2
