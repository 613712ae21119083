"""The kinds of task that a plan can carry: training an adapter (``task``), fitting its head (``analytic``), and
counting the right answers of two releases (``evaluation``).

What every round needs of its task, whichever kind it is: to be read from the plan, the layout of the sums, and the
check that honest devices can have them.
"""

import json
from typing import TypeAlias

from adapters import analytic, evaluation, noisyhead, noisysum, task
from adapters.analytic import AnalyticTask, ClassifierHead
from adapters.evaluation import EvaluationTask
from adapters.layout import Layout
from adapters.noisysum import noisy_spec
from adapters.task import Sums, Task, contribution_spec, shared_layout
from aggregation.errors import ConfigError
from aggregation.spec import COUNTS, SessionSpec
from aggregation.vector import VectorSpec

AnyTask: TypeAlias = Task | AnalyticTask | EvaluationTask


def decode(raw: bytes) -> AnyTask:
    """Read the task of a plan. Law: ``decode(t.encode()) == t``.

    Raises:
        ProtocolError: It is of no kind, or a field is missing, unknown or out of range.
    """
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError):
        fields = None  # refused below
    names = fields if isinstance(fields, dict) else {}
    if "ridge" in names:
        return AnalyticTask.decode(raw)
    return EvaluationTask.decode(raw) if "newest" in names else Task.decode(raw)


def vector_spec(
    given: AnyTask,
    layout: Layout,
    *,
    clip_norm: float,
    weight_cap: int,
    ring_bits: int,
    max_clients: int,
    noise: float = 0.0,
) -> VectorSpec:
    """The sums of one round of a task.

    Args:
        given: The task.
        layout: Of the adapter.
        clip_norm: L2 bound on a device's update, in weight units, on its counts, or with noise on its moments, which
            without noise have bounds of their own.
        weight_cap: Largest weight of one device, in examples.
        ring_bits: Width of an element.
        max_clients: Largest number of contributions in one sum.
        noise: Standard deviation of the noise of one device on each number, in weight units; 0: none.

    Raises:
        ConfigError: The ring cannot hold the sums, or cannot count examples one by one; or the task of an analytic head
            names dimensions and there is no noise, or the other way round, or is an evaluation without noise.
        DataError: The adapter has none of the parts that the task shares, or no head.
    """
    if isinstance(given, AnalyticTask):
        if bool(noise) != bool(given.dimensions):
            text = f"an analytic head of {given.dimensions} dimensions does not go with noise of {noise:g}"
            raise ConfigError(text, about="task.dimensions", value=given.dimensions)
        head = ClassifierHead.of(layout)
        if noise:
            size, bounds = noisyhead.moments_size(head, given), {"ring_bits": ring_bits, "max_clients": max_clients}
            return noisy_spec(noisyhead.MOMENTS, size, clip_norm=clip_norm, noise=noise, **bounds)
        return analytic.moment_spec(head, weight_cap=weight_cap, ring_bits=ring_bits, max_clients=max_clients)
    if isinstance(given, EvaluationTask):
        return evaluation.counts_spec(clip_norm=clip_norm, noise=noise, ring_bits=ring_bits, max_clients=max_clients)
    return updates_spec(
        shared_layout(layout, given),
        clip_norm=clip_norm,
        weight_cap=weight_cap,
        ring_bits=ring_bits,
        max_clients=max_clients,
        noise=noise,
    )


def updates_spec(
    layout: Layout, *, clip_norm: float, weight_cap: int, ring_bits: int, max_clients: int, noise: float = 0.0
) -> VectorSpec:
    """The sums of one round of training. ``layout``: of the shared tensors; the others as of ``vector_spec``.

    Raises:
        ConfigError: The ring cannot hold the sums, or cannot count examples one by one.
    """
    if noise:
        bounds = {"ring_bits": ring_bits, "max_clients": max_clients}
        return noisy_spec("delta", layout.size, clip_norm=clip_norm, noise=noise, **bounds)
    return contribution_spec(
        layout, clip_norm=clip_norm, weight_cap=weight_cap, ring_bits=ring_bits, max_clients=max_clients
    )


def least_ring_bits(
    given: AnyTask | None, layout: Layout, *, clip_norm: float, weight_cap: int, max_clients: int, noise: float = 0.0
) -> int:
    """The least width of an element with which the sums of a round are exact enough.

    Arguments and errors are those of ``vector_spec``; ``given`` is None where updates of all tensors are summed.
    """
    if isinstance(given, AnalyticTask):
        if not noise:
            return analytic.RING_BITS
        size = noisyhead.moments_size(ClassifierHead.of(layout), given)
        return noisysum.least_ring_bits(size, clip_norm=clip_norm, noise=noise, max_clients=max_clients)
    if isinstance(given, EvaluationTask):
        size = evaluation.SIZE
        return noisysum.least_ring_bits(size, clip_norm=clip_norm, noise=noise, max_clients=max_clients)
    shared = layout if given is None else shared_layout(layout, given)
    if noise:
        return noisysum.least_ring_bits(shared.size, clip_norm=clip_norm, noise=noise, max_clients=max_clients)
    return task.least_ring_bits(shared, clip_norm=clip_norm, weight_cap=weight_cap, max_clients=max_clients)


def kind_of(spec: VectorSpec) -> type[AnyTask]:
    """The kind of task whose sums these are."""
    first = spec.segments[0].name
    if first == COUNTS:
        return EvaluationTask
    return AnalyticTask if first in (analytic.XX, noisyhead.MOMENTS) else Task


def metrics_of(spec: SessionSpec, sums: Sums, survivors: int, digest: bytes) -> dict[str, float]:
    """The metrics of a round, from the sums of its survivors, as they are published.

    Args:
        spec: Of the session.
        sums: Decoded, of all survivors.
        survivors: Their number.
        digest: SHA-256 of the file of the adapter that the round began with.
    """
    if kind_of(spec.vector) is EvaluationTask:
        return evaluation.evaluated(spec, sums, survivors, digest)
    return task.metrics_of(sums)


def require_reach(spec: SessionSpec, sums: Sums, survivors: int) -> None:
    """Return if honest survivors can have the sum of a round, of whichever kind its task is.

    Raises:
        DataError: As ``require_reach`` of ``task`` and ``noisysum``, and ``analytic.require_moments``.
    """
    if spec.privacy is not None:
        noisysum.require_reach(spec, sums, survivors)
    elif kind_of(spec.vector) is AnalyticTask:
        analytic.require_moments(spec, sums, survivors)
    else:
        task.require_reach(spec, sums, survivors)
