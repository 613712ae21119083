"""How far an adapter moves between two rounds, and how far it has to for their sums not to be two from one adapter.

The updates of a device from two adapters differ less, the nearer the two are: with the sums over two sets of devices,
their difference is then that of a few devices. What counts is the distance in weight units, whatever the learning rate:
gradients change with it. A step longer than ``LEAST_STEP`` raises what is demanded, because an honest adapter then
moves farther. All of it follows from what the coordinator sent, and nothing from examples.
"""

import math
from collections.abc import Collection

from adapters.analytic import AnalyticTask
from adapters.layout import Tensors
from adapters.parts import Part, part_of
from adapters.task import OptimizerName, Task

LEAST_STEP = 0.1  # L2 norm, weight units


def influencing(task: Task | AnalyticTask) -> frozenset[Part]:
    """The parts of an adapter on which a device's contribution to a task depends.

    Also those that a round does not train, as A in a round of B. A part that stays on the devices takes the place of
    the adapter's, and embeddings need no head.
    """
    if isinstance(task, AnalyticTask):
        return frozenset(Part) - {Part.HEAD}
    return frozenset(Part) - task.private


def least_movement(task: Task | AnalyticTask, clip_norm: float, size: int, share: float) -> float:
    """The distance below which two adapters count as one: L2 norm over the parts of ``influencing``, weight units.

    Args:
        task: Of the plan.
        clip_norm: Of the session.
        size: Numbers in an update; not used for other tasks.
        share: Of a long step of the task's optimizer, within the clip norm: AdamW's longest, and that of SGD whose
            gradients have the norm 1 or the task's ``gradient_norm``.
    """
    if isinstance(task, AnalyticTask):
        return share * LEAST_STEP
    if task.optimizer is OptimizerName.ADAMW:
        step = task.learning_rate * math.sqrt(size)
    else:
        step = task.learning_rate * min(task.gradient_norm or 1.0, 1.0) / (1 - task.momentum)
    return share * max(min(clip_norm, step), LEAST_STEP)


def distance(before: Tensors, after: Tensors, parts: Collection[Part]) -> float:
    """The L2 distance between two adapters of one layout, over some parts."""
    names = [name for name in before if part_of(name) in parts]
    return math.sqrt(sum(float(((after[name].astype(float) - before[name]) ** 2).sum()) for name in names))
