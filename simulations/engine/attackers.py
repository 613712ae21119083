"""Devices that lie: the software of some devices of a simulation is exchanged for an attacker's.

An attacker trains, clips, masks and signs as every other device, so that no check of the protocol can tell it from one;
only the update is not that of its examples. What it costs the others is what a scenario measures.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from adapters.layout import Layout, Tensors
from adapters.task import Task
from client.node.app import STATE, OpenState, register
from client.training.control import UNLIMITED, TrainingControl
from client.training.engine import trainer_of
from client.training.examples import Example, Score
from client.training.trainer import FrozenBase, LocalTrainer
from simulations.scenario import Scenario

FACTORS = {"sign-flip": -1.0, "label-flip": 1.0, "boost": 10.0}  # of what the attacker trains


@dataclass(slots=True)
class LyingTrainer:
    """A trainer whose update is not that of the examples.

    ``sign-flip``: the negative of the update. ``label-flip``: trained with each label replaced by its mirror image, the
    first by the last and so on (Tolpegin et al. 2020). ``boost``: ten times that (Bagdasaryan et al. 2020); the device
    clips it, as the sum would count as zero otherwise.
    """

    trainer: LocalTrainer
    kind: str  # a key of ``FACTORS``
    layout: Layout = field(init=False)  # of the adapter

    def __post_init__(self) -> None:
        self.layout = self.trainer.layout

    @property
    def base(self) -> FrozenBase:
        return self.trainer.base

    def train(
        self,
        start: Tensors,
        examples: Sequence[Example],
        task: Task,
        *,
        epochs: int,
        rng: np.random.Generator,
        step: Callable[[], object] = lambda: None,
        control: TrainingControl = UNLIMITED,
    ) -> Tensors:
        """Tensors that make the update the attacker's."""
        if self.kind != "sign-flip":
            examples = [replace(each, label=len(task.labels) - 1 - each.label) for each in examples]
        trained = self.trainer.train(start, examples, task, epochs=epochs, rng=rng, step=step, control=control)
        factor = np.float32(FACTORS[self.kind])
        return {name: start.get(name, 0) + factor * (after - start.get(name, 0)) for name, after in trained.items()}

    def score(self, adapter: Tensors, examples: Sequence[Example]) -> Score:
        """The honest score: a false one shows in the metrics of the sum."""
        return self.trainer.score(adapter, examples)


def attackers(scenario: Scenario, devices: Iterable[str]) -> frozenset[str]:
    """Which of the devices lie: the scenario's share of them, rounded, at least one; chosen by its seed."""
    if scenario.attack.kind == "none":
        return frozenset()
    names = sorted(devices)
    number = max(1, round(scenario.attack.share * len(names)))
    chosen = np.random.default_rng([scenario.seed, *b"attackers"]).choice(names, size=number, replace=False)
    return frozenset(map(str, chosen))


class LyingApp(ClientApp):
    """The devices' app, in which some devices lie.

    Args:
        kind: Of the lie; unused if no device lies.
        names: The devices that do, by the name that ``STATE`` has in the configuration of their nodes.
        open_state: As for ``register``.
    """

    def __init__(self, kind: str, names: frozenset[str], open_state: OpenState) -> None:
        super().__init__()
        self._names, self._attacker = names, ClientApp()
        register(self, open_state)
        register(self._attacker, open_state, lambda *given: LyingTrainer(trainer_of(*given), kind))

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer a message with the software of the device that it is for."""
        if context.node_config[STATE] in self._names:
            return self._attacker(message, context)
        return super().__call__(message, context)
