"""Sums from one adapter, added and subtracted until few devices are left, although every two differ by many.

With sets P, A, B, C and D of devices: the sum over the victim, P, A and B, plus that over P, C and D, less those over
P, A and C and over P, B and D, is the victim's update. Or the sums over X and Z, and over Y and Z, less that over all
three: the sum over Z. Or cohorts of the victim and others, of yet others, and of both without the victim. Or two
cohorts that differ by one device each, whose sums different honest devices help to. The coordinator logs each round as
aborted. The devices run the real ClientApp; all examples of a device are in one batch, so that its updates from one
adapter are equal, up to rounding.
"""

import json
from collections.abc import Collection, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from click.testing import CliRunner
from flwr.app import Context, Error, Message
from numpy.typing import NDArray

from aggregation import graph
from aggregation.errors import EdgeAdaptError
from aggregation.messages import MAX_COHORT
from aggregation.server import Established
from aggregation.steps import Step
from client.node import adapterstate
from client.node import app as device_app
from client.node.statedir import ADAPTERS
from coordinator.settings import Aggregation
from edgeadapt.cli import audit_group
from tests.client.node.conftest import refusals
from tests.support import FleetOf
from tests.support.subtracting import Subtracting, any_set, fleet_without_proofs

__all__ = ["refusals"]
pytestmark = pytest.mark.usefixtures("by_bytes_only")


class Family(NamedTuple):
    """Sets of devices whose sums, with these coefficients, leave few devices; ``step``: where others are left out."""

    devices: int
    sets: Sequence[Collection[int]]
    coefficients: Sequence[int]
    left: Collection[int]
    step: Step
    unmasked: int  # sums that the devices help to


V, P, A, B, C, D = {0}, {*range(1, 6)}, {*range(6, 9)}, {*range(9, 12)}, {*range(12, 15)}, {*range(15, 18)}
X, Y, Z = {*range(6)}, {*range(6, 12)}, {*range(12, 16)}
FOUR = Family(18, (V | P | A | B, P | C | D, P | A | C, P | B | D), (1, 1, -1, -1), V, Step.PLAN, 1)
THREE = Family(16, (X | Z, Y | Z, X | Y | Z), (1, 1, -1), Z, Step.PLAN, 1)
LEFT, RIGHT = {*range(1, 9)}, {*range(9, 17)}
COHORTS = Family(17, (V | LEFT, RIGHT, LEFT | RIGHT), (1, 1, -1), V, Step.CHECK_IN, 2)
FAMILIES = pytest.mark.parametrize("family", [FOUR, THREE, COHORTS], ids=["four sums", "three sums", "three cohorts"])


