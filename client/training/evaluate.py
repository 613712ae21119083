"""How good the release in a device's bundle is on its held-out examples: what an evaluation sums."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from client.inference.session import ClassificationSession
from client.inference.trust import Trust
from client.training.examples import Example, Score
from client.training.graphengine import GraphEngine
from client.training.trainer import Trainer
from edgeadapt.formats.bundle import Bundle, VerifiedBase, adapter_names
from edgeadapt.formats.layout import Tensors
from edgeadapt.rounds.evaluation import SIZE, TEXT_SIZE, EvaluationTask, relative


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
    for name, content in _compared(trusted, task):
        session = ClassificationSession.open(bundle)
        session.load(name)
        if trusted.adapter_manifest(name).content != content:  # an update came between the two
            return counts
        right = sum(_is_right(session, name, each, task.labels[each.label]) for each in examples)
        counts[:2] = right, len(examples)
        return counts if content == task.newest else np.roll(counts, 2)
    return counts


def own_relative(
    base: VerifiedBase, task: EvaluationTask, examples: Sequence[Example], trainer: Trainer, offered: Tensors
) -> NDArray[np.float64]:
    """Compare a language model's release with the adapter on offer, on held-out texts: ``evaluation.relative``.

    Zeros and errors as ``own_counts``; ``trainer``: of ``base``, the bundle's. Raises DataError: also if the release
    has another layout than the adapter on offer.
    """
    trust, nothing, engine = Trust.open(base.folder.parent), np.zeros(TEXT_SIZE), cast(GraphEngine, trainer.engine)
    for name, content in _compared(trust.bundle, task):
        release = trust.adapter(name, base)
        if not examples or release.manifest.content != content:
            return nothing
        both = (engine.tensors_of(release.inputs), offered)
        scores = [trainer.score(adapter, examples) for adapter in both]
        losses = [(one if math.isfinite(one.loss) else Score.worst(one.count)).loss / one.count for one in scores]
        return relative(content == task.newest, *losses)
    return nothing


def _compared(trusted: Bundle, task: EvaluationTask) -> list[tuple[str, str]]:
    """List the adapters of a bundle that are one of the task's two, with their contents."""
    contents = {name: trusted.adapter_manifest(name).content for name in adapter_names(trusted.folder)}
    return [(name, content) for name, content in contents.items() if content in (task.newest, task.previous)]


def _is_right(session: ClassificationSession, adapter: str, example: Example, label: str) -> bool:
    """Whether it is the answer. A text of which the base knows no part does not have one."""
    if session.unknown_share(example.text) == 1:
        return False
    return session.classify([example.text], adapter)[0].label == label
