"""Rounds without masks make the adapters, records and accounts of the protocol, bit for bit."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregation.errors import ConfigError, DataError
from aggregation.policy import Policy
from aggregation.server import RoundAborted, open_session
from aggregation.spec import Adversary
from client.node.privacyledger import PrivacyLedger
from client.node.privateparts import PrivateParts
from client.node.statedir import SNAPSHOT, STATE
from coordinator.transport import SERVER_NODE
from edgeadapt.auditing.transcripts import AuditInput, AuditOptions, log_name
from edgeadapt.formats.registryfiles import SUMS, TRANSCRIPT
from edgeadapt.formats.storage import kill_safe
from simulations.data.population import Client, Population
from simulations.engine.canaries import audited
from simulations.engine.devices import LyingApp, MemoryDevices
from simulations.engine.grid import FaultModel, GridLog, InProcessGrid
from simulations.engine.groups import COMMON, fleet_folders, grouped
from simulations.engine.plain import PlainCoordinator, PlainDevice, PlainRoot, UnsignedKey
from simulations.engine.provision import COORDINATOR, Enrolment
from simulations.result import ReportedRound, joined_rounds
from simulations.scenario import GroupSettings, Scenario
from simulations.suite.run import Engine, _on_grid, _require_same_engine
from tests.support import FleetOf, refused
from tests.support.fleet import BASE, Fleet, make_fleet, session_spec

LOST = {"message_loss": 0.04, "forced_dropouts": 1}  # at every step in turn
WIDE = {"aggregation__ring_bits": 48}
NOISE = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 0.8, "aggregation__clip_norm": 0.5}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings of the federation, and of the faults
    "dropouts": ({"rounds": 4, "analytic__rounds": 1, "aggregation__session_rounds": 2, **WIDE}, LOST),
    "noise": ({"rounds": 2, **NOISE}, LOST),
    "groups": ({"rounds": 2, "method": "fedper", "aggregation__groups": 2}, {"message_loss": 0.01}),
    "aborts": ({"rounds": 2}, {"message_loss": 0.0, "forced_dropouts": 4}),
}
OF_ITS_OWN = ("previous", "offer", "plan", "entries", "root", "seconds", "ended", "bytes_down")  # see ``records``


def run(fleet: Any, faults: dict[str, Any], *, plain: bool) -> GridLog:
    coordinator = fleet.out / COORDINATOR
    if plain:
        (coordinator / SUMS).mkdir(exist_ok=True)
    enrolment = Enrolment.of(fleet.out, fleet.scenario, fleet.population, fleet.base)
    devices = MemoryDevices(enrolment.state_dir, fleet.base, plain)
    names = (client.name for client in fleet.population.clients if not client.unseen)
    log = GridLog(fleet.out / "grid.json")
    model = FaultModel(seed=1, mean_delay=40.0, **faults)
    app = LyingApp("none", frozenset(), devices.open)
    grid = InProcessGrid(app, dict(enumerate(names, SERVER_NODE + 1)), model, devices.before, log)
    with kill_safe():
        _on_grid(grid, coordinator, devices)
    return log


def records(fleet: Any) -> list[dict[str, Any]]:
    """The records of the rounds, except for what is random, time, of the log, or the size of proofs about it."""
    rounds = fleet.registry().rounds()
    return [{name: value for name, value in asdict(each).items() if name not in OF_ITS_OWN} for each in rounds]


def kept(fleet: Any) -> list[Any]:
    """What each device has for its next training, and its ledger."""
    state_dirs = [fleet.state_dir(client.name) for client in fleet.population.clients if not client.unseen]
    parts = [found and (found.before, found.after) for found in (each.load(PrivateParts) for each in state_dirs)]
    seeds = [(each.folder / "simulation.seed").read_bytes() for each in state_dirs]
    return [parts, seeds, [each.load(PrivacyLedger) for each in state_dirs]]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_without_masks_is_that_of_the_protocol(fleet_of: FleetOf, name: str) -> None:
    settings, faults = RUNS[name]
    masked, plain = (fleet_of(10 if name == "groups" else 7, deadline=300.0, **settings) for _ in range(2))
    logs = [run(masked, faults, plain=False), run(plain, faults, plain=True)]
    for one, other in zip(records(plain), records(masked), strict=True):
        assert one == other
    assert kept(plain) == kept(masked)
    assert logs[0].devices == logs[1].devices
    steps = {step for record in records(plain) for step in record["dropped"].values()}
    aborted = [record["aborted"] for record in records(plain) if record["aborted"]]
    assert {"dropouts": len(steps) > 1, "aborts": bool(aborted)}.get(name, True)
    if name == "noise":  # the canaries take the sums from the log, or from what is kept in its place
        bounds = [audited([fleet.out], 1e-6, 100) for fleet in (masked, plain)]
        assert bounds[0] is not None
        assert bounds[0].account == bounds[1].account if bounds[1] else False


def test_a_run_without_masks_goes_on_with_its_account(fleet_of: FleetOf) -> None:
    whole, halves = (fleet_of(6, rounds=2, aggregation__session_rounds=1, **NOISE) for _ in range(2))
    run(whole, {"message_loss": 0.0}, plain=True)
    halves.configure({"rounds": 1})
    run(halves, {"message_loss": 0.0}, plain=True)
    with (halves.out / COORDINATOR / SUMS / log_name(1)).open("ab") as file:
        file.write(b"\x00\x01")  # as a kill leaves it
    halves.configure({"rounds": 2})
    run(halves, {"message_loss": 0.0}, plain=True)
    facts = [[(one.adapter, one.epsilon) for one in fleet.registry().rounds()] for fleet in (whole, halves)]
    assert facts[0] == facts[1]


def test_rounds_go_on_as_they_began(fleet_of: FleetOf, tmp_path: Path) -> None:
    scenario, masked, plain = fleet_of(3).scenario, tmp_path / "masked", tmp_path / "plain"
    (masked / TRANSCRIPT).mkdir(parents=True)
    (plain / SUMS).mkdir(parents=True)
    assert [Engine().masks(scenario, coordinator) for coordinator in (masked, plain)] == [True, False]
    for coordinator, began, other in ((masked, "protocol", False), (plain, "plain", True)):
        with refused(ConfigError, about="--engine", value=began):
            _require_same_engine(coordinator, other)


def test_an_audit_says_how_to_run_it_with_masks(tmp_path: Path) -> None:
    (tmp_path / COORDINATOR / SUMS).mkdir(parents=True)
    for place in (tmp_path, tmp_path / COORDINATOR):
        with refused(DataError, about="transcript"):
            AuditInput.open(place, AuditOptions())


class PlainFleet(Fleet):
    @classmethod
    def of(cls, fleet: Fleet) -> "PlainFleet":
        devices = {name: PlainDevice.of(device) for name, device in fleet.devices.items()}
        return cls(fleet.spec, fleet.entropy, fleet.authority, fleet.key, devices)

    def offer(self) -> tuple[Any, bytes]:
        root = PlainRoot(self.authority.der)
        coordinator = PlainCoordinator(UnsignedKey(self.key.raw))
        return open_session(coordinator, root, self.spec, self.certificates, self.entropy)


@pytest.mark.parametrize(("dropouts", "adversary"), [(0, "active"), (2, "honest-but-curious"), (5, "active")])
def test_sums_of_a_sparse_graph_and_their_aborts_are_those_of_the_protocol(dropouts: int, adversary: str) -> None:
    model = Adversary(adversary)
    spec = session_spec(9, degree=6, threshold=5, minimum_survivors=5, adversary=model)
    limits = {"adversaries": frozenset(Adversary), "complete_up_to": 3, "corrupt_fraction": 0.0}
    policy = Policy(frozenset({BASE}), minimum_cohort=3, minimum_survivors=2, **limits)
    fleets = [make_fleet(9, spec=spec, policy=policy), PlainFleet.of(make_fleet(9, spec=spec, policy=policy))]
    gone = [*fleets[0].devices][:dropouts]
    one, other = (fleet.round(fleet.establish(), {"input": gone[:1], "unmask": gone[1:]}) for fleet in fleets)
    assert isinstance(one, RoundAborted) == (dropouts == 5)
    if isinstance(one, RoundAborted):
        assert (one.reason, one.detail, one.blamed) == (other.reason, other.detail, other.blamed)
    else:
        assert one[1].digest == other[1].digest


# Cohorts by language: who is in which group, and that no device takes part in another one.
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
