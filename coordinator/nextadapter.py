"""From the sums of a round to the next adapter, whichever kind its task is of: the mean, or with groups the combination
of their means, and a server optimizer's step; or the head that moments give; or, after an evaluation, the same adapter.

The coordinator makes each adapter with it (``rounds``), and an audit makes it again (``audit.recompute``).
"""

from collections.abc import Sequence

from adapters import analytic, evaluation, noisyhead
from adapters.analytic import AnalyticTask
from adapters.evaluation import EvaluationTask
from adapters.layout import Floats, Layout, Tensors
from adapters.lorasb import folded, unfolded
from adapters.noisysum import noisy_mean
from adapters.parts import Part
from adapters.task import Task, shared_layout, weighted_mean
from adapters.taskkinds import AnyTask
from aggregation.errors import DataError
from aggregation.groups import GroupSum
from aggregation.spec import SessionSpec
from coordinator import optimizer
from coordinator.combination import Combination, combine, distances


def state_size(task: AnyTask, layout: Layout) -> int:
    """Elements of the vector that a server optimizer steps. ``layout``: of the adapter."""
    return shared_layout(layout, task).size if isinstance(task, Task) else 0


def means_of(spec: SessionSpec, task: Task, shared: Layout, sums: Sequence[GroupSum], digest: str) -> list[Floats]:
    """The mean update of each group, float32 of shape ``(shared.size,)``. Arguments as of ``next_adapter``.

    Raises:
        DataError: Honest survivors cannot have one of the sums.
    """
    mean_of = weighted_mean if spec.privacy is None else noisy_mean
    begun = bytes.fromhex(digest)
    return [mean_of(spec, task, shared, each.values, len(each.survivors), begun) for each in sums]


def next_adapter(
    spec: SessionSpec,
    task: AnyTask,
    rule: optimizer.Settings,
    state: optimizer.State,
    tensors: Tensors,
    *,
    sums: Sequence[GroupSum],
    combination: Combination | None,
    digest: str,
) -> tuple[optimizer.State, Tensors]:
    """The adapter that a round makes, and the optimizer's state after it.

    Args:
        spec: Of the session.
        task: Of the round's plan.
        rule: The server optimizer; used for training only.
        state: Of the optimizer.
        tensors: Of the adapter that the round began with.
        sums: Of the groups, or the one sum of all survivors.
        combination: Of the means of groups; None without groups.
        digest: SHA-256 of the file of ``tensors``, hex.

    Raises:
        ConfigError: The state belongs to another optimizer.
        DataError: Honest survivors cannot have these sums, the update is not finite, or an analytic head has groups.
    """
    if isinstance(task, AnalyticTask):
        if len(sums) != 1:
            raise DataError("an analytic head is solved from one sum, and the session has groups", about="task.ridge")
        solved, (one,) = analytic.solved if spec.privacy is None else noisyhead.solved, sums
        return state, solved(spec, task, tensors, one.values, len(one.survivors), bytes.fromhex(digest))
    if isinstance(task, EvaluationTask):
        return state, evaluation.renewed(tensors, bytes.fromhex(digest))
    shared = shared_layout(Layout.of(tensors), task)
    means = means_of(spec, task, shared, sums, digest)
    mean = means[0] if combination is None else combine(combination, means)
    begin = unfolded(tensors) if Part.R in task.shared else tensors
    state, made = optimizer.advance(rule, state, begin, shared, mean)
    return state, folded(made, optimizer.LARGEST)


def distances_of(
    spec: SessionSpec,
    task: Task,
    combination: Combination,
    tensors: Tensors,
    sums: Sequence[GroupSum],
    digest: str,
) -> tuple[float, ...]:
    """How far the mean of each group is from their combination, in weight units. Arguments as of ``next_adapter``."""
    means = means_of(spec, task, shared_layout(Layout.of(tensors), task), sums, digest)
    return distances(means, combine(combination, means))
