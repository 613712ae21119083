"""The rounds of a federation: who is admitted, where devices drop out, what a record holds, how a round fails."""

import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Error, Message, RecordDict

from aggregation import envelope
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.groups import GroupSum
from aggregation.messages import CheckIn
from aggregation.server import RoundResult
from aggregation.steps import BODY, RECORD, Step
from client.node.app import app as client_app
from coordinator import lastsum, runstate
from coordinator.app import main
from coordinator.registry import Blobs
from coordinator.rounds import within_reach
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing import audit
from edgeadapt.auditing.transcripts import logs
from edgeadapt.methods.parts import Part
from edgeadapt.rounds.roundtask import distance
from simulations.engine.grid import DeliveryOutcome, InProcessGrid
from tests.support import FleetOf, refused
from tests.support.fleet import session_spec
from tests.support.hostile import audit_failures


class Spoiled:
    """The real app, except where ``change(step, group, node)`` returns another answer or an error."""

    def __init__(self, change: Callable[[Step, str, int], bytes | str | None]) -> None:
        self.change = change
        self.asked: list[tuple[str, Step, int]] = []

    def __call__(self, message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        self.asked.append((group, step, context.node_id))
        found = self.change(step, group, context.node_id)
        if isinstance(found, str):
            return Message(Error(7, found), reply_to=message)
        if isinstance(found, bytes):
            return Message(RecordDict({RECORD: ConfigRecord({BODY: found})}), reply_to=message)
        return client_app(message, context)


def test_a_record_lists_survivors_dropouts_and_metrics_of_its_round(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6, rounds=3, aggregation__session_rounds=2)
    records = fleet.federate(fleet.grid(forced_dropouts=1))
    names = [f"device-{n:02d}" for n in range(6)]
    assert [record.round for record in records] == [1, 2, 3]
    assert [record.version for record in records] == [1, 2, 3]
    assert [list(record.dropped.values()) for record in records] == [["survivors"], ["unmask"], ["plan"]]
    for record in records:
        late = {device for device, step in record.dropped.items() if step != "plan"}
        assert set(record.survivors) == set(names) - (set(record.dropped) - late)
        survivors = [h for h in fleet.population.clients if h.name in record.survivors]
        held_out = sum(len(h.validation) for h in survivors)
        assert record.metrics.keys() == {"accuracy", "loss"}
        assert record.metrics["accuracy"] in {round(correct / held_out, 2) for correct in range(held_out + 1)}
        assert record.metrics["loss"] > 0
        assert record.seconds > 0
        assert record.bytes_down > record.bytes_up > 0


def test_the_operator_is_told_before_the_rounds_what_default_policies_refuse(
    fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet = fleet_of(6, rounds=2, training__epochs=11)
    with caplog.at_level(logging.WARNING, "edgeadapt.coordinator"):
        records = fleet.federate(fleet.grid())
    assert all(record.aborted for record in records)
    (warned,) = [entry.message for entry in caplog.records if "default policy" in entry.message]
    assert "task.epochs 11 is over this device's maximum of 10" in warned


def test_the_next_session_waits_for_the_interval_after_the_last_sum(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(4, rounds=3, interval=3600.0, aggregation__session_rounds=2)
    grid, folder, waits = fleet.grid(), fleet.out / "coordinator", set()
    sleep = grid.clock.sleep

    def slept(seconds: float) -> None:
        waits.add(runstate.read(folder).waits_for)
        sleep(seconds)

    monkeypatch.setattr(grid.clock, "sleep", slept)
    assert not any(record.aborted for record in fleet.federate(grid))
    assert 3500 < grid.clock.now() < 7000, "once in three rounds"
    assert runstate.Need.INTERVAL in waits
    assert runstate.read(folder).waits_for is None


def test_sessions_last_for_their_rounds_and_versions_name_their_round_and_parent(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapter is read and verified once a round, also for the offer of a session; once more as a parent."""
    read: list[str] = []
    get = Blobs.get

    def counting(blobs: Blobs, digest: str) -> bytes:
        read.append(digest)
        return get(blobs, digest)

    fleet, app = fleet_of(4, rounds=4, aggregation__session_rounds=2), Spoiled(lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(Blobs, "get", counting)
        records = fleet.federate(fleet.grid(app=app))
    groups = list(dict.fromkeys(group for group, step, _ in app.asked if step is Step.OFFER))
    assert groups == ["session-1-1", "session-3-1"]
    first, second, third, fourth = (record.bytes_up for record in records)
    assert first > second + 100 < third  # the bytes of making a session count in its first round
    assert abs(second - fourth) < 100
    versions = [version.manifest for version in fleet.registry().versions()]
    assert [(m.version, m.round) for m in versions] == [(number, number) for number in range(5)]
    assert [m.parent for m in versions[1:]] == [m.sha256 for m in versions[:-1]]
    assert [m.survivors for m in versions[1:]] == [record.survivors for record in records]
    assert [m.metrics for m in versions[1:]] == [record.metrics for record in records]
    assert len({(m.base_digest, m.layout_digest, m.peft_config, m.labels) for m in versions}) == 1
    assert read == [versions[number].sha256 for number in (0, 1, 0, 2, 1, 3, 2)]


def test_devices_that_answer_wrongly_drop_out_of_the_round_and_are_asked_again(fleet_of: FleetOf) -> None:
    def change(step: Step, group: str, node: int) -> bytes | str | None:
        spoil: dict[tuple[str, Step, int], bytes | str] = {
            ("1", Step.PLAN, 2): b"no masked input",
            ("1", Step.SURVIVORS, 3): "gone fishing",
            ("1", Step.UNMASK, 4): b"",
        }
        return spoil.get((group, step, node))

    fleet = fleet_of(10, rounds=2)
    first, second = fleet.federate(fleet.grid(app=Spoiled(change)))
    assert first.dropped == {"device-00": "plan", "device-01": "survivors", "device-02": "unmask"}
    assert first.survivors == tuple(f"device-{n:02d}" for n in range(1, 10))
    assert (second.dropped, len(second.survivors)) == ({}, 10)
    refusals = {each.kind: each.text for each in runstate.read(fleet.out / "coordinator").refusals}
    assert refusals["survivors"] == "gone fishing"
    assert len(refusals) == 3


def test_nodes_without_a_certificate_of_the_authority_are_not_admitted(
    fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, stranger = fleet_of(12, rounds=1), fleet_of(3)
    theirs = stranger.state_dir("device-00")
    elsewhere = envelope.sign(theirs.identity, CheckIn(bytes(32), theirs.certificate, None))
    answers = {2: elsewhere, 4: b"no check-in"}
    app = Spoiled(lambda step, _, node: answers.get(node) if step is Step.CHECK_IN else None)
    with caplog.at_level(logging.INFO, "edgeadapt.coordinator"):
        (record,) = fleet.federate(fleet.grid(app=app))
    assert set(record.survivors) == {"device-01", *(f"device-{n:02d}" for n in range(3, 12))}
    assert not {node for _, step, node in app.asked if step is Step.PLAN} & {2, 4}
    refused = [entry.message for entry in caplog.records if "is not admitted" in entry.message]
    assert {tuple(message.split()[:2]) for message in refused} == {("node", "2"), ("node", "4")}


def test_a_device_at_two_nodes_takes_part_at_the_one_that_answers_first(
    fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, app = fleet_of(8, rounds=1), Spoiled(lambda *_: None)
    fleet.nodes[20] = fleet.nodes[3]  # a copy of the state directory of device-01 would be the same to the coordinator
    with caplog.at_level(logging.INFO, "edgeadapt.coordinator"):
        (record,) = fleet.federate(fleet.grid(app=app, mean_delay=0.0))
    assert (len(record.survivors), record.dropped) == (8, {})
    assert 20 not in {node for _, step, node in app.asked if step is not Step.CHECK_IN}
    refused = [entry.message for entry in caplog.records if "is not admitted" in entry.message]
    assert refused == ["node 20 is not admitted: node 3 checked in as device-01 before"]


def test_too_few_devices_end_the_run_in_one_line_after_its_attempts(
    fleet_of: FleetOf, caplog: pytest.LogCaptureFixture
) -> None:
    fleet, app = fleet_of(6, attempts=2), Spoiled(lambda _, __, node: "no" if node > 3 else None)
    with (
        caplog.at_level(logging.WARNING, "edgeadapt.coordinator"),
        refused(EdgeAdaptError, "session"),
    ):
        fleet.federate(fleet.grid(app=app))
    assert [record.message for record in caplog.records if "attempt" in record.message] == [
        "session not made, attempt 1 of 2: 2 devices answered, 3 are needed",
        "session not made, attempt 2 of 2: 2 devices answered, 3 are needed",
    ]
    assert {group for group, _, _ in app.asked} == {"session-1-1", "session-1-2"}
    assert fleet.registry().rounds() == ()


class Returning(InProcessGrid):
    """Most devices are absent in the first seconds."""

    def get_node_ids(self) -> list[int]:
        return [node for node in super().get_node_ids() if node <= 3 or self.clock.now() >= 4]


def test_a_session_is_tried_again_as_soon_as_a_device_that_was_absent_is_back(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6, rounds=1, attempts=2)
    grid = fleet.grid(kind=Returning, mean_delay=0.0)
    (record,) = fleet.federate(grid)
    assert len(record.survivors) == 6
    assert 4 <= grid.clock.now() < 15


def test_an_aborted_round_leaves_the_adapter_and_the_next_may_succeed(fleet_of: FleetOf) -> None:
    app = Spoiled(lambda step, group, node: "no" if (group, step) == ("1", Step.PLAN) and node > 4 else None)
    fleet = fleet_of(8, rounds=2)
    before = fleet.registry().version(0)
    first, second = fleet.federate(fleet.grid(app=app))
    assert "3 masked inputs" in (first.aborted or "")
    assert (first.version, first.survivors, first.metrics) == (None, (), {})
    assert set(first.dropped.values()) == {"plan"}
    assert first.bytes_up > 0
    assert (second.aborted, second.version) == (None, 1)
    assert fleet.registry().version(1).manifest.parent == before.manifest.sha256
    assert [version.manifest.round for version in fleet.registry().versions()] == [0, 2]


class Asleep(InProcessGrid):
    """Nodes 2 to 5 do not receive one step of round 1, unless it is sent again."""

    step = Step.PLAN
    deaf = (2, 3, 4, 5)

    def _outcomes(self, batch: Sequence[Message]) -> dict[int, DeliveryOutcome]:
        first, outcomes = batch[0].metadata, super()._outcomes(batch)
        if (first.group_id, first.message_type) != ("1", self.step.message_type):
            return outcomes
        return {node: replace(outcome, request_lost=node in self.deaf) for node, outcome in outcomes.items()}


@pytest.mark.parametrize(("step", "attempts"), [(Step.PLAN, 3), (Step.SURVIVORS, 1), (Step.UNMASK, 3)])
def test_where_too_few_answer_those_of_which_nothing_was_heard_are_asked_again(
    fleet_of: FleetOf, step: Step, attempts: int
) -> None:
    fleet = fleet_of(8, rounds=1, attempts=attempts)
    grid = fleet.grid(kind=type("Asleep", (Asleep,), {"step": step}))
    (record,) = fleet.federate(grid)
    assert (record.version, record.dropped) == ((1, {}) if attempts > 1 else (None, record.dropped))
    assert (grid.clock.now() > 600 + 15) == (attempts > 1)  # the deadline and a pause
    if attempts > 1:
        assert len(record.survivors) == 8
        assert audit_failures(fleet.out / "coordinator") == set()


def test_after_an_abort_a_session_that_has_no_device_to_spare_is_followed_by_a_larger_one(fleet_of: FleetOf) -> None:
    def change(step: Step, group: str, node: int) -> str | None:
        lost = (group == "session-1-1" and step is Step.OFFER and node < 4) or (group == "1" and node == 5)
        return "no" if lost else None

    app, fleet = Spoiled(change), fleet_of(8, rounds=2, aggregation__session_rounds=2)
    first, second = fleet.federate(fleet.grid(app=app))
    assert "5 masked inputs, 6 are needed" in first.aborted
    assert len(second.survivors) == 8
    assert {group for group, step, _ in app.asked if step is Step.OFFER} == {"session-1-1", "session-2-1"}


def test_a_second_run_is_refused_and_does_not_disturb_the_first(fleet_of: FleetOf) -> None:
    fleet, tried = fleet_of(4, rounds=2), []

    def change(step: Step, group: str, node: int) -> None:
        if (group, step, node) == ("2", Step.SURVIVORS, 3):
            with refused(EdgeAdaptError, "run.lock"):
                fleet.federate(fleet.grid())
            tried.append(node)

    records = fleet.federate(fleet.grid(app=Spoiled(change)))
    assert tried == [3]
    assert [(record.dropped, record.version) for record in records] == [({}, 1), ({}, 2)]
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    (path,) = logs(state_dir.folder / "transcript")
    audit(path.read_bytes(), state_dir.root, state_dir.key.public).require()


@pytest.mark.parametrize("weight", [-3.0, 0.9, 1.5, 201.0, 0.0, 1.0, 200.0])
def test_a_sum_with_weights_that_survivors_cannot_have_counts_as_zero(weight: float) -> None:
    counts = weight in (0, 1, 200)
    spec = session_spec(3)
    session: Any = SimpleNamespace(session=SimpleNamespace(spec=spec))
    values = {"delta": np.zeros(7), "weight": np.array([weight])}
    result = RoundResult(1, (GroupSum(("a", "b"), values),), (), ("b",), bytes(32))
    reached = within_reach(session, result)
    same, found = reached.session, reached.result
    assert (same, found.survivors, found.blamed, found.sums[0].spoiled is None) == (session, ("a", "b"), ("b",), counts)
    assert found.values["weight"][0] == (weight if counts else 0.0)
    assert counts or f"{weight:g}" not in str(found.sums[0].spoiled)  # which is published


@pytest.mark.parametrize("rule", ["fedavg", "fedadam"])
def test_a_fleet_that_has_no_examples_yet_trains_once_it_has_some(fleet_of: FleetOf, rule: str) -> None:
    kept = {"aggregation__keep_masked_inputs": True, "server__optimizer": rule}
    fleet = fleet_of(8, rounds=5, aggregation__session_rounds=5, **kept)  # more rounds than ``maximum_repeats`` permits
    files = [home / "examples.jsonl" for home in (fleet.out / "devices").iterdir()]
    written = {path: path.read_bytes() for path in files}
    for path in files:
        path.write_bytes(b"")
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3, 4, 5]
    assert len({record.adapter for record in records}) == 5
    for path, content in written.items():
        path.write_bytes(content)
    fleet.configure({"rounds": 6})
    *_, record = fleet.federate(fleet.grid())
    assert (record.version, record.dropped) == (6, {})
    assert record.metrics
    assert audit_failures(fleet.out / "coordinator") == set()


def test_a_state_directory_that_is_not_named_or_lacks_a_file_or_has_a_damaged_one_is_refused_by_name(
    fleet_of: FleetOf,
) -> None:
    fleet = fleet_of(3)
    for config in ({}, {"coordinator-state": ""}, {"coordinator-state": 7}):
        with refused(ConfigError, "coordinator-state"):
            main(fleet.grid(), Context(1, 1, {}, RecordDict(), config))
    for name in ("signing.pem", "authority.pem", "revoked.crl", "federation.toml"):
        path = fleet.out / "coordinator" / name
        content = path.read_bytes() if path.exists() else None
        path.write_bytes(b"damaged")
        with pytest.raises(ConfigError if name == "federation.toml" else TrustError) as caught:
            CoordinatorStateDir.open(path.parent).read_root(datetime.now(UTC))
        assert str(caught.value).startswith(str(path))
        assert "\n" not in str(caught.value)
        path.unlink()
        if content is not None:
            with refused(ConfigError, name):
                CoordinatorStateDir.open(path.parent)
            path.write_bytes(content)


# A coordinator that begins rounds which its devices would refuse, because they keep a part to themselves.
DEVICES = 4


def test_a_method_that_shares_what_devices_keep_to_themselves_is_refused_before_they_are_asked(
    fleet_of: FleetOf,
) -> None:
    fleet = fleet_of(DEVICES, rounds=1, method="fedsa", aggregation__session_rounds=1)
    fleet.federate(fleet.grid())
    fleet.configure({"method": "head", "rounds": 2})  # shares another part, in a log of its own
    fleet.federate(fleet.grid())
    for method in ("fedit", "fedsb", "fedper"):
        fleet.configure({"method": method, "rounds": 3})
        with refused(ConfigError, "method", value=Part.B):
            fleet.federate(None)
    fleet.configure({"method": "fedsa", "rounds": 3})
    fleet.federate(fleet.grid())
    fleet.configure({"method": "fedit", "rounds": 4, "analytic.rounds": 1})  # nothing is left to train
    assert [record.version for record in fleet.federate(fleet.grid())] == [1, 2, 3, 4]


# A server's step so short that devices take each adapter for the one before: the coordinator keeps the cohort.
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
