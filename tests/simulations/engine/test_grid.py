"""The in-process grid: Flower's contract, in virtual time, with faults that only the seed decides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given
from hypothesis import strategies as st

from aggregation.steps import BODY, RECORD, Step
from simulations.engine.grid import ROUND_STEPS, DeliveryOutcome, FaultModel, GridLog, InProcessGrid

NODES = (2, 3, 4, 5, 6, 7, 8, 9)
NO_FAULTS = FaultModel(seed=0, message_loss=0.0, mean_delay=1.0)


class Echo:
    """A device's app that answers with its node's number, and records which nodes were asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, message: Message, context: Context) -> Message:
        self.asked.append(context.node_id)
        return Message(RecordDict({"r": ConfigRecord({"node": context.node_id})}), reply_to=message)


def grid_of(faults: FaultModel, app: Any = None) -> InProcessGrid:
    return InProcessGrid(app or Echo(), {node: f"state-{node}" for node in NODES}, faults)


def messages(grid: InProcessGrid, step: Step, group: str = "1", nodes: Sequence[int] = NODES) -> list[Message]:
    return [grid.create_message(RecordDict(), step.message_type, node, group) for node in nodes]


def senders(replies: Any) -> list[int]:
    return [reply.metadata.src_node_id for reply in replies]


# Faults.


@given(st.integers(0, 2**32), st.sampled_from(["1", "2", "session-1-1"]), st.sampled_from(Step), st.permutations(NODES))
def test_an_outcome_depends_on_seed_round_step_and_device_only(
    seed: int, group: str, step: Step, order: list[int]
) -> None:
    faults = FaultModel(seed, message_loss=0.3, mean_delay=2.0, forced_dropouts=2)
    outcomes = faults.outcomes(group, step, NODES)
    assert faults.outcomes(group, step, order) == outcomes
    unforced = FaultModel(seed, message_loss=0.3, mean_delay=2.0)
    assert unforced.outcomes(group, step, order[:3]) == {
        node: unforced.outcomes(group, step, NODES)[node] for node in order[:3]
    }


def test_other_seeds_rounds_steps_and_devices_have_other_outcomes() -> None:
    delays = {
        faults.outcomes(group, step, [node])[node].delay
        for faults in (FaultModel(1, 0, 1.0), FaultModel(2, 0, 1.0))
        for group in ("1", "2", "11", "session-1-1", "session-1-2")
        for step in (*Step, None)
        for node in (2, 3)
    }
    assert len(delays) == 2 * 5 * 7 * 2


def test_devices_come_and_go_with_the_hours_and_the_same_ones_are_there_at_the_same_share() -> None:
    faults = FaultModel(seed=1, message_loss=0.0, mean_delay=1.0, availability=(1.0, 0.3, 0.6))
    nodes = range(2, 1002)

    def there(group: str) -> set[int]:
        return {node for node, outcome in faults.outcomes(group, Step.PLAN, nodes).items() if not outcome.request_lost}

    night, morning, day = there("1"), there("session-2-1"), there("3")
    assert night < morning < day == set(nodes)
    assert abs(len(night) - 300) < 75
    assert abs(len(morning) - 600) < 75
    assert there("4") == night


def test_messages_are_lost_with_the_probability_of_the_settings() -> None:
    """Accepts the right probability and rejects two thirds and three halves of it."""
    outcomes = FaultModel(seed=3, message_loss=0.1, mean_delay=4.0).outcomes("1", Step.PLAN, range(4000)).values()
    for share in ([outcome.request_lost for outcome in outcomes], [outcome.reply_lost for outcome in outcomes]):
        assert 0.08 < np.mean(share) < 0.12
    assert 3.6 < np.mean([outcome.delay for outcome in outcomes]) < 4.4


