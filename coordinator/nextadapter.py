"""From the sum of a round to the next adapter, whichever kind its task is of: the mean and a server optimizer's step,
or the head that moments give.

The coordinator makes each adapter with it (``rounds``), and an audit makes it again (``audit.recompute``).
"""

from adapters import analytic, noisyhead
from adapters.analytic import AnalyticTask
from adapters.layout import Layout, Tensors
from adapters.lorasb import folded, unfolded
from adapters.noisysum import noisy_mean
from adapters.parts import Part
from adapters.task import Sums, shared_layout, weighted_mean
from adapters.taskkinds import AnyTask
from aggregation.spec import SessionSpec
from coordinator import optimizer


def state_size(task: AnyTask, layout: Layout) -> int:
    """Elements of the vector that a server optimizer steps. ``layout``: of the adapter."""
    return 0 if isinstance(task, AnalyticTask) else shared_layout(layout, task).size


def next_adapter(
    spec: SessionSpec,
    task: AnyTask,
    rule: optimizer.Settings,
    state: optimizer.State,
    tensors: Tensors,
    *,
    sums: Sums,
    survivors: int,
    digest: str,
) -> tuple[optimizer.State, Tensors]:
    """The adapter that a round makes, and the optimizer's state after it.

    Args:
        spec: Of the session.
        task: Of the round's plan.
        rule: The server optimizer; not used for an analytic head.
        state: Of the optimizer.
        tensors: Of the adapter that the round began with.
        sums: Of the survivors, decoded.
        survivors: Their number.
        digest: SHA-256 of the file of ``tensors``, hex.

    Raises:
        ConfigError: The state belongs to another optimizer.
        DataError: Honest survivors cannot have these sums, or the update is not finite.
    """
    begun = bytes.fromhex(digest)
    if isinstance(task, AnalyticTask):
        solved = analytic.solved if spec.privacy is None else noisyhead.solved
        return state, solved(spec, task, tensors, sums, survivors, begun)
    shared = shared_layout(Layout.of(tensors), task)
    mean_of = weighted_mean if spec.privacy is None else noisy_mean
    mean = mean_of(spec, task, shared, sums, survivors, begun)
    begin = unfolded(tensors) if Part.R in task.shared else tensors
    state, made = optimizer.advance(rule, state, begin, shared, mean)
    return state, folded(made, optimizer.LARGEST)
