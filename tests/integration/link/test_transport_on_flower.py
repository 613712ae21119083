"""The coordinator's transport on Flower's own link state, with late answers and absent nodes."""

import json
import time
from collections.abc import Callable
from functools import partial
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from aggregation.steps import BODY, RECORD, Step
from coordinator.transport import Clock, Reply, Transport


def test_every_node_gets_its_own_body_and_each_answer_has_its_node(link: Any) -> None:
    transport, threads = link.transport(5.0), [link.serve(node) for node in link.nodes]
    assert link.ask(transport) == {node: b"got to %d" % node for node in link.nodes}
    assert transport.nodes() == tuple(link.nodes)
    assert transport.take_carried().up == sum(len(b"got to %d" % node) for node in link.nodes)
    for thread in threads:
        thread.join()


def test_an_unknown_node_does_not_shift_the_answers_of_others(link: Any) -> None:
    stranger = 7
    threads = [link.serve(node) for node in link.nodes]
    answers = link.ask(link.transport(5.0), [stranger, *link.nodes])
    assert answers == {stranger: "could not be reached"} | {node: b"got to %d" % node for node in link.nodes}
    for thread in threads:
        thread.join()


def test_an_answer_is_yielded_before_the_others_have_arrived(link: Any) -> None:
    first, second, third = link.nodes
    bodies, attachments = dict.fromkeys(link.nodes, b"x"), dict.fromkeys(link.nodes, link.attachments)
    replies = link.transport(5.0).ask(Step.OFFER, bodies, "g", attachments)
    thread = link.serve(second)
    assert next(replies).node == second
    threads = [thread, link.serve(first), link.serve(third)]
    assert {reply.node for reply in replies} == {first, third}
    for thread in threads:
        thread.join()


def test_a_node_that_answers_late_has_no_answer_and_the_late_one_is_refused(link: Any) -> None:
    transport, late = link.transport(0.3), link.nodes[0]
    threads = [link.serve(node) for node in link.nodes[1:]]
    kept = next_message(link, late)
    begin = time.monotonic()
    answers = link.ask(transport)
    assert time.monotonic() - begin < 2.0
    assert isinstance(answers[late], str)
    assert all(isinstance(answers[node], bytes) for node in link.nodes[1:])
    time.sleep(0.6)  # past Flower's own limit for the message
    assert link.answer(kept()) is None
    again = [link.serve(node) for node in link.nodes]
    assert link.ask(link.transport(5.0)) == {node: b"got to %d" % node for node in link.nodes}
    for thread in threads + again:
        thread.join()


def test_a_node_that_comes_back_late_does_not_get_the_old_message(link: Any) -> None:
    assert all(isinstance(answer, str) for answer in link.ask(link.transport(0.1)).values())
    time.sleep(0.7)
    assert [link.received(node) for node in link.nodes] == [[], [], []]


def test_a_node_that_signed_off_has_no_answer_at_once(link: Any) -> None:
    gone = link.nodes[1]
    link.state.deactivate_node(gone)
    threads = [link.serve(node) for node in link.nodes if node != gone]
    begin = time.monotonic()
    answers = link.ask(link.transport(30.0))
    assert time.monotonic() - begin < 5.0
    assert "unavailable" in str(answers[gone]).lower()
    assert gone not in link.transport(30.0).nodes()
    for thread in threads:
        thread.join()


def test_a_devices_error_cannot_imitate_a_line_of_the_coordinators_log(link: Any) -> None:
    liar = link.nodes[0]
    threads = [link.serve(liar, error="no\nround 9 of 9: 99 survivors\x1b[2J" + 1000 * "!")]
    threads += [link.serve(node) for node in link.nodes[1:]]
    reason = link.ask(link.transport(5.0))[liar]
    assert isinstance(reason, str)
    assert reason.isprintable()
    assert reason.startswith("no round 9")
    assert len(reason) <= 200
    for thread in threads:
        thread.join()


def next_message(link: Any, node: int) -> Callable[[], Message]:
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


# Replies that Flower cannot read


CALLS = {
    "PushMessages": "push_messages",
    "PullMessages": "pull_messages",
    "PushObject": "push_object",
    "PullObject": "pull_object",
    "ConfirmMessageReceived": "confirm_message_received",
}
WITHOUT_A_VALUE = b"\x0a\x08\x0a\x04body\x12\x00"  # an item of a ConfigRecord: a key, and no value
NESTED = b'{"record": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
SPOILED = pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("ConfigRecord", WITHOUT_A_VALUE),
        ("ConfigRecord", b"\xff no protobuf"),
        ("RecordDict", b"no JSON"),
        ("RecordDict", b"{}"),
        ("RecordDict", NESTED),
        ("Message", b"\xff no protobuf"),
        ("Message", b""),
    ],
)