@given(st.integers(0, 2**32), st.integers(1, 300))
def test_a_forced_dropout_happens_in_every_round_at_a_step_that_varies(seed: int, first: int) -> None:
    faults = FaultModel(seed, message_loss=0.0, mean_delay=1.0, forced_dropouts=1)
    steps = []
    for number in range(first, first + 3):
        found = {step: [n for n, o in faults.outcomes(str(number), step, NODES).items() if lost(o)] for step in Step}
        assert [len(nodes) for nodes in found.values() if nodes] == [1]
        steps.append(next(step for step, nodes in found.items() if nodes))
    assert set(steps) == {Step.PLAN, Step.SURVIVORS, Step.UNMASK}


def lost(outcome: DeliveryOutcome) -> bool:
    return outcome.request_lost or outcome.reply_lost


def test_forced_dropouts_vary_and_lose_the_request_or_the_reply() -> None:
    faults = FaultModel(seed=0, message_loss=0.0, mean_delay=1.0, forced_dropouts=1)
    found = [
        (node, outcome.request_lost)
        for number in range(1, 60)
        for node, outcome in faults.outcomes(str(number), ROUND_STEPS[number % 3], NODES).items()
        if lost(outcome)
    ]
    assert {node for node, _ in found} == set(NODES)
    assert {request for _, request in found} == {True, False}


def test_forced_dropouts_are_at_most_all_devices_and_none_during_the_setup_of_a_session() -> None:
    faults = FaultModel(seed=0, message_loss=0.0, mean_delay=1.0, forced_dropouts=99)
    assert all(lost(outcome) for outcome in faults.outcomes("3", Step.PLAN, NODES).values())
    assert not any(lost(outcome) for outcome in faults.outcomes("session-1-1", Step.OFFER, NODES).values())


@pytest.mark.parametrize(("forced", "loss"), [(0, 0.0), (1, 0.0), (2, 0.05), (99, 0.0)])
def test_the_probability_of_dropouts_is_the_frequency_of_outcomes(forced: int, loss: float) -> None:
    faults = FaultModel(seed=1, message_loss=loss, mean_delay=1.0, forced_dropouts=forced)
    expected, rounds = faults.dropout_probabilities(4), 1000
    counts = np.zeros(5)
    for number in range(rounds):
        outcomes = [faults.outcomes(str(number), step, NODES[:4]) for step in ROUND_STEPS]
        counts[
            sum(any(each[node].reply_lost and not each[node].request_lost for each in outcomes) for node in NODES[:4])
        ] += 1
    assert expected.sum() == pytest.approx(1)
    assert np.abs(counts / rounds - expected).max() < 4 * np.sqrt(0.25 / rounds)  # standard errors


# Flower's contract.


def test_each_message_is_answered_once_in_another_order_than_sent() -> None:
    grid = grid_of(NO_FAULTS)
    sent = messages(grid, Step.PLAN)
    replies = list(grid.send_and_receive(sent))
    assert sorted(senders(replies)) == list(NODES)
    assert senders(replies) != list(NODES)
    asked = {m.metadata.message_id: m.metadata.dst_node_id for m in sent}
    assert {r.metadata.reply_to_message_id: r.metadata.src_node_id for r in replies} == asked
    assert all(r.metadata.dst_node_id == 1 and r.metadata.group_id == "1" for r in replies)
    assert not grid.pull_messages(asked)


def test_time_passes_only_by_sleeping_and_a_reply_arrives_after_its_delay() -> None:
    app = Echo()
    grid = grid_of(NO_FAULTS, app)
    ids = list(grid.push_messages(messages(grid, Step.PLAN)))
    assert list(grid.pull_messages(ids)) == []
    assert app.asked == []
    delays = {node: outcome.delay for node, outcome in NO_FAULTS.outcomes("1", Step.PLAN, NODES).items()}
    grid.clock.sleep(sorted(delays.values())[2])
    assert senders(grid.pull_messages(ids)) == sorted(delays, key=delays.__getitem__)[:3]
    assert grid.clock.now() == sorted(delays.values())[2]


