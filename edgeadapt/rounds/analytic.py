"""A round of the analytic head: every device's moments in one secure sum, and the head that a ridge regression fits.

Devices embed their examples and train nothing. The coordinator computes the head of the next adapter from the sum, and
its auditor does so again; LoRA's factors stay. The sum itself is not published, only the next adapter, whose head a
device can adapt to its own examples by the same regression (``ridge.ridge``).

With noise a device contributes less, what the adapter on offer gets wrong: the mean over its examples of
z (y - p)ᵀ, clipped in L2, with p the adapter's own probabilities. Without second moments, and of what is right already
next to nothing, it is short beside the noise, and its numbers are few. z is x in the space in which texts are spread
evenly: z = L⁻¹ x with L Lᵀ = Σ + ``FLOOR`` · I, and Σ taken from the head on offer, which everybody has (``spread``).
So noise is as large in each direction as texts are. The next head is one Newton step away from the one on offer, in
the same Σ, and as short as the noise demands (``noisy_solved``). ``docs/decisions/0038-privacy-of-a-session.md``
says why. The vector is Σ z (y - p)ᵀ, row by row."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from aggregation import rotation
from aggregation.errors import DataError
from aggregation.ring import Ring
from aggregation.spec import SessionSpec
from aggregation.vector import Segment, VectorSpec
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import Part
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.ridge import (
    QUARTERS,
    EmbeddingMoments,
    Matrix,
    Vector,
    cholesky,
    cross_validated,
    forward,
    moments_of,
    multiplied,
    pack,
    packed_size,
    ridge,
    solve,
    traces_of_inverse,
    unit_rows,
    unpack,
)
from edgeadapt.rounds.roundtask import DeviceRound, KindSettings, RoundOf, RoundTask, ServerStep, SummedRound, noisy
from edgeadapt.rounds.sums import (
    NORM_ERROR,
    Bounds,
    HeldOut,
    Sums,
    check_noisy,
    counted,
    dither,
    metric_segments,
    noise_key,
    require_exact,
    require_weight,
)

XX, XY = "xx", "xy"  # segments without noise
CORRECTIONS = "corrections"  # the segment with noise
RING_BITS = 22  # with 18 the demo's accuracy is lower (``analytic-head.md``)
WEIGHT = "classifier.weight"  # ends the name of the head's matrix, shape (labels, hidden)
BIAS = "classifier.bias"  # shape (labels,)

MINIMUM_EXAMPLES = 100  # see ``fewest_examples``
NOISE = 2.0**-10  # width of the noise in the head, in units of the regression's scores, which are about 0 to 1
LARGEST = optimizer.LARGEST  # of a weight
EVEN = 0.3  # share of the spread of texts that the head on offer does not show (``spread``)
FLOOR = 0.003  # added to it: directions in which there are hardly texts are not made long
CALM = 0.05  # standard deviation of the noise in a score of the next head, of about 0 to 1, at most
LEAST_DAMPING = 0.001  # of the Newton step, relative to an example


def _strength(value: Any, validated: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validated(value)
    except ValidationError:  # of each alternative
        raise ValueError('it is neither "gcv" nor a number above 0 and at most 1') from None


Ridge = Annotated[  # gcv: ``ridge.cross_validated`` chooses it
    Annotated[float, Field(gt=0, le=1)] | Literal["gcv"], WrapValidator(_strength)
]
# Dampings to choose from, in quarter decades up to 1e4, which leaves a head as it is.
_STEPS = sorted(quarter * float(10**k) for k in range(8) for quarter in QUARTERS)
DAMPINGS = tuple(LEAST_DAMPING * step for step in _STEPS if step >= 1)
Scale = Annotated[float, Field(gt=0, le=1000)]


@dataclass(frozen=True, slots=True)
class AnalyticTask(RoundTask):
    """Configures a round of the analytic head."""

    RULE: ClassVar[optimizer.ServerOptimizer | None] = optimizer.AnalyticHead()
    SEGMENT: ClassVar[str] = CORRECTIONS
    EXACT_SEGMENT: ClassVar[str | None] = XX
    EXACT: ClassVar[str | None] = "moments"
    CONSENT: ClassVar[str] = "moments"
    NEED_NO_LIMIT: ClassVar[dict[str, str]] = {
        "ridge": "used by the coordinator, on the sum: no contribution depends on it",
        "scale": "used by the coordinator, on the sum: no contribution depends on it",
    }

    peft_config: PeftConfig
    labels: tuple[str, ...]
    ridge: Ridge  # strength of the regularization, for each example of the sum
    scale: Scale  # logit of a score of 1: the regression fits scores of 0 and 1

    def terms(self) -> dict[str, float | str]:
        return {f"analytic.{name}": getattr(self, name) for name in ("ridge", "scale")}

    def influencing(self) -> frozenset[Part]:
        """Leave out the head: moments do not depend on it. With noise a contribution does, and epsilon bounds it."""
        return frozenset(Part) - {Part.HEAD}

    def noisy_size(self, layout: Layout) -> int:
        head = ClassifierHead.of(layout)
        return head.hidden * head.labels

    def exact_vector(self, layout: Layout, bounds: Bounds) -> VectorSpec:
        return moment_spec(ClassifierHead.of(layout), bounds)

    def exact_ring_bits(self, layout: Layout, bounds: Bounds) -> int:
        return RING_BITS

    @classmethod
    def check_exact(cls, spec: SessionSpec, values: Sums, survivors: int) -> None:
        require_moments(spec, values, survivors)

    def contribute(self, device: DeviceRound) -> Ring:
        head, spec = ClassifierHead.of(device.layout), device.spec

        def corrections() -> Vector:
            return contributed(device.embedded(), device.labels(), device.start)

        def embedded() -> Ring:
            moments = moments_of(device.embedded(), device.labels(), head.labels)
            return moment_contribution(moments, device.scored(), spec, device.rounding)

        def nothing() -> Ring:
            labels = device.labels()
            moments = moments_of(np.zeros((len(labels), head.hidden)), labels, head.labels)
            return moment_contribution(moments, device.unscored(), spec, device.rounding)

        if spec.privacy is None:
            return device.attempt(embedded, nothing)
        return noisy(device, corrections, lambda: np.zeros(spec.vector.size))

    def next_adapter(self, summed: SummedRound, step: ServerStep) -> tuple[optimizer.State, Tensors]:
        if len(summed.groups) != 1:
            raise DataError("an analytic head is solved from one sum, and the session has groups", about="task.ridge")
        solve, (total,) = solved if summed.spec.privacy is None else noisy_solved, summed.groups
        tensors = solve(summed.spec, self, summed.tensors, total.values, len(total.survivors), summed.digest)
        return step.state, tensors


class Analytic(KindSettings):
    """Rounds of the analytic head, at the end of a federation or alone."""

    KIND: ClassVar[type[RoundTask]] = AnalyticTask

    rounds: int = Field(default=0, ge=0)
    """how many of the rounds, the last ones, fit the head by a ridge regression to a sum over all devices' embeddings,
    without training"""
    ridge: Ridge = "gcv"
    """strength of the regularization, for each example of the sum, or gcv, which chooses it by generalized
    cross-validation from the sum alone (with noise, the least one that keeps the noise in a score below 0.05)"""
    scale: Scale = 8.0
    """logit of a score of 1 of the regression"""
    clip_norm: float = Field(default=1.0, gt=0)
    """with noise: largest L2 norm of what a device's examples change"""

    def task(self, of: RoundOf) -> AnalyticTask:
        return AnalyticTask(of.peft_config, of.labels, self.ridge, self.scale)

    def bound(self, clip_norm: float, noisy: bool) -> float:
        return self.clip_norm if noisy else clip_norm


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    weight: str
    bias: str
    labels: int
    hidden: int

    @classmethod
    def of(cls, layout: Layout) -> Self:
        """Find the head in a layout. Raises DataError if it has none, or more than one."""
        tensors = {end: [s for s in layout.tensors if s.name.endswith(end)] for end in (WEIGHT, BIAS)}
        match tensors[WEIGHT], tensors[BIAS]:
            case [weight], [bias] if len(weight.shape) == 2 and bias.shape == weight.shape[:1]:
                return cls(weight.name, bias.name, *weight.shape)
        raise DataError("the adapter has no classification head, so no analytic one can be fitted", about="task.head")


