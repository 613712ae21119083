"""An in-process Flower grid with seeded faults, in virtual time. The real ServerApp and ClientApp run on it unchanged.

The grid delays, reorders and loses messages as a ``FaultModel`` decides. Time is virtual: waiting for a reply costs
nothing, and a device that answers after the deadline is late. Training takes no virtual time, so a run is the same on
any machine. A device works on each request that reaches it, in the order in which they were sent, also if its answer
is late."""

import bisect
import csv
import heapq
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial, reduce
from itertools import count
from pathlib import Path

import numpy as np
from flwr.app import ConfigRecord, Context, Message, RecordDict
from numpy.typing import NDArray

from aggregation.errors import ConfigError, DataError
from aggregation.steps import BODY, RECORD, Step
from client.node.app import STATE
from coordinator.transport import RUN_ID, Clock, OwnGrid, identify
from edgeadapt.formats.storage import file_sha256, replace
from simulations.data.population import Client

WHO = ("client", "language")
COLUMNS = ("round", "available")
KEY = "network.trace"
ROUND_STEPS = (Step.PLAN, Step.SURVIVORS, Step.UNMASK)  # a device can drop out of a round here
SHORT_ROUND_STEPS = (Step.PLAN, Step.UNMASK)  # of an honest-but-curious session, which has no consistency step


@dataclass(frozen=True, slots=True)
class Steps:
    """Is a share that changes at some rounds.

    >>> Steps((1, 4), (1.0, 0.2)).at(3), Steps((2,), (0.5,)).at(1)
    (1.0, None)
    """

    rounds: tuple[int, ...]  # where it changes, ascending
    shares: tuple[float, ...]  # from each of these rounds on, 0 to 1

    def at(self, round_: int) -> float | None:
        """Return the share in a round; None before the first change."""
        index = bisect.bisect_right(self.rounds, round_) - 1
        return self.shares[index] if index >= 0 else None


def read_trace(path: Path, clients: Iterable[Client]) -> Mapping[str, Steps]:
    """Map each client to when its device can be reached.

    The file has the columns ``round`` and ``available``, and ``client`` or ``language``. A row holds from its round on,
    until another one of the same client or language. ``available`` is 1 or 0 for a client; in between it is the share
    of the clients of a language, or the probability for a client."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.DictReader(file, strict=True)
            who = _column(path, lines.fieldnames or ())
            named: dict[str, list[str]] = {}
            for client in clients:
                named.setdefault(client.name if who == "client" else client.language, []).append(client.name)
            shares: dict[str, dict[int, float]] = {}
            for row in lines:
                about = f"{path}, line {lines.line_num}"
                name, number, share = _row(about, who, row)
                if name not in named:
                    raise DataError(f"{about}: the population has no {who} {name!r}", about=about)
                if number in shares.setdefault(name, {}):
                    raise DataError(f"{about}: {name!r} has a row of round {number} before", about=about)
                shares[name][number] = share
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error}", about=KEY) from error
    steps = {name: Steps(*zip(*sorted(rows.items()), strict=True)) for name, rows in shares.items()}
    return {client: each for name, each in steps.items() for client in named[name]}


def trace_digest(path: Path) -> str:
    """Hash the file (SHA-256, hex): a resumed run has the trace that it began with. Raises ConfigError."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise ConfigError(f"{KEY}: {path} cannot be read: {error}", about=KEY) from error


def _column(path: Path, header: Sequence[str]) -> str:
    if missing := [name for name in COLUMNS if name not in header]:
        raise ConfigError(f"{KEY}: {path} has no column {missing[0]!r}", about=KEY)
    columns = [name for name in WHO if name in header]
    if len(columns) != 1:
        text = f"{KEY}: {path} needs one of the columns 'client' and 'language', it has {len(columns)} of them"
        raise ConfigError(text, about=KEY)
    return columns[0]


def _row(about: str, who: str, row: Mapping[str, str | None]) -> tuple[str, int, float]:
    try:
        name, number, share = row[who], int(row["round"] or ""), float(row["available"] or "")
    except (TypeError, ValueError):
        raise DataError(f"{about}: round is no whole number, or available is no number", about=about) from None
    if not name or number < 1 or not 0 <= share <= 1:
        text = f"{about}: a row needs a {who}, a round from 1 on, and available from 0 to 1"
        raise DataError(text, about=about)
    return name, number, share


class VirtualClock(Clock):
    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@dataclass(frozen=True, slots=True)
class DeliveryOutcome:
    """``delay``: virtual seconds until the reply arrives."""

    request_lost: bool
    reply_lost: bool
    delay: float


