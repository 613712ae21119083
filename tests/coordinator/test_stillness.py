"""A server's step so short that devices take each adapter for the one before: the coordinator keeps the cohort."""

import logging
from collections.abc import Callable, Container
from typing import Any

import pytest
from flwr.app import Context, Error, Message

from aggregation.errors import ConfigError
from aggregation.steps import Step
from client.node.app import app as client_app
from coordinator import lastsum
from edgeadapt.rounds.roundtask import distance
from tests.support import FleetOf, refused

STILL = {"server__learning_rate": 1e-6, "training__optimizer": "sgd", "aggregation__session_rounds": 9}
HELD_UP = "devices help to another sum with all of the last one only"


def absent(first: int, rounds: Container[str]) -> Callable[[Message, Context], Message]:
    """The real devices, of which the first is away when some rounds are planned."""

    def call(message: Message, context: Context) -> Message:
        planned = message.metadata.message_type == Step.PLAN.message_type and message.metadata.group_id in rounds
        if planned and context.node_id == first:
            return Message(Error(7, "lost"), reply_to=message)
        return client_app(message, context)

    return call


def test_a_round_that_lacks_a_device_is_repeated_with_it_and_a_restart_changes_nothing(
    app_fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = app_fleet_of(8, rounds=3, **STILL)
    with caplog.at_level(logging.WARNING, "edgeadapt.coordinator"):
        records = fleet.federate(fleet.grid(app=absent(fleet.node("device-00"), {"2"})))
    assert [record.version for record in records] == [1, None, 2]
    assert HELD_UP in records[1].aborted
    lines = [each.getMessage() for each in caplog.records if "server.learning_rate" in each.getMessage()]
    assert len(lines) == 1
    assert "1e-06 moves the adapter by at most 1.2e-05 in a round" in lines[0]
    fleet.configure({"rounds": 6})
    records = fleet.federate(fleet.grid(app=absent(fleet.node("device-01"), {"4"})))
    assert [record.version for record in records[3:]] == [None, 3, 4]  # more sums than ``maximum_repeats`` permits
    fleet.configure({"rounds": 7, "training.learning_rate": 0.02})
    with refused(ConfigError, "training.learning_rate", value=0.02):
        fleet.federate(fleet.grid())
    fleet.configure({"rounds": 8, "training.learning_rate": 0.01, "server.learning_rate": 1.0})
    records = fleet.federate(fleet.grid(app=absent(fleet.node("device-02"), {"8"})))
    assert [record.version for record in records[6:]] == [5, 6]  # it moved, and others may be missing


def test_rounds_of_moments_are_over_the_same_devices(app_fleet_of: FleetOf) -> None:
    fleet = app_fleet_of(8, rounds=3, analytic__rounds=3, aggregation__session_rounds=3)
    records = fleet.federate(fleet.grid(app=absent(fleet.node("device-00"), {"2"})))
    assert [record.version for record in records] == [1, None, 2]
    assert HELD_UP in records[1].aborted


@pytest.mark.parametrize(
    "server", [{"server__optimizer": "fedadam", "server__learning_rate": 0.01}, {"method": "rolora"}], ids=str
)
def test_an_honest_adapter_moves_three_times_as_far_as_devices_demand(
    app_fleet_of: FleetOf, server: dict[str, Any]
) -> None:
    fleet = app_fleet_of(8, rounds=3, aggregation__session_rounds=3, **server)
    records = fleet.federate(fleet.grid(app=absent(fleet.node("device-00"), {"2"})))
    assert [record.version for record in records] == [1, 2, 3]
    from coordinator.statedir import CoordinatorStateDir

    settings, registry = CoordinatorStateDir.open(fleet.out / "coordinator").settings, fleet.registry()
    newest = registry.newest_adapter()
    task = settings.task(newest.manifest)
    for number in range(3):
        far = distance(registry.tensors(number), registry.tensors(number + 1), task.influencing())
        assert far > 3 * lastsum._least(newest, task, settings)
