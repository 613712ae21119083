"""Ask devices over any Flower grid, and take the answers as they arrive.

Messages are pushed and polled: Flower's own ``send_and_receive`` sleeps three seconds between two polls. A node that
answers late, with an error or not at all has no answer in the exchange; the protocol decides what follows from that.

Each reply is pulled by a call of its own. Flower reads all replies of a call at once, after its SuperLink has deleted
them: one that it cannot read raises any kind of exception, and the other replies of the call are lost."""

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid as Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from aggregation.errors import ProtocolError
from aggregation.steps import BODY, RECORD, Step

RUN_ID = SERVER_NODE = 1  # where Flower did not start the process
FIRST_POLL = 0.01  # seconds; doubled at every empty look up to LAST_POLL
LAST_POLL = 0.5
LOOK = 0.2  # seconds between two checks whether devices that wait have come
MAX_REASON = 200  # characters of an error reply
BY_THE_LINK = (  # error replies by Flower instead of a node
    ErrorCode.MESSAGE_UNAVAILABLE,
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE,
    ErrorCode.NODE_UNAVAILABLE,
)
log = logging.getLogger("edgeadapt.coordinator")


class Clock:
    """Time in seconds, by the system. A simulation's does not wait, and that of a grid may know when answers arrive."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, seconds: float) -> None:
        """Pause between two polls of the grid: Flower's grids do not say when an answer arrives."""
        self.sleep(seconds)


def identify() -> None:
    """Set the identity of this process, which Flower's Message reads, where Flower did not start it."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1


class OwnGrid(Grid):
    """What grids of our own need of Flower's private parts."""

    def __init__(self) -> None:
        self._run = Run.create_empty(RUN_ID)

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError("push the messages, and pull the replies")  # as ``Transport`` does

    def arrived(self, waiting: Collection[str]) -> Iterable[str]:
        """Choose the requests whose replies are pulled now, of those that are ``waiting`` for one: all, where a grid
        has to be asked for each; else those whose replies are there, in the order of arrival."""
        return waiting

    def keep(self, devices: Collection[str]) -> None:
        """Keep these devices for a session, until the next call. A grid with a limit may exchange the others for those
        that wait."""

    def turns_over(self) -> float:
        """Seconds for which a session that begins waits for devices whose turn it is; 0 if there are none."""
        return 0.0

    @staticmethod
    def number(message: Message, name: str) -> None:
        """Give a message its id, as Flower's own grids do."""
        message.metadata.__dict__["_message_id"] = name


@dataclass(frozen=True, slots=True)
class Reply:
    """One node's answer: ``body``, or the reason for its absence. ``silent``: the reason does not come from the device,
    which may not have seen the request."""

    node: int
    body: bytes | None
    reason: str = ""
    silent: bool = False

    def answer(self) -> bytes:
        if self.body is None:
            raise ProtocolError(self.reason)
        return self.body


@dataclass(slots=True)
class PayloadBytes:
    """Bytes of protocol messages and adapters over all devices, without the framing of Flower and HTTPS."""

    up: int = 0
    down: int = 0


@dataclass(frozen=True, slots=True)
class Enough:
    """Ends an exchange early: ``grace`` seconds after ``answers`` devices have answered."""

    answers: int
    grace: float


