"""An in-process Flower grid with weather: the real ServerApp and ClientApp run on it unchanged, in no real time.

Messages are delayed, reordered and lost as a seed says. Time is virtual: waiting for a reply costs nothing, and a
device that is too late is too late. Training counts for no time at all, so a run is the same on any machine.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from aggregation.steps import Step

RUN_ID = 1
SERVER_NODE = 1
ROUND_STEPS = (Step.PLAN, Step.SURVIVORS, Step.UNMASK)  # where a device can be lost in a round
SHORT_ROUND_STEPS = (Step.PLAN, Step.UNMASK)  # of an honest-but-curious session, which has no consistency step


class VirtualClock:
    """Seconds that pass only when somebody sleeps. ``coordinator.transport.Clock`` for simulations."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """Virtual seconds since the start."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Let ``seconds`` pass at once."""
        self._now += seconds


@dataclass(frozen=True, slots=True)
class DeliveryOutcome:
    """What becomes of a message: lost before the device sees it, lost on the way back, or back after ``delay`` s."""

    request_lost: bool
    reply_lost: bool
    delay: float


@dataclass(frozen=True, slots=True)
class FaultModel:
    """Seeded fates. They depend on seed, group, step and who is asked, never on what was sent before: a resumed run has
    the weather that it would have had."""

    seed: int
    loss: float  # probability that a request or its reply is lost, each
    delay: float  # mean of an exponential, virtual seconds
    victims: int = 0  # devices lost for certain in every round, at one of ``steps`` by turns
    steps: tuple[Step, ...] = ROUND_STEPS

    def fates(self, group: str, step: Step | None, nodes: Sequence[int]) -> dict[int, DeliveryOutcome]:
        """The fate of the message to each of ``nodes``.

        Args:
            group: The round, or the session that is being made.
            step: What is asked; nothing where it is no step of the protocol, as from one of Flower's own strategies.
            nodes: Who is asked.
        """
        victims = self._victims(group, step, nodes)
        return {node: self._fate(group, step, node, node in victims) for node in nodes}

    def _fate(self, group: str, step: Step | None, node: int, victim: bool) -> DeliveryOutcome:
        rng = self._rng(group, [*Step, None].index(step), node)
        request_lost, reply_lost = (bool(lost) for lost in rng.random(2) < self.loss)
        delay = float(rng.exponential(self.delay))
        if victim:  # half of them before they hear of it, half after they answered
            request_lost, reply_lost = (True, False) if rng.random() < 0.5 else (False, True)
        return DeliveryOutcome(request_lost, reply_lost, delay)

    def _victims(self, group: str, step: Step | None, nodes: Sequence[int]) -> set[int]:
        if not group.isdecimal() or self.steps[int(group) % len(self.steps)] is not step:
            return set()
        chosen = self._rng(group, len(Step), 0).choice(sorted(nodes), size=min(self.victims, len(nodes)), replace=False)
        return {int(node) for node in chosen}

    def _rng(self, group: str, step: int, node: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int.from_bytes(group.encode(), "big"), step, node])


@dataclass(order=True)
class _UnderWay:
    arrives: float
    number: int
    request: Message = field(compare=False)
    fate: DeliveryOutcome = field(compare=False)


class InProcessGrid(Grid):
    """Hands each message to ``client_app(message, context)`` when its reply is due."""

    def __init__(self, client_app: ClientApp, state_dirs: Mapping[int, str], faults: FaultModel) -> None:
        """``state_dirs``: node id (positive) → the folder of the device that lives there."""
        self.clock = VirtualClock()
        self._app = client_app
        self._weather = faults
        self._contexts = {
            node: Context(RUN_ID, node, {"state": state_dir}, RecordDict(), {})
            for node, state_dir in state_dirs.items()
        }
        self._numbers = count(1)
        self._due: list[_UnderWay] = []  # a heap of requests under way, by the arrival of their replies
        self._arrived: dict[str, Message] = {}  # replies that nobody has pulled yet, by the id of their request
        self._run = Run.create_empty(RUN_ID)
        # Flower's Message asks the process who it is.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, SERVER_NODE, 1

    def set_run(self, run: Run) -> None:
        """See ``Grid``."""
        self._run = run

    @property
    def run(self) -> Run:
        """See ``Grid``."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See ``Grid``."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """See ``Grid``."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """See ``Grid``. The fates of the messages are drawn here; all of them are of one group and step."""
        batch, ids = list(messages), []
        fates = self._fates(batch) if batch else {}
        for message in batch:
            number, fate = next(self._numbers), fates[message.metadata.dst_node_id]
            ids.append(str(number))
            message.metadata.__dict__["_message_id"] = str(number)  # as Flower's own grids do
            heapq.heappush(self._due, _UnderWay(self.clock.now() + fate.delay, number, message, fate))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """See ``Grid``. Devices work here, in the order of their replies."""
        wanted = set(message_ids)
        while self._due and self._due[0].arrives <= self.clock.now():
            under_way = heapq.heappop(self._due)
            reply = self._deliver(under_way)
            if reply is not None:
                self._arrived[under_way.request.metadata.message_id] = reply
        return [self._arrived.pop(number) for number in list(self._arrived) if number in wanted]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """See ``Grid``."""
        ids = set(self.push_messages(messages))
        arrivals = [reply.arrives for reply in self._due if reply.request.metadata.message_id in ids]
        latest = max(arrivals, default=self.clock.now()) - self.clock.now()
        self.clock.sleep(latest if timeout is None else min(latest, timeout))
        return self.pull_messages(ids)

    def _deliver(self, under_way: _UnderWay) -> Message | None:
        if under_way.fate.request_lost:
            return None
        reply = self._app(under_way.request, self._contexts[under_way.request.metadata.dst_node_id])
        return None if under_way.fate.reply_lost else reply

    def _fates(self, batch: Sequence[Message]) -> dict[int, DeliveryOutcome]:
        first = batch[0].metadata
        step = next((step for step in Step if step.message_type == first.message_type), None)
        return self._weather.fates(first.group_id, step, [message.metadata.dst_node_id for message in batch])