def test_a_timeout_ends_the_wait_with_the_replies_that_arrived_in_time() -> None:
    grid = grid_of(NO_FAULTS)
    delays = sorted(outcome.delay for outcome in NO_FAULTS.outcomes("1", Step.PLAN, NODES).values())
    assert len(list(grid.send_and_receive(messages(grid, Step.PLAN), timeout=delays[3]))) == 4
    assert grid.clock.now() == delays[3]
    assert len(list(grid.send_and_receive(messages(grid, Step.SURVIVORS), timeout=1e6))) == len(NODES)
    assert grid.clock.now() < 1e3


def test_a_lost_request_never_reaches_the_device_and_a_lost_reply_does() -> None:
    faults = FaultModel(seed=11, message_loss=0.4, mean_delay=1.0)
    app = Echo()
    grid, outcomes = grid_of(faults, app), faults.outcomes("1", Step.PLAN, NODES)
    replies = senders(grid.send_and_receive(messages(grid, Step.PLAN)))
    assert sorted(app.asked) == [node for node in NODES if not outcomes[node].request_lost]
    assert sorted(replies) == [node for node in NODES if not lost(outcomes[node])]
    assert {(outcome.request_lost, outcome.reply_lost) for outcome in outcomes.values()} >= {
        (True, False),
        (False, True),
    }


def test_the_log_counts_what_every_device_sent_also_in_answers_that_were_lost(tmp_path: Path) -> None:
    def answer(message: Message, context: Context) -> Message:
        return Message(RecordDict({RECORD: ConfigRecord({BODY: bytes(10)})}), reply_to=message)

    faults, log = FaultModel(seed=1, message_loss=0.3, mean_delay=1.0), GridLog(tmp_path / "grid.json")
    grid = InProcessGrid(answer, {node: f"state-{node}" for node in NODES}, faults, log=log)
    replies = list(grid.send_and_receive(messages(grid, Step.PLAN, "3")))
    again = list(grid.send_and_receive(messages(grid, Step.PLAN, "3-2")))
    groups = [faults.outcomes(group, Step.PLAN, NODES).values() for group in ("3", "3-2")]
    sent = sum(not outcome.request_lost for outcomes in groups for outcome in outcomes)
    assert len(replies) + len(again) < sent < 2 * len(NODES)
    log.write()
    kept = GridLog.open(log.path)
    assert (kept.sent, kept.devices) == ({3: 10 * sent}, {3: len(NODES)})
    kept.begin(2, within_session=True)  # round 3 begins again
    assert (kept.sent, kept.devices, GridLog.open(log.path).resumed) == ({}, {}, (3,))


def test_a_device_keeps_its_context_from_message_to_message() -> None:
    seen: list[int] = []

    def count(message: Message, context: Context) -> Message:
        assert context.node_config == {"state": f"state-{context.node_id}"}
        record = context.state.setdefault("count", MetricRecord({"n": 0}))
        record["n"] += 1
        seen.append(record["n"])
        return Message(RecordDict(), reply_to=message)

    grid = grid_of(NO_FAULTS, count)
    for _ in range(2):
        list(grid.send_and_receive(messages(grid, Step.PLAN)))
    assert seen == [1] * len(NODES) + [2] * len(NODES)
    assert list(grid.get_node_ids()) == list(NODES)
    grid.set_run(grid.run)


@pytest.mark.parametrize("loss", [0.0, 0.2])
def test_flowers_own_federated_averaging_runs_on_the_grid(loss: float) -> None:
    device = ClientApp()

    @device.train()
    def train(message: Message, context: Context) -> Message:
        start = message.content.array_records["arrays"].to_numpy_ndarrays()[0]
        arrays = ArrayRecord([start + context.node_id])
        return Message(RecordDict({"arrays": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    grid = grid_of(FaultModel(seed=1, message_loss=loss, mean_delay=1.0), device)
    start = ArrayRecord({"0": Array(np.zeros(3, np.float32))})
    strategy = FedAvg(fraction_evaluate=0.0)
    result = strategy.start(grid=grid, initial_arrays=start, num_rounds=2)
    mean = result.arrays.to_numpy_ndarrays()[0]
    if loss:
        assert 2 * min(NODES) < mean[0] < 2 * max(NODES)
    else:
        assert np.allclose(mean, 2 * np.mean(NODES))
