"""The moments of a device's own examples: what it contributes to an analytic head, and what it fits its own head to."""

from collections.abc import Sequence

import numpy as np

from client.training.examples import Example, Split, in_split
from client.training.trainer import ClassifierTrainer
from edgeadapt.formats.layout import Floats, Layout, Tensors
from edgeadapt.rounds.analytic import ClassifierHead
from edgeadapt.rounds.ridge import EmbeddingMoments, moments_of


def own_moments(trainer: ClassifierTrainer, adapter: Tensors, examples: Sequence[Example]) -> EmbeddingMoments:
    """Compute the moments of the embedded training examples. Raises DataError if the adapter does not have a head."""
    own = in_split(examples, Split.TRAIN)
    labels = np.array([example.label for example in own], np.int64)
    return moments_of(embedded(trainer, adapter, own), labels, ClassifierHead.of(Layout.of(adapter)).labels)


def embedded(trainer: ClassifierTrainer, adapter: Tensors, examples: Sequence[Example]) -> Floats:
    """Embed, shape ``(len(examples), hidden)``; zeros for an example that overflows, which counts all the same."""
    embeddings = trainer.embed([example.text for example in examples], adapter)
    return np.where(np.isfinite(embeddings).all(axis=1, keepdims=True), embeddings, np.float32(0))
