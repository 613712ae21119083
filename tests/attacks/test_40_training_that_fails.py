"""A coordinator chooses a task whose training fails on devices with more examples, and reads the update of the rest.

With SGD, a proximal term that reaches far past the start takes a number ninety-nine times as far from it in each step.
Devices that make many steps overflow. When such a device contributed an update of zero, with weight zero, the sum of
the round was the update of the device with the fewest examples. The attack runs in complete rounds of the real apps.
"""

import math
import tomllib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tomli_w

from aggregation import rotation
from client.node.training import LocalRound
from client.training.examples import Example, Score, write_examples
from client.training.trainer import ClassifierTrainer
from edgeadapt.formats.layout import Layout
from edgeadapt.rounds.roundtask import Outcome
from edgeadapt.rounds.task import Task, contribution, is_stable, weighted_mean
from tests.attacks.test_14_answers_that_depend_on_data import DEVICES, Observer
from tests.support import FleetOf

VICTIM = DEVICES[3]
OFTEN = (Example("turn on the light", 0), Example("stop the music", 1), Example("set a timer", 2)) * 4
ONCE = (Example("play the song", 1), Example("start the timer", 2))
TASK = {"optimizer": "sgd", "learning_rate": 0.1, "proximal": 1000.0, "batch_size": 1, "epochs": 3}
PERMITTED = {"minimum_batch_size": 1, "maximum_proximal": 1000.0, "maximum_gradient_norm": 3e38}


@dataclass
class Seen:
    """What each device made of its examples, and the mean of the round before its noise."""

    outcomes: list[Outcome] = field(default_factory=list)
    means: list[Any] = field(default_factory=list)

    @classmethod
    def watch(cls, monkeypatch: pytest.MonkeyPatch) -> "Seen":
        seen = cls()

        def contributed(outcome: Outcome, *rest: Any) -> Any:
            vector = contribution(outcome, *rest)
            seen.outcomes.append(outcome)
            return vector

        def meant(spec: Any, task: Any, layout: Any, found: Any, *rest: Any) -> Any:
            update = rotation.rotate_back(found["delta"], rotation.seed(rest[-1]))
            seen.means.append((update, float(found["weight"][0])))
            return weighted_mean(spec, task, layout, found, *rest)

        monkeypatch.setattr("edgeadapt.rounds.task.contribution", contributed)
        monkeypatch.setattr("edgeadapt.rounds.task.weighted_mean", meant)
        return seen

    def moved(self) -> list[float]:
        """The norm of each device's update."""
        return [float(np.linalg.norm(_update(outcome))) for outcome in self.outcomes]


def _update(outcome: Outcome) -> Any:
    layout = Layout.of(outcome.start)
    return layout.flatten(outcome.trained).astype(np.float64) - layout.flatten(outcome.start)


def fleet_with(fleet_of: FleetOf, **policy: float) -> Any:
    """A fleet in which one device has few examples, and the task of the attack."""
    fleet = fleet_of(len(DEVICES), rounds=1, aggregation__ring_bits=40)
    fleet.configure({f"training.{name}": value for name, value in TASK.items()})
    for name in DEVICES:
        state_dir = fleet.state_dir(name)
        write_examples(state_dir.examples, ONCE if name == VICTIM else OFTEN)
        path = state_dir.folder / "device.toml"
        table = tomllib.loads(path.read_text())
        table["policy"].update(policy)
        path.write_text(tomli_w.dumps(table))
    return fleet


@pytest.fixture
def unstable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator and devices that accept a task whose training is not stable."""
    monkeypatch.setattr("edgeadapt.rounds.task.is_stable", lambda *_: True)


def failing(local: LocalRound, task: Task) -> Outcome:
    """As a device that could not train contributed: nothing, with weight zero."""
    start = local.start
    return Outcome(start, start, 0, Score(0, 0, 0.0))


@pytest.mark.usefixtures("unstable")
def test_every_device_refuses_the_task(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    observer, fleet = Observer(), fleet_with(app_fleet_of, **PERMITTED)

    def honest(message: Any, context: Any) -> Any:
        with monkeypatch.context() as device:
            device.setattr("edgeadapt.rounds.task.is_stable", is_stable)
            return observer(message, context)

    (record,) = fleet.federate(fleet.grid(app=honest))
    assert record.version is None
    ((answer, reason, _),) = set(observer.seen.values())
    assert answer == "refused"
    assert "task.proximal" in reason


@pytest.mark.usefixtures("unstable")
def test_of_devices_that_train_it_none_is_alone_in_the_sum(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fleet = Seen.watch(monkeypatch), fleet_with(app_fleet_of, **PERMITTED)
    (record,) = fleet.federate(fleet.grid())
    assert record.survivors == DEVICES
    assert sorted(outcome.examples for outcome in seen.outcomes) == [2, *[12] * 7]
    assert seen.means[0][1] == 2 + 7 * 12
    assert min(seen.moved()) > 1  # so that each is clipped to the same norm


@pytest.mark.usefixtures("unstable")
def test_if_training_could_fail_the_sum_would_be_the_update_of_the_device_with_the_fewest_examples(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("client.training.descent.DISTANCE", np.float32(math.inf))
    monkeypatch.setattr("client.training.descent.finite", lambda tensors: tensors)  # so that it fails as it did
    monkeypatch.setattr(LocalRound, "unchanged", failing)
    seen, fleet = Seen.watch(monkeypatch), fleet_with(app_fleet_of, **PERMITTED)
    fleet.federate(fleet.grid())
    (update, weight), (victim,) = seen.means[0], [outcome for outcome in seen.outcomes if outcome.examples]
    assert weight == len(ONCE)
    found, own = update / weight, _update(victim)
    assert np.corrcoef(found, own)[0, 1] > 0.999


def test_a_device_that_fails_counts_like_all_others(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    train = ClassifierTrainer.train

    def sometimes(self: ClassifierTrainer, start: Any, examples: Any, *rest: Any, **named: Any) -> Any:
        if len(examples) > len(ONCE):
            raise RuntimeError
        return train(self, start, examples, *rest, **named)

    monkeypatch.setattr(ClassifierTrainer, "train", sometimes)
    seen, fleet = Seen.watch(monkeypatch), fleet_with(app_fleet_of, **PERMITTED)
    fleet.configure({"training.proximal": 0.0})
    (record,) = fleet.federate(fleet.grid())
    assert record.survivors == DEVICES
    assert sorted(outcome.examples for outcome in seen.outcomes) == [2, *[12] * 7]
    assert seen.means[0][1] == 2 + 7 * 12


def test_the_settings_of_a_federation_cannot_have_it(app_fleet_of: FleetOf) -> None:
    from aggregation.errors import ConfigError
    from coordinator.settings import FederationSettings

    fleet = fleet_with(app_fleet_of)
    with pytest.raises(ConfigError, match="must be below 1"):
        FederationSettings.read(fleet.out / "coordinator" / "federation.toml")
