"""Ask devices, through any Flower grid, and take the answers as they come.

Push and poll, never Flower's ``send_and_receive``, which sleeps three seconds a look. Who answers late, with an error
or not at all is lost for the exchange; what that means for the round is the protocol's to say.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from aggregation.steps import BODY, LAST_OFFER, RECORD, Step

FIRST_POLL = 0.01  # seconds; doubled at every empty look up to LAST_POLL
LAST_POLL = 0.5
MAX_REASON = 200  # characters of an error reply


class Clock(Protocol):
    """Seconds that pass. The system's, or a simulation's that does not wait."""

    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds since some fixed point."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Wait."""
        time.sleep(seconds)


@dataclass(frozen=True, slots=True)
class Reply:
    """One node's answer: ``body``, or why there is none. ``seen``: see ``steps.LAST_OFFER``."""

    node: int
    body: bytes | None
    reason: str = ""
    seen: bytes = b""


@dataclass(slots=True)
class Traffic:
    """Payload bytes over all devices: protocol messages and adapters, without the transport's own framing."""

    up: int = 0
    down: int = 0


@dataclass(slots=True)
class Wire:
    """A grid with a deadline. ``traffic`` counts until somebody takes it."""

    grid: Grid
    clock: Clock
    deadline: float  # seconds for one exchange
    traffic: Traffic = field(default_factory=Traffic)

    def nodes(self) -> tuple[int, ...]:
        """The nodes that the grid knows now, in ascending order."""
        return tuple(sorted(self.grid.get_node_ids()))

    def take_traffic(self) -> Traffic:
        """The bytes since the last call."""
        taken, self.traffic = self.traffic, Traffic()
        return taken

    def ask(
        self,
        step: Step,
        bodies: Mapping[int, bytes],
        group: str,
        beside: Mapping[int, Mapping[str, bytes]] | None = None,
    ) -> Iterator[Reply]:
        """Send each node its body and yield the answers in the order of their arrival, each node once.

        Args:
            step: What is asked.
            bodies: Node → protocol message.
            group: Flower's group id: the round.
            beside: Node → field → what else the message carries.
        """
        end = self.clock.now() + self.deadline  # pushing counts: Flower reckons a message's age from its making
        messages = []
        for node, body in bodies.items():
            fields = {BODY: body, **(beside or {}).get(node, {})}
            content = RecordDict({RECORD: ConfigRecord(dict(fields))})
            message = Message(content, node, step.message_type, group_id=group, ttl=self.deadline + LAST_POLL)
            messages.append(message)
            self.traffic.down += sum(map(len, fields.values()))
        # By id, not by place: for a message that it could not push one of Flower's grids returns None, another nothing.
        pushed = set(self.grid.push_messages(messages))
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        waiting = {message_id: node for message_id, node in nodes.items() if message_id in pushed}
        yield from (Reply(node, None, "could not be reached") for node in bodies if node not in waiting.values())
        yield from self._collect(waiting, end)

    def _collect(self, waiting: dict[str, int], end: float) -> Iterator[Reply]:
        pause = FIRST_POLL
        while waiting:
            arrived = list(self.grid.pull_messages(list(waiting)))
            for message in arrived:
                node = waiting.pop(message.metadata.reply_to_message_id, None)
                if node is not None:  # else its second reply, or one to another question
                    yield self._reply(node, message)
            if self.clock.now() >= end:
                break
            pause = FIRST_POLL if arrived else min(2 * pause, LAST_POLL)
            if waiting:
                self.clock.sleep(pause)
        yield from (Reply(node, None, "did not answer in time") for node in waiting.values())

    def _reply(self, node: int, message: Message) -> Reply:
        if message.has_error():
            return Reply(node, None, _one_line(message.error.reason or "failed"))
        record = message.content.config_records.get(RECORD)
        body = record.get(BODY) if record is not None else None
        if not isinstance(body, bytes):
            return Reply(node, None, "answered without a protocol body")
        found = record.get(LAST_OFFER) if record is not None else None
        seen = found if isinstance(found, bytes) else b""
        self.traffic.up += len(body) + len(seen)
        return Reply(node, body, seen=seen)


def _one_line(reason: str) -> str:
    """A device's own words, fit for a log: a line of its own would look like the coordinator's."""
    return "".join(c if c.isprintable() else " " for c in reason[:MAX_REASON])
