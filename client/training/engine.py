"""The engines with which a device trains: torch on the base itself, a training graph on the base of a bundle, or the
loop of a model that a package adds.

Each is imported when it is needed: torch takes seconds, and a device with a bundle need not have it.
"""

from collections.abc import Callable
from threading import Lock
from typing import cast

from cachetools import LRUCache, cached

from client.training.trainer import ClassifierTrainer, FrozenBase, LanguageTrainer, Trainer
from edgeadapt.bases.base import OwnModel
from edgeadapt.formats.bundle import VerifiedBase
from edgeadapt.formats.peftconfig import OWN, PeftConfig

TrainerOf = Callable[[FrozenBase, int, PeftConfig], Trainer]  # base, labels, configuration → the trainer


def _key(base: FrozenBase, *rest: object) -> object:
    """Key of a trainer: a bundle's base is that of its folder as long as its files stay the same."""
    files = (base.folder, *sorted(base.manifest.files.items())) if isinstance(base, VerifiedBase) else base
    return files, *rest


def open_trainer(base: FrozenBase, labels: int, config: PeftConfig) -> Trainer:
    """Open a trainer of its own, of a classifier or, without labels, of a language model.

    Raises:
        ConfigError: The base cannot be opened, has no training graph or, for a classifier, another head than one over
            the mean of its tokens, or the method cannot be trained with it.
        TrustError: A file of the bundle changed since it was verified.
    """
    if config.peft_type == OWN or isinstance(base, OwnModel):
        from client.training import ownmodel

        return ownmodel.classifier(base, labels, config)
    if isinstance(base, VerifiedBase):
        from client.inference.session import require_mean_head
        from client.training import graphengine

        if not labels:
            return graphengine.language(base, config)
        require_mean_head(base)
        return graphengine.classifier(base, labels, config)
    from client.training import torchengine

    return torchengine.classifier(base, labels, config) if labels else torchengine.language(base, config)


@cached(LRUCache(maxsize=2), key=_key, lock=Lock())
def classifier_trainer(base: FrozenBase, labels: int, config: PeftConfig) -> ClassifierTrainer:
    """Open the trainer of a federation's classifier, which stays loaded. Raises as ``open_trainer``."""
    return cast(ClassifierTrainer, open_trainer(base, labels, config))


def language_trainer(base: FrozenBase, config: PeftConfig) -> LanguageTrainer:
    """Open the trainer of a language model, which stays loaded. Raises as ``open_trainer``."""
    return _with_graph(base, config) if isinstance(base, VerifiedBase) else _with_torch(base, config)


def _language(base: FrozenBase, config: PeftConfig) -> LanguageTrainer:
    return cast(LanguageTrainer, open_trainer(base, 0, config))


# A device has no memory for two graphs.
_with_graph = cached(LRUCache(maxsize=1), key=_key, lock=Lock())(_language)
_with_torch = cached(LRUCache(maxsize=2), key=_key, lock=Lock())(_language)


def trainer_of(base: FrozenBase, labels: int, config: PeftConfig) -> Trainer:
    """Open the trainer of a classifier or, without labels, of a language model. Raises as ``open_trainer``."""
    return classifier_trainer(base, labels, config) if labels else language_trainer(base, config)