def moment_spec(head: ClassifierHead, bounds: Bounds) -> VectorSpec:
    """Return the sums of a round: the moments, the weights and the metrics, each with its own bound.

    Embeddings have norm 1, so an entry of a device's moments is at most its number of examples, at most ``weight_cap``.
    ``correct``, ``loss`` and ``held_out`` are as in a round of training. Raises ConfigError as ``sums.require_exact``
    and ``VectorSpec``."""
    cap = bounds.weight_cap
    moments = (Segment(XX, packed_size(head.hidden), float(cap)), Segment(XY, head.hidden * head.labels, float(cap)))
    return require_exact(VectorSpec((*moments, *metric_segments(cap)), bounds.ring_bits, bounds.max_clients), cap)


def moment_contribution(
    moments: EmbeddingMoments, held_out: HeldOut, spec: SessionSpec, rng: np.random.Generator
) -> Ring:
    """Encode a device's moments as the vector that is masked and summed.

    Moments of more than ``spec.weight_cap`` training examples are scaled down to it; ``held_out`` is the score of the
    received adapter.

    Returns:
        Ring elements, shape ``(spec.vector.size,)``, in the segments of ``moment_spec``. Guarantee:
        each value is off by less than one step of its segment, without bias.

    Raises DataError: a number is not finite, or a metric is outside its bound."""
    weight = min(moments.weight, float(spec.weight_cap))
    share = weight / moments.weight if moments.weight else 0.0
    values = {
        "xx": np.clip(pack(moments.xx) * share, -weight, weight),
        "xy": np.clip(moments.xy.ravel() * share, -weight, weight),
    }
    return spec.vector.encode(values | counted(weight, held_out), rng)


