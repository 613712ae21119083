"""Cohorts of a population: chosen at random, of one size, and closed when enough devices have answered."""

import math
from collections import Counter
from typing import Any

from aggregation.steps import Step
from coordinator.session import choose
from coordinator.settings import CohortSettings
from coordinator.transport import Enough, Transport
from simulations.engine.grid import FaultModel, InProcessGrid
from tests.coordinator.test_transport import answer
from tests.support import FleetOf

NODES = tuple(range(2, 202))


def test_every_node_is_as_likely_to_be_chosen_as_any_other() -> None:
    cohort = CohortSettings(size=20, over_selection=1.5, seed=1)
    chosen = [choose(NODES, cohort, f"session-{n}-1") for n in range(1, 401)]
    assert {len(nodes) for nodes in chosen} == {30}
    assert all(sorted(set(nodes)) == list(nodes) for nodes in chosen)
    times = Counter(node for nodes in chosen for node in nodes)
    expected, sd = 400 * 30 / 200, math.sqrt(400 * 0.15 * 0.85)
    assert all(abs(times[node] - expected) < 5 * sd for node in NODES)


def test_the_seed_and_the_session_determine_the_choice_and_without_a_seed_nothing_does() -> None:
    seeded, free = CohortSettings(size=20, seed=1), CohortSettings(size=20)
    assert choose(NODES, seeded, "session-1-1") == choose(NODES, seeded, "session-1-1")
    others = {
        choose(NODES, CohortSettings(size=20, seed=seed), group) for seed in (1, 2) for group in ("session-1-1", "b")
    }
    assert len(others) == 4
    assert choose(NODES, free, "session-1-1") != choose(NODES, free, "session-1-1")
    assert choose(NODES[:5], seeded, "session-1-1") == NODES[:5]


def test_an_exchange_ends_a_grace_time_after_enough_answers() -> None:
    delays = FaultModel(0, 0.0, 1.0).outcomes("1", Step.PLAN, NODES)
    arrivals = sorted(outcome.delay for outcome in delays.values())
    for answers, grace in ((100, 0.0), (100, 0.5), (200, 0.0)):
        grid = InProcessGrid(answer, dict.fromkeys(NODES, ""), FaultModel(0, 0.0, 1.0))
        transport = Transport(grid, grid.clock, 60.0)
        replies = list(transport.ask(Step.PLAN, dict.fromkeys(NODES, b"x"), "1", enough=Enough(answers, grace)))
        found = [reply for reply in replies if reply.body is not None]
        assert len(replies) == len(NODES)
        assert answers <= len(found) <= sum(delay < arrivals[answers - 1] + grace + 0.6 for delay in arrivals)
        assert {reply.silent for reply in replies if reply.body is None} <= {True}
        assert grid.clock.now() < arrivals[answers - 1] + grace + 0.6


def test_a_session_has_a_cohort_of_the_size_and_the_next_one_another(fleet_of: FleetOf) -> None:
    fleet = fleet_of(12, rounds=3, aggregation__session_rounds=2, cohort__size=8, cohort__seed=5)
    sets = [set(record.survivors) for record in fleet.federate(fleet.grid())]
    assert [len(devices) for devices in sets] == [8, 8, 8]
    assert sets[0] == sets[1] != sets[2]


def test_slow_devices_are_left_out(fleet_of: FleetOf) -> None:
    clocks = []
    for changes in ({"cohort__quorum": 0.75, "cohort__grace": 0.2}, {}):
        fleet = fleet_of(12, rounds=1, **changes)
        grid = fleet.grid(mean_delay=60.0)
        (record,) = fleet.federate(grid)
        assert record.version == 1
        assert 6 <= len(record.survivors) < 12 if changes else len(record.survivors) == 12
        clocks.append(grid.clock.now())
    assert clocks[0] < clocks[1]


def test_a_quorum_below_what_the_protocol_needs_is_raised_to_it(fleet_of: FleetOf) -> None:
    fleet = fleet_of(9, rounds=3, cohort__quorum=0.01)
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3]


def test_after_a_sum_without_a_result_the_next_cohort_has_all_of_its_survivors(fleet_of: FleetOf) -> None:
    """The rule of one survivor set for each adapter holds although cohorts are chosen at random."""
    from client.node.app import app

    fleet = fleet_of(16, rounds=2, aggregation__session_rounds=1, cohort__size=8, cohort__seed=5, attempts=1)

    def deaf(message: Any, context: Any) -> Any:
        if (message.metadata.message_type, message.metadata.group_id) == (Step.UNMASK.message_type, "1"):
            raise ConnectionError
        return app(message, context)

    first, second = fleet.federate(fleet.grid(app=deaf))
    assert first.version is None
    assert second.version == 1
    asked = fleet_of(16, rounds=1, aggregation__session_rounds=1, cohort__size=8, cohort__seed=5)
    (undisturbed,) = asked.federate(asked.grid())
    assert set(second.survivors) == set(undisturbed.survivors)