class Combining(Subtracting):
    """A coordinator that has round k over the k-th set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, family: Family) -> None:
        super().__init__(monkeypatch, aborted=range(9))
        self.family = family
        plan = Established.plan

        def for_all(session: Established, **given: Any) -> Any:
            return plan(session, **{**given, "cohort": None})

        monkeypatch.setattr(Established, "plan", for_all)

    def __call__(self, message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        self.device = Path(str(context.node_config[device_app.STATE])).name
        if step is self.family.step:
            number = int(group.removeprefix("session-").partition("-")[0])
            if int(self.device[-2:]) not in self.family.sets[number - 1]:
                return Message(Error(1, "withheld"), reply_to=message)
        return device_app.app(message, context)

    def combined(self) -> NDArray[np.float64]:
        """The combination of the sums, in weight units: cohorts of other sizes have other steps."""
        return np.asarray(np.array(self.family.coefficients) @ np.array(self.deltas))

    def expected(self) -> NDArray[np.float64]:
        """The same combination of what the devices that are left sent in their first rounds, in weight units."""
        total = np.zeros_like(self.deltas[0])
        for number in sorted(self.family.left):
            among = [number in each for each in self.family.sets]
            factor, first = np.array(self.family.coefficients)[among].sum(), among.index(True)
            vector = self.signed(self.vectors[f"device-{number:02d}", first])[self.delta]
            total += factor * vector * self.steps[first]
        return total

    def assert_succeeded(self) -> None:
        """The combination is that of the devices that are left, and of no other."""
        found, sent = self.combined(), self.expected()
        assert np.linalg.norm(found - sent) < 1e-4 * np.linalg.norm(sent)


def attacked(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, family: Family) -> tuple[Combining, Any]:
    rounds = len(family.sets)
    session_rounds = rounds if family.step is Step.PLAN else 1
    settings = {"aggregation__session_rounds": session_rounds, "training__batch_size": 64, "aggregation__ring_bits": 40}
    fleet = fleet_without_proofs(app_fleet_of, family.devices, rounds=rounds, **settings)
    attack = Combining(monkeypatch, family)
    fleet.federate(fleet.grid(app=attack))
    return attack, fleet


@FAMILIES
def test_a_device_helps_to_sums_over_one_set(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, refusals: list[str], family: Family
) -> None:
    attack, _ = attacked(app_fleet_of, monkeypatch, family)
    assert len(attack.sums) == family.unmasked
    assert {*refusals} == {"survivors.repeat"}


@FAMILIES
def test_otherwise_a_combination_leaves_few_devices_and_the_audit_names_the_sums(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, family: Family
) -> None:
    monkeypatch.setattr(adapterstate, "on_survivors", any_set)
    attack, fleet = attacked(app_fleet_of, monkeypatch, family)
    attack.assert_succeeded()

    printed = CliRunner().invoke(audit_group, ["verify", str(fleet.out), "--json"])
    assert printed.exit_code == 0, printed.output
    sessions = json.loads(printed.stdout)["sessions"]
    checks = [check for each in sessions for check in each["checks"] if check["check"] == "repeats"]
    assert {check["status"] for check in checks} == {"warning"}
    assert checks[-1]["about"] == "round.repeated"
    text = " ".join(check["text"] for check in checks)
    for one, other in combinations(family.sets, 2):
        assert f"with {len({*one} ^ {*other})} devices (" in text


CORRUPT = "device-01"
PAIR = Family(9, ({*range(8)}, {*range(1, 9)}), (1, -1), {0, 8}, Step.CHECK_IN, 1)


class Dividing(Combining):
    """A coordinator that asks so many devices to unmask each sum that no honest one is asked for both.

    Args:
        threshold: Devices that it asks first; the corrupt one is among them, and forgets.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, threshold: int) -> None:
        super().__init__(monkeypatch, PAIR)
        self.first = {f"device-{number:02d}" for number in range(threshold)}

    def __call__(self, message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        state_dir = Path(str(context.node_config[device_app.STATE]))
        if (step, group) == (Step.UNMASK, "1") and state_dir.name not in self.first:
            return Message(Error(1, "not asked"), reply_to=message)
        if (step, group, state_dir.name) == (Step.PLAN, "2", CORRUPT):
            (state_dir / ADAPTERS).unlink()
        return super().__call__(message, context)


def divided(app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, threshold: int) -> Dividing:
    settings = {"aggregation__session_rounds": 1, "training__batch_size": 64, "aggregation__ring_bits": 40}
    fleet = fleet_without_proofs(app_fleet_of, PAIR.devices, rounds=2, **settings)
    attack = Dividing(monkeypatch, threshold)
    fleet.federate(fleet.grid(app=attack))
    return attack


def test_two_cohorts_have_an_honest_device_in_common_that_helps_to_one_sum_only(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, refusals: list[str]
) -> None:
    assert len(divided(app_fleet_of, monkeypatch, threshold=6).sums) == 1
    assert {*refusals} == {"survivors.repeat"}


def test_a_threshold_with_which_they_may_have_none_is_refused(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, refusals: list[str]
) -> None:
    monkeypatch.setattr(graph, "least_threshold", graph.quorum)
    monkeypatch.setattr(Aggregation, "survivors", lambda settings, devices, chosen: chosen.threshold)
    with pytest.raises(EdgeAdaptError):  # no session
        divided(app_fleet_of, monkeypatch, threshold=5)
    assert {*refusals} == {"offer.combined"}


def test_with_that_threshold_the_difference_is_that_of_two_devices(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "least_threshold", graph.quorum)
    monkeypatch.setattr(graph, "left_over", lambda *given: MAX_COHORT)
    divided(app_fleet_of, monkeypatch, threshold=5).assert_succeeded()
