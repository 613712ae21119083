"""A round of observation whose sum is one device's: the others count nothing, or have too few answers.

A coordinator may know of whom that is so. What it may choose does not help it: no number of answers is part of the
task, owners who have not agreed contribute to none, and the noise that devices demand is larger than all that one
device can count.
"""

import tomllib
from collections.abc import Callable
from typing import Any

import pytest
import tomli_w

from aggregation.errors import ProtocolError
from client.inference.usage import Usage, today
from client.node.policy import PolicySettings
from client.node.statedir import SETTINGS
from edgeadapt.bases.base import Base
from edgeadapt.formats import jsontext
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.rounds.observation import LONGEST, NOISE, ObservationTask, keys
from export.bundle.sources import from_registry
from export.onnx.classifier import export_classifier
from export.onnx.exported import Profile
from export.onnx.slotted import with_mean_head
from tests.support import refused
from tests.support.rollout import StagedFleet, run

DEVICES, ANSWERS, DOUBT = 8, 100, 25
BARE, HONEST = 1e-4, 4.6  # noise multipliers: one with which sums can be read, and that of the settings
TASK = ObservationTask(PeftConfig("LORA", 2, 4, ("query",)), ("on", "off"), ("doubt",), today() - 1, 1)


def observed(app_fleet_of: Callable[..., Any], tiny_base: Base, multiplier: float, demanded: float) -> dict[str, float]:
    """Return the metrics of a round in which one device alone counts its answers."""
    exported = export_classifier(with_mean_head(tiny_base, ["query", "value"]), tiny_base, Profile.FP32, training=True)
    settings = {"observation__noise_multiplier": multiplier, "aggregation__ring_bits": 32}
    staged = StagedFleet.of(app_fleet_of(DEVICES, rounds=1, observation__rounds=1, **settings), exported)
    staged.publish("stable", from_registry(staged.fleet.out / "coordinator", 0, None), 1)
    staged.join()
    staged.update()
    for device in staged.devices:
        file = staged.fleet.state_dir(device).folder / SETTINGS
        table = tomllib.loads(file.read_text())
        table["policy"] |= {"observations": True, "minimum_evaluation_noise": demanded}
        file.write_text(tomli_w.dumps(table))
    victim = staged.bundle(staged.devices[0])
    Usage.begin(victim)
    counts = [keys("on", 0.2 if number < DOUBT else 0.97, 0.0, 0.01, "a" * 64) for number in range(ANSWERS)]
    Usage().plus(today() - 1, [key for own in counts for key in own]).write(victim)
    run("coordinator", "observe", staged.fleet.out / "coordinator", "--days", 1)
    return dict(staged.fleet.federate(staged.fleet.grid())[-1].metrics)


def test_without_noise_the_sum_is_what_the_only_device_answered(
    app_fleet_of: Callable[..., Any], tiny_base: Base
) -> None:
    metrics = observed(app_fleet_of, tiny_base, BARE, BARE / 2)
    assert metrics["doubt.0"] == pytest.approx(DOUBT / ANSWERS, abs=0.01)


def test_the_noise_that_devices_demand_is_larger_than_all_that_one_device_counts(
    app_fleet_of: Callable[..., Any], tiny_base: Base
) -> None:
    assert observed(app_fleet_of, tiny_base, HONEST, 1.0)[NOISE] > 4 * LONGEST


def test_an_owner_who_has_not_agreed_contributes_to_none() -> None:
    with refused(ProtocolError, "task.observations"):
        PolicySettings().check(TASK, {})
    PolicySettings(observations=True).check(TASK, {})


def test_a_task_does_not_say_how_many_answers_a_device_must_have() -> None:
    raw = jsontext.encode({**jsontext.decode(TASK.encode()), "least": 1000})
    with refused(ProtocolError, "task.least"):
        ObservationTask.decode(raw)