@dataclass(frozen=True, slots=True)
class FaultModel:
    """Draws message loss, delay and forced dropouts from a seed.

    An outcome depends on the seed, the message group, the step and the receiving nodes, never on earlier messages. So a
    resumed run meets the faults that it would have met without the interruption. ``availability`` is the share of the
    devices that can be reached in a round, for each round in turn, over and over; all of them in all rounds if empty. A
    device that is there at some share is there at every larger one."""

    seed: int
    message_loss: float  # probability that a request is lost, and the probability that its reply is lost; 0 to 1
    mean_delay: float  # mean of the exponentially distributed delay, virtual seconds
    forced_dropouts: int = 0  # devices that drop out of every round, at one of ``steps`` in turn
    steps: tuple[Step, ...] = ROUND_STEPS  # where a forced dropout can happen
    availability: tuple[float, ...] = ()
    trace: Mapping[int, Steps] = field(default_factory=dict)  # node → its own share, where a trace states one

    def dropout_probabilities(self, devices: int) -> NDArray[np.float64]:
        """Return the probability that 0, 1, ... of ``devices`` drop out of a round for good, shape ``(devices + 1,)``.
        A device whose request is lost is asked again, one whose reply is lost is not. A forced dropout is either, with
        equal probability, at one step; messages are lost at any."""
        chance = 1 - (1 - self.message_loss) ** len(self.steps)
        forced = min(self.forced_dropouts, devices)
        chances = [(1 + chance) / 2] * forced + [chance] * (devices - forced)
        return reduce(np.convolve, (np.array([1 - each, each]) for each in chances), np.ones(1))

    def outcomes(self, group: str, step: Step | None, nodes: Sequence[int]) -> dict[int, DeliveryOutcome]:
        """Draw the outcome of one message to each of ``nodes``. ``group``: the round, or the session during its setup.
        ``step``: None for a message that is not of the protocol."""
        dropouts = self._forced(group, step, nodes)
        number = round_of(group)
        share = self.availability[number % len(self.availability)] if self.availability else 1.0
        return {
            node: self._outcome(group, step, node, node in dropouts, share if own is None else own)
            for node in nodes
            for own in [self.trace[node].at(number) if node in self.trace else None]
        }

    def _outcome(self, group: str, step: Step | None, node: int, forced: bool, there: float) -> DeliveryOutcome:
        rng = self._rng(group, [*Step, None].index(step), node)
        request_lost, reply_lost = (bool(lost) for lost in rng.random(2) < self.message_loss)
        delay = float(rng.exponential(self.mean_delay))
        if forced:  # half of them before the device sees the request, half after it has answered
            request_lost, reply_lost = (True, False) if rng.random() < 0.5 else (False, True)
        if there < 1.0 and self._rng("", len(Step) + 1, node).random() >= there:
            request_lost = True
        return DeliveryOutcome(request_lost, reply_lost, delay)

    def _forced(self, group: str, step: Step | None, nodes: Sequence[int]) -> set[int]:
        if not group.isdecimal() or self.steps[int(group) % len(self.steps)] is not step:
            return set()
        number = min(self.forced_dropouts, len(nodes))
        chosen = self._rng(group, len(Step), 0).choice(sorted(nodes), size=number, replace=False)
        return {int(node) for node in chosen}

    def _rng(self, group: str, step: int, node: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, int.from_bytes(group.encode(), "big"), step, node])


def round_of(group: str) -> int:
    """Return the round of a message group, or the first one of its session.

    >>> round_of("7"), round_of("7-2"), round_of("session-5-1")
    (7, 7, 5)
    """
    return int(next((part for part in group.split("-") if part.isdecimal()), "0"))


@dataclass(slots=True)
class GridLog:
    path: Path
    sent: Counter[int] = field(default_factory=Counter)  # round → bytes of all answers of devices, lost ones too
    devices: dict[int, int] = field(default_factory=dict)  # round → devices that were asked after the check-in
    resumed: tuple[int, ...] = ()  # rounds in which an interruption ended a session early
    ended: bool = False  # whether no round of the run is left, and none is repeated any more

    @classmethod
    def open(cls, path: Path) -> "GridLog":
        """Read the file; nothing is logged before the first ``write``."""
        if not path.exists():
            return cls(path)
        table = json.loads(path.read_bytes())
        sent, devices = ({int(number): n for number, n in table[key].items()} for key in ("sent", "devices"))
        return cls(path, Counter(sent), devices, tuple(table["resumed"]), table["ended"])

    def begin(self, done: int, *, within_session: bool) -> None:
        """Forget what follows round ``done``, where a run goes on. ``within_session``: its session is not over."""
        self.sent = Counter({number: size for number, size in self.sent.items() if number <= done})
        self.devices = {number: count for number, count in self.devices.items() if number <= done}
        self.resumed += (done + 1,) if within_session else ()
        self.write()

    def asked(self, group: str, step: Step | None, count: int) -> None:
        number = round_of(group)
        if step is not Step.CHECK_IN:
            self.devices[number] = max(count, self.devices.get(number, 0))
        self.write()

    def answered(self, group: str, reply: Message) -> None:
        record = reply.content.get(RECORD) if reply.has_content() else None
        body = record.get(BODY) if isinstance(record, ConfigRecord) else None
        self.sent[round_of(group)] += len(body) if isinstance(body, bytes) else 0

    def write(self) -> None:
        table = {"sent": self.sent, "devices": self.devices, "resumed": self.resumed, "ended": self.ended}
        replace(self.path, json.dumps(table).encode())


