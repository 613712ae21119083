"""Availability traces: who can be reached when, and what a broken file says."""

from pathlib import Path

import pytest

from aggregation.errors import ConfigError, DataError
from aggregation.steps import Step
from simulations.data.population import Client
from simulations.engine.grid import FaultModel, Steps, read_trace
from simulations.engine.progress import RunProgress
from simulations.suite.run import RunFolder, prepare
from tests.support import FleetOf, refused

CLIENTS = tuple(Client(f"{code}-{n}", code, False, (), (), ()) for code in ("en", "de") for n in (1, 2))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.csv"


def test_a_row_holds_from_its_round_on_until_another_one_in_any_order(path: Path) -> None:
    path.write_text("client,round,available\nen-1,5,1\nen-1,2,0\nde-2,1,0.5\n")
    trace = read_trace(path, CLIENTS)
    assert set(trace) == {"en-1", "de-2"}
    assert [trace["en-1"].at(number) for number in (1, 2, 4, 5, 9)] == [None, 0, 0, 1, 1]


def test_a_row_of_a_language_is_about_all_of_its_clients(path: Path) -> None:
    path.write_text("available,language,round\n0.2,de,3\n")
    assert read_trace(path, CLIENTS) == {name: Steps((3,), (0.2,)) for name in ("de-1", "de-2")}


def test_the_grid_reaches_a_device_as_the_trace_says_and_the_others_as_before() -> None:
    trace = {2: Steps((2, 3), (0.0, 1.0))}
    faults = FaultModel(seed=0, message_loss=0.0, mean_delay=1.0, availability=(1e-9,), trace=trace)
    there = {
        group: [node for node, found in faults.outcomes(group, Step.PLAN, (2, 3)).items() if not found.request_lost]
        for group in ("1", "2", "3", "session-3-1", "4")
    }
    assert there == {"1": [], "2": [], "3": [2], "session-3-1": [2], "4": [2]}


def test_a_share_of_a_language_is_there_and_more_at_a_larger_one(path: Path) -> None:
    clients = [Client(f"en-{n}", "en", False, (), (), ()) for n in range(1000)]
    path.write_text("language,round,available\nen,1,0.3\nen,2,0.6\n")
    trace = dict(enumerate(read_trace(path, clients).values(), 2))
    faults = FaultModel(seed=0, message_loss=0.0, mean_delay=1.0, trace=trace)
    first, second = (
        {node for node, found in faults.outcomes(group, Step.PLAN, range(2, 1002)).items() if not found.request_lost}
        for group in ("1", "2")
    )
    assert first < second
    assert abs(len(first) - 300) < 75
    assert abs(len(second) - 600) < 75


@pytest.mark.parametrize("rows", ["en-1,0,1", "en-1,1,nan", "en-1,1", "fr-1,1,1", "en-1,1,1\nen-1,1,0"])
def test_a_broken_row_is_named_by_file_and_line(path: Path, rows: str) -> None:
    path.write_text(f"client,round,available\nde-1,1,1\n{rows}\n")
    with refused(DataError, f"{path}, line {2 + len(rows.splitlines())}"):
        read_trace(path, CLIENTS)


@pytest.mark.parametrize("text", ["", "client,language,round,available\n", "client,available\n", "\xff"])
def test_a_file_that_is_no_trace_is_refused(path: Path, text: str) -> None:
    path.write_bytes(text.encode("latin-1"))
    with refused(ConfigError, "network.trace", value=str(path)):
        read_trace(path, CLIENTS)


def test_a_run_is_not_resumed_with_another_trace(fleet_of: FleetOf, tmp_path: Path) -> None:
    fleet, trace = fleet_of(4), tmp_path / "trace.csv"
    network = fleet.scenario.network.model_copy(update={"trace": str(trace)})
    scenario = fleet.scenario.model_copy(update={"network": network})
    folder, progress = RunFolder.start(tmp_path / "run", scenario), RunProgress(quiet=True)
    with refused(ConfigError, "network.trace"):
        prepare(folder, fleet.population, fleet.base, progress)
    trace.write_text("client,round,available\ndevice-00,1,0\n")
    prepare(folder, fleet.population, fleet.base, progress)
    prepare(folder, fleet.population, fleet.base, progress)
    trace.write_text("client,round,available\ndevice-00,2,0\n")
    with refused(ConfigError, "--out"):
        prepare(folder, fleet.population, fleet.base, progress)