@dataclass(slots=True)
class Transport:
    """A grid with a deadline for each exchange, which counts the bytes that it carries."""

    grid: Grid
    clock: Clock
    deadline: float  # seconds for one exchange
    carried: PayloadBytes = field(default_factory=PayloadBytes)

    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted(self.grid.get_node_ids()))

    def keep(self, devices: Collection[str] = ()) -> None:
        """Keep these devices for a session, as ``OwnGrid.keep``. Those of Flower's own grids stay."""
        if isinstance(self.grid, OwnGrid):
            self.grid.keep(devices)

    def await_turns(self) -> None:
        """Wait until those devices are there whose turn it is, or have stayed away."""
        begin, grid, said = self.clock.now(), self.grid, False
        while isinstance(grid, OwnGrid) and (left := grid.turns_over() - (self.clock.now() - begin)) > 0:
            if not said:
                log.info("the gateway is full: waiting up to %.0f s for devices whose turn it is", left)
                said = True
            self.clock.sleep(LOOK)

    def take_carried(self) -> PayloadBytes:
        taken, self.carried = self.carried, PayloadBytes()
        return taken

    def ask(
        self,
        step: Step,
        bodies: Mapping[int, bytes],
        group: str,
        attachments: Mapping[int, Mapping[str, bytes]] | None = None,
        enough: Enough | None = None,
    ) -> Iterator[Reply]:
        """Send each node its body and yield the answers in the order of arrival, one for each node. ``group``: Flower's
        group id: the round, or the attempt at a session. ``attachments``: node → field → what its message carries
        besides the body. ``enough``: when to stop before the deadline, if not all answer."""
        end = self.clock.now() + self.deadline  # pushing counts too: a message ages from the moment it is made
        messages = []
        for node, body in bodies.items():
            fields = {BODY: body, **(attachments or {}).get(node, {})}
            content = RecordDict({RECORD: ConfigRecord(dict(fields))})
            message = Message(content, node, step.message_type, group_id=group, ttl=self.deadline + LAST_POLL)
            messages.append(message)
            self.carried.down += sum(map(len, fields.values()))
        # By id, not by position: for a message that it could not push one of Flower's grids returns None, another one
        # returns nothing.
        pushed = set(self.grid.push_messages(messages))
        nodes = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        waiting = {message_id: node for message_id, node in nodes.items() if message_id in pushed}
        reached = set(waiting.values())
        yield from (Reply(node, None, "could not be reached", silent=True) for node in bodies if node not in reached)
        yield from self._collect(waiting, end, enough)

    def _collect(self, waiting: dict[str, int], end: float, enough: Enough | None) -> Iterator[Reply]:
        pause, answers, late = FIRST_POLL, 0, "did not answer in time"
        while waiting:
            arrived = False
            ready = self.grid.arrived(waiting) if isinstance(self.grid, OwnGrid) else waiting
            for message_id in [*ready]:
                if reply := self._pull(message_id, waiting[message_id]):
                    del waiting[message_id]
                    arrived = True
                    answers += reply.body is not None
                    yield reply
            now = self.clock.now()
            if enough and answers >= enough.answers:
                end, enough, late = min(end, now + enough.grace), None, "answered later than enough others"
            if now >= end:
                break
            pause = FIRST_POLL if arrived else min(2 * pause, LAST_POLL)
            if waiting:
                self.clock.wait(pause)
        yield from (Reply(node, None, late, silent=True) for node in waiting.values())

    def _pull(self, message_id: str, node: int) -> Reply | None:
        """Pull the reply to a message; None before it arrives. A grid may also return replies to other messages."""
        try:
            for message in self.grid.pull_messages([message_id]):
                if message.metadata.reply_to_message_id == message_id:
                    return self._reply(node, message)
        except Exception as error:  # whatever Flower raises on bytes that the node chose
            log.warning("the reply of node %d cannot be read: %s", node, type(error).__name__)
            return Reply(node, None, "unreadable reply")
        return None

    def _reply(self, node: int, message: Message) -> Reply:
        if message.has_error():
            silent = message.error.code in BY_THE_LINK
            return Reply(node, None, _one_line(message.error.reason or "failed"), silent)
        record = message.content.get(RECORD)
        body = record.get(BODY) if isinstance(record, ConfigRecord) else None
        if not isinstance(body, bytes):
            return Reply(node, None, "answered without a protocol body")
        self.carried.up += len(body)
        return Reply(node, body)


def _one_line(reason: str) -> str:
    """Make a device's reason safe for a log: a line break in it could imitate a line of the coordinator's."""
    return "".join(c if c.isprintable() else " " for c in reason[:MAX_REASON])
