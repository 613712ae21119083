"""The engines with which a device trains: torch on the base itself, or a training graph on the base of a bundle.

Each is imported when it is needed: torch takes seconds, and a device with a bundle need not have it.
"""

from collections.abc import Callable

from adapters.bundle import VerifiedBase
from adapters.peftconfig import PeftConfig
from client.training.protocols import ClassifierTrainer, FrozenBase, LocalTrainer

TrainerOf = Callable[[FrozenBase, int, PeftConfig], LocalTrainer]  # base, labels, configuration → the trainer


def trainer_of(base: FrozenBase, labels: int, config: PeftConfig) -> LocalTrainer:
    """The trainer of a classifier or, without labels, of a language model. Raises as ``classifier_trainer``."""
    return classifier_trainer(base, labels, config) if labels else language_trainer(base, config)


def classifier_trainer(base: FrozenBase, labels: int, config: PeftConfig) -> ClassifierTrainer:
    """The trainer of a classifier, which stays loaded for the next message.

    Raises:
        ConfigError: The base cannot be opened or has no training graph, or the method cannot be trained with it.
        TrustError: A file of the bundle changed since it was verified.
    """
    if isinstance(base, VerifiedBase):
        from client.training.graphtrainer import load_graph_trainer

        return load_graph_trainer(base, labels, config)
    from client.training.trainer import load_trainer

    return load_trainer(base, labels, config)


def language_trainer(base: FrozenBase, config: PeftConfig) -> LocalTrainer:
    """The trainer of a language model. Raises as ``classifier_trainer``."""
    if isinstance(base, VerifiedBase):
        from client.training.languagegraph import load_language_graph_trainer

        return load_language_graph_trainer(base, config)
    from client.training.language import load_language_trainer

    return load_language_trainer(base, config)
