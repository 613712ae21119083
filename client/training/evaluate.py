"""How many of a device's held-out examples the release in its bundle answers rightly: what an evaluation sums."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.inference.session import ClassificationSession
from client.inference.trust import Trust
from client.training.examples import Example
from edgeadapt.formats.bundle import adapter_names
from edgeadapt.formats.policy import NO_POLICY
from edgeadapt.rounds.evaluation import SIZE, EvaluationTask


def own_counts(bundle: Path, task: EvaluationTask, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Count right answers and examples, under the newest release and under the previous one.

    Args:
        bundle: Folder of the device's bundle, verified as for every answer; ``trust.pem`` is next to it.
        examples: Held out, with numbers of ``task.labels``.

    Returns:
        Shape ``(SIZE,)``: whole numbers, those of the release that is not in the bundle being 0; all of them if it has
        neither.

    Raises DataError, TrustError: the bundle is damaged or breaks a rule.
    """
    counts, trusted = np.zeros(SIZE), Trust.open(bundle).bundle
    for name in adapter_names(bundle):
        content = trusted.adapter_manifest(name).content
        if content in (task.newest, task.previous):
            session = ClassificationSession.open(bundle)
            session.policy = NO_POLICY  # the models are compared
            session.load(name)
            if trusted.adapter_manifest(name).content != content:  # an update came between the two
                return counts
            right = sum(_is_right(session, name, each, task.labels[each.label]) for each in examples)
            counts[:2] = right, len(examples)
            return counts if content == task.newest else np.roll(counts, 2)
    return counts


def _is_right(session: ClassificationSession, adapter: str, example: Example, label: str) -> bool:
    """Whether it is the answer. A text of which the base knows no part does not have one."""
    if session.unknown_share(example.text) == 1:
        return False
    return session.classify([example.text], adapter)[0].label == label
