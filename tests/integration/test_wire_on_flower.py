"""The coordinator's wire on Flower's own link state: what the SuperLink does with late answers and absent nodes."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from secrets import token_bytes
from threading import Thread
from typing import Any

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from aggregation.steps import ADAPTER, BODY, RECORD, Step
from coordinator.wire import SystemClock, Wire

LINK_NODE = 1  # the SuperLink's own id
BESIDE = {ADAPTER: b"adapter"}  # what a message carries beside its body
HOURS = 3600.0  # seconds between heartbeats that nobody waits for


@dataclass
class Link:
    """A link state with a run, and the nodes that it knows."""

    state: Any
    grid: Any
    nodes: list[int]

    def wire(self, deadline: float) -> Wire:
        return Wire(self.grid, SystemClock(), deadline)

    def ask(self, wire: Wire, nodes: list[int] | None = None) -> dict[int, bytes | str]:
        """Node → its answer, or why there is none."""
        bodies = {node: b"to %d" % node for node in nodes or self.nodes}
        replies = list(wire.ask(Step.OFFER, bodies, "g", dict.fromkeys(bodies, BESIDE)))
        answers = {reply.node: reply.reason if reply.body is None else reply.body for reply in replies}
        assert len(answers) == len(replies), "a node answered twice"
        return answers

    def received(self, node: int) -> list[Message]:
        return list(self.state.get_message_ins(node, limit=None))

    def serve(self, node: int, *, after: float = 0.0, error: str | None = None, seconds: float = 5.0) -> Thread:
        """Answer the next message to ``node`` in the background, ``after`` so many seconds."""

        def work() -> None:
            end = time.monotonic() + seconds
            while not (messages := self.received(node)) and time.monotonic() < end:
                time.sleep(0.005)
            time.sleep(after)
            for message in messages:
                self.answer(message, error)

        thread = Thread(target=work)
        thread.start()
        return thread

    def answer(self, message: Message, error: str | None = None) -> str | None:
        """Store a reply as the SuperLink does; None if it refuses."""
        body = message.content.config_records[RECORD]
        assert body[ADAPTER] == BESIDE[ADAPTER]
        content = RecordDict({RECORD: ConfigRecord({BODY: b"got " + bytes(body[BODY])})})  # type: ignore[arg-type]
        reply = Message(Error(100, error), reply_to=message) if error else Message(content, reply_to=message)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        reply.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id  # this process is no node
        stored: str | None = self.state.store_message_res(reply)
        return stored


@pytest.fixture
def link() -> Link:
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager

    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    nodes = []
    for _ in range(3):
        node = state.create_node("owner", "owner", token_bytes(32), heartbeat_interval=HOURS)
        state.acknowledge_node_heartbeat(node, HOURS)
        nodes.append(node)
    run = state.create_run("a/b", "1", "c", {}, "@none/default", None, None, "flwr-serverapp")
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, LINK_NODE, 1
    grid = InMemoryGrid(factory)
    grid.set_run(state.get_run_info(run_ids=[run])[0])
    return Link(state, grid, sorted(nodes))


def test_every_node_gets_its_own_body_and_each_answer_has_its_node(link: Link) -> None:
    wire, threads = link.wire(5.0), [link.serve(node) for node in link.nodes]
    assert link.ask(wire) == {node: b"got to %d" % node for node in link.nodes}
    assert wire.nodes() == tuple(link.nodes)
    assert wire.take_traffic().up == sum(len(b"got to %d" % node) for node in link.nodes)
    for thread in threads:
        thread.join()


def test_a_node_that_flower_does_not_know_shifts_nobodys_answer(link: Link) -> None:
    stranger = 7
    threads = [link.serve(node) for node in link.nodes]
    answers = link.ask(link.wire(5.0), [stranger, *link.nodes])
    assert answers == {stranger: "could not be reached"} | {node: b"got to %d" % node for node in link.nodes}
    for thread in threads:
        thread.join()


def test_an_answer_is_handed_on_before_the_others_have_come(link: Link) -> None:
    first, second, third = link.nodes
    replies = link.wire(5.0).ask(Step.OFFER, dict.fromkeys(link.nodes, b"x"), "g", dict.fromkeys(link.nodes, BESIDE))
    thread = link.serve(second)
    assert next(replies).node == second
    threads = [thread, link.serve(first), link.serve(third)]
    assert {reply.node for reply in replies} == {first, third}
    for thread in threads:
        thread.join()


def test_who_is_too_late_is_lost_and_the_late_answer_goes_nowhere(link: Link) -> None:
    wire, late = link.wire(0.3), link.nodes[0]
    threads = [link.serve(node) for node in link.nodes[1:]]
    kept = next_message(link, late)
    begin = time.monotonic()
    answers = link.ask(wire)
    assert time.monotonic() - begin < 2.0
    assert isinstance(answers[late], str)
    assert all(isinstance(answers[node], bytes) for node in link.nodes[1:])
    time.sleep(0.6)  # past Flower's own limit for the message
    assert link.answer(kept()) is None
    again = [link.serve(node) for node in link.nodes]
    assert link.ask(link.wire(5.0)) == {node: b"got to %d" % node for node in link.nodes}
    for thread in threads + again:
        thread.join()


def test_a_node_that_comes_back_late_does_not_get_the_old_message(link: Link) -> None:
    assert all(isinstance(answer, str) for answer in link.ask(link.wire(0.1)).values())
    time.sleep(0.7)
    assert [link.received(node) for node in link.nodes] == [[], [], []]


def test_a_node_that_signed_off_is_lost_at_once(link: Link) -> None:
    gone = link.nodes[1]
    link.state.deactivate_node(gone)
    threads = [link.serve(node) for node in link.nodes if node != gone]
    begin = time.monotonic()
    answers = link.ask(link.wire(30.0))
    assert time.monotonic() - begin < 5.0
    assert "unavailable" in str(answers[gone]).lower()
    assert gone not in link.wire(30.0).nodes()
    for thread in threads:
        thread.join()


def test_a_devices_error_cannot_look_like_a_line_of_the_coordinators_log(link: Link) -> None:
    liar = link.nodes[0]
    threads = [link.serve(liar, error="no\nround 9 of 9: 99 survivors\x1b[2J" + 1000 * "!")]
    threads += [link.serve(node) for node in link.nodes[1:]]
    reason = link.ask(link.wire(5.0))[liar]
    assert isinstance(reason, str)
    assert reason.isprintable()
    assert reason.startswith("no round 9")
    assert len(reason) <= 200
    for thread in threads:
        thread.join()


def next_message(link: Link, node: int) -> Callable[[], Message]:
    """Take the next message to ``node`` in the background; the function that is returned gives it."""
    taken: list[Message] = []

    def work() -> None:
        end = time.monotonic() + 5.0
        while not taken and time.monotonic() < end:
            taken.extend(link.received(node))
            time.sleep(0.005)

    thread = Thread(target=work)
    thread.start()

    def get() -> Message:
        thread.join()
        return taken[0]

    return get