def spread(weight: NDArray[np.floating]) -> Matrix:
    """Estimate how texts are spread, the mean of x xᵀ over their unit embeddings x, from a head, shape ``(k, d)``:
    Σ = (1 - ``EVEN``) · mean of r rᵀ + ``EVEN`` / d · I over the rows r of the head, each of norm 1, or of zeros.

    The row of a label points to where its texts are: in the head that a federation begins with, from public phrases of
    each label, and near it in later ones. Nothing private is in it, and everybody has it. Returns shape ``(d, d)``.
    Guarantee: equal arguments give equal bits on every machine."""
    k, d = weight.shape
    total = np.zeros((d, d))
    for row in weight.astype(np.float64):
        length = math.sqrt(float(np.add.accumulate(row * row)[-1]))
        direction = row / (length or 1.0)
        total += direction[:, None] * direction[None, :]
    total *= (1 - EVEN) / k
    total[np.diag_indices(d)] += EVEN / d
    return total


def whitening(covariance: Matrix) -> Matrix:
    """Return L with L Lᵀ = Σ + ``FLOOR`` · I. Raises DataError: Σ is not positive definite, or not finite."""
    if (lower := cholesky(covariance, FLOOR)) is None:
        raise DataError("the head on offer shows no spread of texts", about=WEIGHT)
    return lower


def contributed(embeddings: NDArray[np.floating], labels: NDArray[np.integer], tensors: Tensors) -> Vector:
    """Compute what one device contributes with noise, before it is clipped: mean of z (y - p)ᵀ, row by row, shape
    ``(hidden · labels,)``; zeros without examples. ``embeddings``: shape ``(n, hidden)``, with the adapter on offer,
    ``tensors``. Raises DataError: a number is not finite."""
    head = ClassifierHead.of(Layout.of(tensors))
    weight, bias = tensors[head.weight].astype(np.float64), tensors[head.bias].astype(np.float64)
    rows = unit_rows(embeddings).reshape(len(embeddings), head.hidden)
    logits = rows @ weight.T + bias
    likely = np.exp(logits - logits.max(axis=1, keepdims=True))
    wrong = -likely / likely.sum(axis=1, keepdims=True)
    wrong[np.arange(len(rows)), labels] += 1.0
    mean = rows.T @ wrong / max(1, len(rows))
    return forward(whitening(spread(weight)), mean).ravel()


