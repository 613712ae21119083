"""How many of a device's held-out examples the release in its bundle answers rightly: what an evaluation sums."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapters.bundle import adapter_names
from adapters.evaluation import SIZE, EvaluationTask
from aggregation.errors import ConfigError
from client.inference.session import ClassificationSession
from client.inference.trust import Trust
from client.training.examples import Example
from client.updates import last_rollout


def require_hidden(bundle: Path, task: EvaluationTask, devices: int) -> None:
    """Return if as many devices are expected to have each of the two releases as a sum must have.

    The coordinator chooses when devices count, and what. So each asks by itself, by the rollout that it verified at its
    last update, whether its counts would be among those of enough others. Only stale devices have an older release.

    Args:
        bundle: As of ``own_counts``.
        task: Of the round.
        devices: Of the round.

    Raises:
        ConfigError: The channel of the bundle rolled nothing out then, or other releases than those of the task, or one
            of them is expected on fewer.
        TrustError: The note of the rollout is damaged.
    """
    if (note := last_rollout(bundle)) is None:
        reason = "the channel of this device rolled nothing out at its last update, so its release may be that of few"
        raise ConfigError(reason, about="rollout")
    if (task.newest, task.previous) not in note.adapters.values():
        reason = "the round compares other releases than this device's channel rolled out at its last update, which may"
        raise ConfigError(f"{reason} be those of few", about="rollout")
    note.rollout.require_both_likely(devices)


def own_counts(bundle: Path, task: EvaluationTask, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Right answers and examples, under the newest release and under the one before.

    Args:
        bundle: Folder of the device's bundle, verified as for every answer; ``trust.pem`` is next to it.
        task: Of the round.
        examples: Held out, with numbers of ``task.labels``.

    Returns:
        Shape ``(SIZE,)``: whole numbers, those of the release that is not in the bundle being 0; all of them if it has
        neither.

    Raises:
        DataError, TrustError: The bundle is damaged or breaks a rule.
    """
    counts, trusted = np.zeros(SIZE), Trust.open(bundle).bundle
    for name in adapter_names(bundle):
        content = trusted.adapter_manifest(name).content
        if content in (task.newest, task.previous):
            session = ClassificationSession.open(bundle)
            session.load(name)
            if trusted.adapter_manifest(name).content != content:  # an update came between the two
                return counts
            right = sum(_is_right(session, name, each, task.labels[each.label]) for each in examples)
            counts[:2] = right, len(examples)
            return counts if content == task.newest else np.roll(counts, 2)
    return counts


def _is_right(session: ClassificationSession, adapter: str, example: Example, label: str) -> bool:
    """Whether it is the answer. A text of which the base knows no part has none."""
    if session.unknown_share(example.text) == 1:
        return False
    return session.classify([example.text], adapter)[0].label == label
