"""How good the release in a device's bundle is on its held-out examples: what an evaluation sums."""

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from client.inference.session import ClassificationSession
from client.inference.trust import Trust
from client.training.examples import Example
from client.training.graphengine import GraphEngine
from client.training.trainer import Trainer
from edgeadapt.formats.bundle import VerifiedBase, adapter_names
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.policy import NO_POLICY
from edgeadapt.rounds.evaluation import EvaluationTask, relative
from edgeadapt.rounds.task import MAX_LOSS


def own_counts(
    base: VerifiedBase, task: EvaluationTask, examples: Sequence[Example], trainer: Trainer, offered: Tensors
) -> NDArray[np.float64]:
    """Count right answers and examples under the newest release and under the previous one, or compare a language model
    with the adapter on offer by ``relative``: numbers of a release that is not in the bundle are 0.

    ``base``: of the device's bundle, verified as for every answer; ``trust.pem`` is next to the bundle. ``examples``:
    held out, with numbers of ``task.labels``. Raises DataError, TrustError: the bundle is damaged or breaks a rule, or
    a release has another layout."""
    bundle = base.folder.parent
    trust, counts = Trust.open(bundle), np.zeros(task.noisy_size(trainer.layout))
    contents = {name: trust.bundle.adapter_manifest(name).content for name in adapter_names(bundle)}
    name = next((name for name, content in contents.items() if content in (task.newest, task.previous)), None)
    if name is None or not examples:
        return counts
    if task.labels:
        session = ClassificationSession.open(bundle)
        session.policy = NO_POLICY  # the models are compared
        session.load(name)
        right = sum(_is_right(session, name, one, task.labels[one.label]) for one in examples)
        found = np.roll([right, len(examples), 0.0, 0.0], 0 if contents[name] == task.newest else 2)
    else:
        release = cast(GraphEngine, trainer.engine).tensors_of(trust.adapter(name, base).inputs)
        losses = [trainer.score(adapter, examples).loss / len(examples) for adapter in (release, offered)]
        found = relative(contents[name] == task.newest, *(x if math.isfinite(x) else MAX_LOSS for x in losses))
    return found if trust.bundle.adapter_manifest(name).content == contents[name] else counts  # else it was updated


def _is_right(session: ClassificationSession, adapter: str, example: Example, label: str) -> bool:
    if session.unknown_share(example.text) == 1:
        return False
    return session.classify([example.text], adapter)[0].label == label