def require_moments(spec: SessionSpec, sums: Sums, survivors: int) -> None:
    """Check that honest survivors can have these sums of a round: else some device lied.

    With W the total weight, n survivors, d numbers in an embedding, k labels, and s the step of the moments, honest
    survivors have S = Σ x xᵀ + E and T = Σ x yᵀ + F, in which stochastic rounding leaves entries below n · s:

    - W is a whole number between 0 and ``weight_cap * n``. If W = 0, so are S and T.
    - The trace of S is at most W + n · s · d, because an embedding has norm 1.
    - S + ε · I is positive definite for ε = 2 · n · s · d: no eigenvalue of E is below - n · s · d.
    - ‖L⁻¹ T‖ ≤ √W + √(n · s · k), L Lᵀ = S + ε · I. No head has a squared error below 0: tr(T₀ᵀ S₀⁻¹ T₀) ≤ W.

    Guarantee: no sum of honest contributions is refused. A sum that passes is that of W examples with some embeddings
    and real-valued labels, up to rounding.

    Raises DataError: honest survivors cannot have it. The text names no number of the sum, because it is published."""
    names, sizes = zip(*((segment.name, segment.size) for segment in spec.vector.segments), strict=True)
    expected = (XX, XY, *(segment.name for segment in metric_segments(spec.weight_cap)))
    if names != expected or packed_size(_dimension(sizes[0])) != sizes[0] or sizes[1] % _dimension(sizes[0]):
        raise DataError("the sums are not those of an analytic head", about="vector.segments")
    step = spec.vector.step(spec.vector.segments[0])
    weight, moments = require_weight(spec, sums, survivors), _moments(sums)
    if not weight:
        if moments.xx.any() or moments.xy.any():
            raise DataError("the survivors have no examples, but moments of some", about="vector.xx")
        return
    d, k = moments.xy.shape
    slack = survivors * step * d
    if not float(np.trace(moments.xx)) <= (weight + slack) * (1 + NORM_ERROR):
        raise DataError("the embeddings of the survivors are longer than 1", about="vector.xx")
    lower = cholesky(moments.xx, 2 * slack)
    if lower is None:
        raise DataError("the second moments of the survivors are not those of embeddings", about="vector.xx")
    longest = math.sqrt(weight) + math.sqrt(survivors * step * k)
    if not float(np.linalg.norm(forward(lower, moments.xy))) <= longest * (1 + NORM_ERROR):
        raise DataError("the moments of the survivors' labels are larger than labels allow", about="vector.xy")


def solved(
    spec: SessionSpec, task: AnalyticTask, tensors: Tensors, sums: Sums, survivors: int, digest: bytes
) -> Tensors:
    """Return the next adapter: the previous one with the head that the sum gives.

    ``refit`` computes it, with the task's ``ridge`` times the total weight W as strength, or with the one that
    ``cross_validated`` chooses. If W is below
    ``fewest_examples``, the head stays. No constant is among the features, whose products would be whole numbers over W
    and would show W. Small noise (``NOISE``, ``sums.dither``) gives the next adapter other bytes even without examples:
    devices reveal shares for a few sums from one adapter only.

    Returns:
        float32 tensors. Guarantee: equal arguments give equal bits on every machine; no weight exceeds ``LARGEST``.

    ``digest``: SHA-256 of the adapter's file. Raises DataError as ``require_moments`` and ``ClassifierHead.of``."""
    require_moments(spec, sums, survivors)
    head, moments = ClassifierHead.of(Layout.of(tensors)), _moments(sums)
    if moments.xy.shape != (head.hidden, head.labels):
        raise DataError("the sums are not those of this adapter's head", about="vector.segments")
    if moments.weight >= fewest_examples(head.labels):
        strength = None if isinstance(task.ridge, str) else task.ridge * moments.weight
        tensors = refit(tensors, moments, strength=strength, scale=task.scale)
    return dithered(spec, task, tensors, sums, digest)


def noisy_solved(
    spec: SessionSpec, task: AnalyticTask, tensors: Tensors, sums: Sums, survivors: int, digest: bytes
) -> Tensors:
    """Return the next adapter: the previous one with its head one Newton step further.

    With G the mean of the contributions of n survivors, shape ``(d, k)``, and Σ and L as on the devices (``spread``,
    ``whitening``), L G is the mean of x (y - p)ᵀ, and the head H moves by ``task.scale`` · (Σ + ρ I)⁻¹ L G. The damping
    ρ is the least with which the noise in a score of a text is calm (``damping``): the less a sum says, the nearer the
    head stays to the previous one, and to that itself where a sum says nothing. A number as ``task.ridge`` is the least
    damping.

    Arguments are those of ``sums.check_noisy``, and the SHA-256 of the adapter's file; guarantees those of ``solved``.

    Raises DataError as ``sums.check_noisy`` and ``ClassifierHead.of``, or the sum has another size."""
    check_noisy(spec, sums, survivors)
    head = ClassifierHead.of(Layout.of(tensors))
    (segment,) = spec.vector.segments
    vector, weight = sums[segment.name], tensors[head.weight].astype(np.float64)
    if vector.shape != (weight.size,):
        raise DataError("the sums are not those of this adapter's head", about="vector.segments")
    covariance = spread(weight)
    mean = rotation.rotate_back(vector, rotation.seed(digest)).reshape(head.hidden, head.labels) / survivors
    least = LEAST_DAMPING if isinstance(task.ridge, str) else task.ridge
    chosen = max(least, damping(covariance, segment.noise / math.sqrt(survivors)))
    if (lower := cholesky(covariance, chosen)) is None:
        raise DataError("the head on offer shows no spread of texts", about=WEIGHT)
    moved = weight + task.scale * solve(lower, multiplied(whitening(covariance), mean)).T
    fitted = np.ascontiguousarray(np.clip(moved, -LARGEST, LARGEST), np.float32)
    return dithered(spec, task, tensors | {head.weight: fitted}, sums, digest)


