"""Flower's own link state and grid in this process, without a SuperLink around them."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from secrets import token_bytes
from threading import Event, Thread
from types import MappingProxyType
from typing import Any

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.server.superlink.linkstate import LinkStateFactory
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.inmemory_grid import InMemoryGrid

from aggregation.steps import ADAPTER, BODY, RECORD, Step
from client.node.app import app as client_app
from coordinator.transport import Clock, Transport

LINK_NODE = 1  # the SuperLink's own id
HOURS = 3600.0  # seconds between heartbeats that nobody waits for


@dataclass
class Link:
    """A link state with a run, and the nodes that it knows."""

    state: Any
    grid: Any
    nodes: list[int]
    attachments = MappingProxyType({ADAPTER: b"adapter"})  # what a message of ``ask`` carries besides its body

    def transport(self, deadline: float) -> Transport:
        return Transport(self.grid, Clock(), deadline)

    def ask(self, transport: Transport, nodes: list[int] | None = None) -> dict[int, bytes | str]:
        """Node → its answer, or the reason for its absence."""
        bodies = {node: b"to %d" % node for node in nodes or self.nodes}
        replies = list(transport.ask(Step.OFFER, bodies, "g", dict.fromkeys(bodies, self.attachments)))
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
        """Answer with what came; None if the SuperLink refuses."""
        body = message.content.config_records[RECORD]
        assert body[ADAPTER] == self.attachments[ADAPTER]
        content = RecordDict({RECORD: ConfigRecord({BODY: b"got " + bytes(body[BODY])})})  # type: ignore[arg-type]
        return self.store(Message(Error(100, error), reply_to=message) if error else Message(content, reply_to=message))

    def store(self, reply: Message) -> str | None:
        """Store a reply as the SuperLink does; None if it refuses."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        stored: str | None = self.state.store_message_res(reply)
        return stored


def link_of(count: int) -> Link:
    """A link state with a run and so many nodes."""
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.federation import NoOpFederationManager

    factory = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = factory.state()
    nodes = []
    for _ in range(count):
        node = state.create_node("owner", "owner", token_bytes(32), heartbeat_interval=HOURS)
        state.acknowledge_node_heartbeat(node, HOURS)
        nodes.append(node)
    run = state.create_run("a/b", "1", "c", {}, "@none/default", None, None, "flwr-serverapp")
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run, LINK_NODE, 1
    grid = InMemoryGrid(factory)
    grid.set_run(state.get_run_info(run_ids=[run])[0])
    return Link(state, grid, sorted(nodes))


@contextmanager
def living(link: Link, state_dirs: Iterable[str]) -> Iterator[None]:
    """The link's nodes are devices while the block runs: each answers with the real ClientApp."""
    over, at = Event(), zip(link.nodes, state_dirs, strict=True)
    contexts = {node: Context(1, node, {"state": state_dir}, RecordDict(), {}) for node, state_dir in at}

    def live() -> None:
        while not over.wait(0.005):
            for node, context in contexts.items():
                for message in link.received(node):
                    link.store(client_app(message, context))

    thread = Thread(target=live)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