def context_of(node: int, device: str) -> Context:
    """Return Flower's context of a node: ``device`` finds the state of its device."""
    return Context(RUN_ID, node, {STATE: device}, RecordDict(), {})


@dataclass(order=True)
class _MessageInFlight:
    """Holds a request under way, and then its reply. ``answer``: gives the device's answer, called once; None if the
    request is lost, or after the call."""

    arrives: float
    number: int
    id: str = field(compare=False)
    outcome: DeliveryOutcome = field(compare=False)
    answer: Callable[[], Message] | None = field(compare=False)
    reply: Message | None = field(default=None, compare=False)

    def work(self) -> None:
        if self.answer is not None:
            answered = self.answer()
            self.answer, self.reply = None, None if self.outcome.reply_lost else answered


class InProcessGrid(OwnGrid):
    """Calls ``client_app(message, context)`` for each message when its reply is due."""

    def __init__(
        self,
        client_app: Callable[[Message, Context], Message],
        devices: Mapping[int, str],
        faults: FaultModel,
        before: Callable[[Step | None, Sequence[str]], None] = lambda step, devices: None,
        log: GridLog | None = None,
    ) -> None:
        """Make a grid on which ``client_app`` answers for every node, when its answer is due. ``devices``: node id
        (positive) → what finds the state of that node's device: its directory, or its name. ``before``: called before
        messages are sent, with their step and the devices that they are for."""
        self.clock = VirtualClock()
        self._app = client_app
        self._faults = faults
        self._devices, self._before, self._log = devices, before, log
        self._contexts = {node: context_of(node, device) for node, device in devices.items()}
        self._numbers = count(1)
        self._in_flight: list[_MessageInFlight] = []  # a heap, by the arrival of the reply
        self._arrived: dict[str, Message | Exception] = {}  # what has not been pulled, by the id of its request
        super().__init__()
        identify()

    def get_node_ids(self) -> Iterable[int]:
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Draw the outcomes of messages, which all belong to one group and one step."""
        self.work()
        batch, ids, under_way = list(messages), [], list[tuple[_MessageInFlight, Message]]()
        outcomes = self._outcomes(batch) if batch else {}
        for message in batch:
            number, outcome = next(self._numbers), outcomes[message.metadata.dst_node_id]
            ids.append(str(number))
            self.number(message, str(number))
            arrival = self.clock.now() + outcome.delay
            under_way.append((_MessageInFlight(arrival, number, str(number), outcome, None), message))
        under_way.sort(key=lambda each: each[0])  # who is needed first works first
        arriving = [(flying, message) for flying, message in under_way if not flying.outcome.request_lost]
        answers = self._begin([message for _, message in arriving])
        for (flying, message), answer in zip(arriving, answers, strict=True):
            flying.answer = partial(self._answer, message.metadata.group_id, answer)
        for flying, _ in under_way:
            heapq.heappush(self._in_flight, flying)
        return ids

    def work(self) -> None:
        for flying in sorted(self._in_flight):
            flying.work()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Let the devices work, in the order in which their replies arrive."""
        self._advance()
        wanted, replies = set(message_ids), list[Message]()
        for number in [number for number in self._arrived if number in wanted]:
            if isinstance(reply := self._arrived.pop(number), Exception):
                raise reply
            replies.append(reply)
        return replies

    def arrived(self, waiting: Collection[str]) -> Iterable[str]:
        self._advance()
        return [number for number in self._arrived if number in waiting]

    def _advance(self) -> None:
        while self._in_flight and self._in_flight[0].arrives <= self.clock.now():
            flying = heapq.heappop(self._in_flight)
            try:
                flying.work()
            except Exception as error:  # of the device's app, which answers nothing: for who pulls its reply
                self._arrived[flying.id] = error
            if flying.reply is not None:
                self._arrived[flying.id] = flying.reply

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = set(self.push_messages(messages))
        arrivals = [flying.arrives for flying in self._in_flight if flying.id in ids]
        latest = max(arrivals, default=self.clock.now()) - self.clock.now()
        self.clock.sleep(latest if timeout is None else min(latest, timeout))
        return self.pull_messages(ids)

    def _begin(self, requests: Sequence[Message]) -> list[Callable[[], Message]]:
        """Return what gives each device's answer. The device works when it is called."""
        return [partial(self._app, each, self._contexts[each.metadata.dst_node_id]) for each in requests]

    def _answer(self, group: str, answer: Callable[[], Message]) -> Message:
        reply = answer()
        if self._log:
            self._log.answered(group, reply)
        return reply

    def _outcomes(self, batch: Sequence[Message]) -> dict[int, DeliveryOutcome]:
        first = batch[0].metadata
        step = next((step for step in Step if step.message_type == first.message_type), None)
        nodes = [message.metadata.dst_node_id for message in batch]
        self._before(step, [self._devices[node] for node in nodes])
        if self._log:
            self._log.asked(first.group_id, step, len(nodes))
        return self._faults.outcomes(first.group_id, step, nodes)