def damping(covariance: Matrix, noise: float) -> float:
    """Choose the damping ρ of a step from the standard deviation of the noise in each number of the mean G.

    The noise in a score xᵀ (Σ + ρ I)⁻¹ L G of a text has the variance noise² · tr((Σ + ρ)⁻¹ Σ (Σ + ρ)⁻¹ (Σ + f)), f =
    ``FLOOR``, on average over texts that are spread as Σ. With M = Σ + ρ I that trace is
    d - (2 ρ - f) tr M⁻¹ + ρ (ρ - f) tr M⁻². It falls with ρ: the least of ``DAMPINGS`` is chosen with which the noise
    is at most ``CALM``, or the largest. Guarantee: equal arguments give equal bits on every machine."""
    low, high = 0, len(DAMPINGS) - 1
    while low < high:
        middle = (low + high) // 2
        rho = DAMPINGS[middle]
        lower = cholesky(covariance, rho)
        once, twice = traces_of_inverse(lower) if lower is not None else (math.nan, math.nan)
        trace = len(covariance) - (2 * rho - FLOOR) * once + rho * (rho - FLOOR) * twice
        if noise * noise * trace <= CALM * CALM:
            high = middle
        else:
            low = middle + 1
    return DAMPINGS[low]


def dithered(spec: SessionSpec, task: AnalyticTask, tensors: Tensors, sums: Sums, digest: bytes) -> Tensors:
    head = ClassifierHead.of(Layout.of(tensors))
    before = tensors[head.weight]
    noise = dither(noise_key(spec, sums, digest), before.size).reshape(before.shape)
    weight = np.clip(before.astype(np.float64) + task.scale * NOISE * noise, -LARGEST, LARGEST)
    return tensors | {head.weight: weight.astype(np.float32)}


def fewest_examples(labels: int) -> int:
    """Return the fewest examples of a sum whose head is published. The head of W examples has as many directions that
    the previous one lacks, up to the number of labels: fewer would be counted, and are closer to single embeddings."""
    return max(MINIMUM_EXAMPLES, labels)


def refit(tensors: Tensors, moments: EmbeddingMoments, *, strength: float | None, scale: float) -> Tensors:
    """Replace an adapter's head by one that fits some examples and stays near the previous one.

    With H₀ the previous head, b its bias, both divided by ``scale``, the new weights H minimize
    Σ ‖xᵀ H + b - y‖² + strength · ‖H - H₀‖². The bias stays.

    Args:
        strength: As many examples as the previous head counts for in each direction; above 0. None: the one that
            ``cross_validated`` chooses.
        scale: Logit of a score of 1.

    Returns:
        float32 tensors, with the guarantee of ``ridge.ridge``; no weight exceeds ``LARGEST``.

    Raises DataError as ``ridge.ridge`` and ``ClassifierHead.of``."""
    head = ClassifierHead.of(Layout.of(tensors))
    before, bias = tensors[head.weight].T.astype(np.float64) / scale, tensors[head.bias].astype(np.float64) / scale
    total = np.zeros(len(moments.xy))  # Σ x, added up in a fixed order, which ``numpy.sum`` does not promise
    for column in moments.xy.T:
        total += column
    rest = EmbeddingMoments(moments.xx, moments.xy - total[:, None] * bias, moments.weight)
    if strength is None:
        strength = cross_validated(moments)
    weight = np.clip(scale * ridge(rest, before, strength).T, -LARGEST, LARGEST)
    return tensors | {head.weight: np.ascontiguousarray(weight, np.float32)}


def _moments(sums: Sums) -> EmbeddingMoments:
    d = _dimension(sums[XX].size)
    return EmbeddingMoments(unpack(sums[XX], d), sums[XY].reshape(d, -1), float(sums["weight"][0]))


def _dimension(size: int) -> int:
    return (math.isqrt(8 * size + 1) - 1) // 2