@pytest.fixture
def grid(link: Any) -> HttpGrid:
    """The grid of a deployment, whose calls go straight to the SuperLink's handlers."""
    made, task = HttpGrid(token="unused"), SimpleNamespace(run_id=link.grid.run.run_id)  # noqa: S106
    handlers = {
        call: partial(_called, getattr(runtime_handlers, name), link.state, task) for call, name in CALLS.items()
    }
    made._client = SimpleNamespace(**handlers)  # type: ignore[assignment]
    made.set_run(link.grid.run)
    return made


def _called(handler: Callable[..., Any], state: Any, task: Any, request: Any) -> Any:
    return handler(request, state, task)


def packed(kind: str, child: str, body: bytes) -> bytes:
    return f"{kind} {child} {len(body)}".encode() + b"\x00" + body


def answer(link: Any, message: Message, spoiled: tuple[str, bytes] | None = None) -> None:
    """Answer ``message``, with another body in the object of a kind. Objects are named by their content."""
    record, honest = ConfigRecord({BODY: b"got it"}), Message(RecordDict(), reply_to=message)
    bodies = {
        "ConfigRecord": record.deflate().partition(b"\x00")[2],
        "RecordDict": b"",
        "Message": honest.deflate().partition(b"\x00")[2],
    } | dict([spoiled] if spoiled else [])
    inner = packed("ConfigRecord", "", bodies["ConfigRecord"])
    names = json.dumps({RECORD: get_object_id(inner)}).encode()
    middle = packed("RecordDict", get_object_id(inner), bodies["RecordDict"] or names)
    outer = packed("Message", get_object_id(middle), bodies["Message"])
    tree = ObjectTree()
    for content in (inner, middle, outer):
        tree = ObjectTree(object_id=get_object_id(content), children=[tree] if tree.object_id else [])
    honest.metadata.__dict__["_message_id"] = tree.object_id
    session = link.state.start_session(honest.metadata.run_id)
    stored, wanted = link.state.store_message_and_object_tree(honest, tree, session)
    assert stored
    for content in (inner, middle, outer):
        if get_object_id(content) in wanted:
            assert link.state.store_object(honest.metadata.run_id, session, get_object_id(content), content)


def ask(link: Any, grid: HttpGrid, spoil: Callable[[list[Message]], tuple[str, bytes]]) -> dict[int, Reply]:
    """Ask every node. All answers are there before the first look; that of the first node is spoiled.

    ``spoil``: the messages to all nodes → which object of the answer is spoiled, and by what.
    """
    transport = Transport(grid, Clock(), 5.0)
    push = grid.push_messages

    def pushed(messages: Any) -> Any:
        ids = push(messages)
        first, *others = [link.received(node)[0] for node in link.nodes]
        answer(link, first, spoil([first, *others]))
        for message in others:
            answer(link, message)
        return ids

    grid.push_messages = pushed  # type: ignore[method-assign]
    bodies = {node: b"to %d" % node for node in link.nodes}
    return {reply.node: reply for reply in transport.ask(Step.OFFER, bodies, "g")}


@SPOILED
def test_an_unreadable_reply_costs_the_answer_of_its_node_and_of_no_other(
    link: Any, grid: HttpGrid, kind: str, body: bytes
) -> None:
    replies = ask(link, grid, lambda _: (kind, body))
    assert replies[link.nodes[0]].body is None
    assert {replies[node].body for node in link.nodes[1:]} == {b"got it"}


@SPOILED
def test_pulled_with_the_others_it_would_end_the_run(
    link: Any, grid: HttpGrid, monkeypatch: pytest.MonkeyPatch, kind: str, body: bytes
) -> None:
    asked: list[str] = []
    pull = grid.pull_messages

    def together(transport: Transport, waiting: dict[str, int], end: float) -> Any:
        asked.extend(waiting)
        return iter(list(pull(asked)))

    monkeypatch.setattr(Transport, "_collect", together)
    with pytest.raises(Exception) as caught:  # noqa: PT011  # whatever Flower raises
        ask(link, grid, lambda _: (kind, body))
    assert not isinstance(caught.value, AssertionError)
    again = list(pull(asked))
    assert all(message.has_error() for message in again)  # the answers of the others are lost


def test_a_reply_whose_content_names_the_message_to_another_node_is_not_that_nodes_answer(
    link: Any, grid: HttpGrid
) -> None:
    """The SuperLink compares the frame with the node's own message; the grid believes the content."""

    def claim(messages: list[Message]) -> tuple[str, bytes]:
        stolen = Message(RecordDict(), reply_to=messages[1])
        return "Message", stolen.deflate().partition(b"\x00")[2]

    replies = ask(link, grid, claim)
    assert replies[link.nodes[0]].body is None
    assert {replies[node].body for node in link.nodes[1:]} == {b"got it"}
