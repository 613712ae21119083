"""Replies that Flower cannot read, through its own grid and the SuperLink's own handlers, without HTTPS between them.

The SuperLink checks the frame of a reply and not its content, so that any node can send these. It deletes replies when
it hands them out, and the grid reads all replies of a call before it returns one.
"""

import json
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.superlink.grid.http_grid import HttpGrid
from flwr.superlink.servicer.runtime import runtime_handlers

from aggregation.steps import BODY, RECORD, Step
from coordinator.transport import Reply, SystemClock, Transport

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
    transport = Transport(grid, SystemClock(), 5.0)
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
