"""Cohorts by language: who is in which group, and that no device takes part in another one."""

import logging
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError
from client.node.statedir import SNAPSHOT, STATE
from simulations.data.population import Client, Population
from simulations.engine.provision import COMMON, describe, fleet_folders, grouped
from simulations.result import ReportedRound, joined_rounds
from simulations.scenario import GroupSettings, Scenario
from tests.support import FleetOf


def _population(*clients: tuple[str, bool]) -> Population:
    made = (Client(f"c-{n:02d}", language, unseen, (), (), ()) for n, (language, unseen) in enumerate(clients))
    return Population(("a", "b"), (), tuple(made))


def _of(population: Population, smallest: int = 3) -> dict[str, list[str]]:
    found = grouped(population, GroupSettings(by="language", smallest=smallest))
    return {group.name: [client.name for client in group.population.clients] for group in found}


def test_without_groups_all_clients_share_one_federation_in_the_folder_of_the_run() -> None:
    people = _population(*[("en", False)] * 4)
    (group,) = grouped(people, GroupSettings())
    assert (group.folder, group.population) == (Path(), people)


def test_a_language_with_too_few_devices_is_in_the_common_group_and_its_unseen_clients_too() -> None:
    people = _population(*[("en", False)] * 3, *[("it", False)] * 2, *[("nl", False)], ("it", True), ("en", True))
    assert _of(people) == {"en": ["c-00", "c-01", "c-02", "c-07"], COMMON: ["c-03", "c-04", "c-05", "c-06"]}
    assert describe(grouped(people, GroupSettings(by="language", smallest=3))).endswith("en 3; common 3 (it, nl)")


def test_the_smallest_group_joins_a_common_one_that_would_be_too_small() -> None:
    people = _population(*[("en", False)] * 5, *[("de", False)] * 3, ("it", False))
    assert {name: len(members) for name, members in _of(people).items()} == {"en": 5, COMMON: 4}


def test_unseen_clients_of_a_language_without_devices_get_the_adapter_of_the_largest_group() -> None:
    people = _population(*[("en", False)] * 3, *[("de", False)] * 4, ("pl", True))
    assert "c-07" in _of(people)["de"]


@given(st.lists(st.tuples(st.sampled_from(["", "en", "de", "../x"]), st.booleans()), min_size=1), st.integers(3, 6))
def test_each_client_is_in_one_group_and_no_group_but_a_lone_one_is_too_small(
    clients: list[tuple[str, bool]], smallest: int
) -> None:
    people = _population(("en", False), *clients)
    found = grouped(people, GroupSettings(by="language", smallest=smallest))
    names = [client.name for group in found for client in group.population.clients]
    assert sorted(names) == [client.name for client in people.clients]
    assert len(found) == 1 or all(group.devices >= smallest for group in found)
    assert all(group.devices for group in found)
    folders = fleet_folders(Path("out"), found)
    assert set(folders) == set(names)
    assert all(".." not in path.parts for path in folders.values())  # a language is a user's text


def test_a_coordinator_gets_no_device_of_another_group(fleet_of: FleetOf, caplog: pytest.LogCaptureFixture) -> None:
    """Both federations are reached over one grid, as over one SuperLink."""
    mine, other = fleet_of(4, rounds=1), fleet_of(4, rounds=1)
    mine.nodes |= {node + 100: folder for node, folder in other.nodes.items()}
    with caplog.at_level(logging.WARNING, logger="edgeadapt.device"):
        (record,) = mine.federate(mine.grid(message_loss=0.0, forced_dropouts=0))
    assert len(record.survivors) == 4
    assert sum("refused" in line for line in caplog.messages) == 4
    assert not any(Path(folder, name).exists() for folder in other.nodes.values() for name in (STATE, SNAPSHOT))


def test_groups_of_a_language_model_are_refused() -> None:
    with pytest.raises(ConfigError):
        Scenario.parse({"groups": {"by": "language"}, "data": {"files": ["x.csv"], "label": ""}}, "x")


def test_the_rounds_of_two_federations_are_one_round_weighted_by_survivors() -> None:
    first = ReportedRound(
        1, ("a", "b", "c"), {"d": "plan"}, None, 100, 200, 1.0, {"accuracy": 0.5, "loss": 1.0}, 1, 0.5
    )
    second = ReportedRound(1, ("e",), {}, None, 300, 400, 2.0, {"accuracy": 0.9}, 1, 0.7)
    aborted = ReportedRound(1, (), {"f": "plan"}, "too few", 0, 0, 3.0, {}, None, None)
    both = joined_rounds([first, second, aborted])
    assert (both.survivors, both.dropped, both.aborted) == (("a", "b", "c", "e"), {"d": "plan", "f": "plan"}, None)
    assert (both.bytes_up, both.bytes_down, both.seconds, both.epsilon) == (150, 250, 6.0, 0.7)
    assert both.metrics == {"accuracy": pytest.approx(0.6)}
    assert joined_rounds([aborted, aborted]).aborted == "too few"
    assert joined_rounds([first]) is first
