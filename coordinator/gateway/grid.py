"""A Flower grid over the gateway: the same ServerApp runs on it as on a SuperLink. A message becomes a request of the
gateway, and its answer a reply. Nobody polls: the grid's clock waits until an answer arrives, or its time is over."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from aggregation.errors import ConfigError
from aggregation.steps import BODY, RECORD
from coordinator.expiry import ExpiryLog
from coordinator.gateway.carriers import BrowserSettings
from coordinator.gateway.hub import NoAnswer
from coordinator.gateway.server import Gateway, GatewayLimits, ReadRoot, Refused
from coordinator.runstate import GatewaySnapshot
from coordinator.servertls import TlsFiles, TlsSource
from coordinator.statedir import CoordinatorStateDir
from coordinator.transport import LOOK, Clock, OwnGrid, identify
from edgeadapt.formats.gateway.messages import ATTEND, node_of

PREFIX = "gateway-"  # Flower's own message ids are hexadecimal
GATHER = 0.005  # seconds for more answers, after the first: to check 1000 requests for each takes longer
LOOK_AT_LINK = 2.0  # the same where each look is a call to the SuperLink
log = logging.getLogger("edgeadapt.gateway")


@contextmanager
def serving(state_dir: CoordinatorStateDir, address: str, *, own_process: bool = True) -> Iterator["GatewayGrid"]:
    """Run a gateway with the TLS files of a coordinator's state directory while the block runs, and yield its grid.
    ``own_process``: as for ``GatewayGrid``. Raises ConfigError, TrustError: as ``CoordinatorStateDir.read_tls`` and
    ``Gateway``."""
    own, tls = state_dir.settings.gateway, TlsFiles(state_dir)
    browsers = BrowserSettings(own.websocket, frozenset(own.origins)) if own.websocket else None
    grid = GatewayGrid(
        address,
        tls,
        state_dir.read_root,
        GatewayLimits(own),
        own_process=own_process,
        browsers=browsers,
        refused=state_dir.run.refused,
    )
    listens = f"{address.rpartition(':')[0]}:{grid.gateway.port}"
    log.info("listening at %s", listens)
    if url := grid.gateway.url(ATTEND):
        log.info("listening for browsers at %s", url)
    ends = ExpiryLog(state_dir.folder)

    def snapshot() -> GatewaySnapshot:
        ends.look()
        return grid.gateway.snapshot(listens)

    try:
        with state_dir.run.observing(snapshot):
            yield grid
    finally:
        grid.close()


class ArrivalClock(Clock):
    """The machine's clock. ``wait`` ends early when an answer arrives."""

    def __init__(self) -> None:
        self.arrived = threading.Event()

    def wait(self, seconds: float) -> None:
        """Wait until an answer has arrived since the last call, at most ``seconds``."""
        if self.arrived.wait(seconds):
            time.sleep(GATHER)
        self.arrived.clear()


class GatewayGrid(OwnGrid):
    """Grid of light devices as nodes. The node of a device follows from its certified name (``messages.node_of``)."""

    def __init__(
        self,
        address: str,
        tls: TlsSource,
        read_root: ReadRoot,
        limits: GatewayLimits | None = None,
        *,
        own_process: bool = True,
        browsers: BrowserSettings | None = None,
        refused: Refused = lambda kind, version, text: None,
    ) -> None:
        """``own_process``: Flower did not start this process. Arguments and errors as ``Gateway``."""
        super().__init__()
        self.clock = ArrivalClock()
        self._turnover = 2 * (limits or GatewayLimits()).settings.rejected_seconds  # the end of the longest window
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._asked: dict[int, Message] = {}  # the gateway's id → message that has no reply yet
        self._early: dict[int, bytes | NoAnswer] = {}  # answers that came before their message was noted
        self._replies: dict[str, tuple[float, Message]] = {}  # message id → when it is void, reply not pulled yet
        self._devices: dict[int, str] = {}  # node → device
        if own_process:
            identify()
        self.gateway = Gateway(address, tls, read_root, self._answered, limits, browsers, refused)

    def close(self) -> None:
        self.gateway.close()

    @property
    def known(self) -> frozenset[int]:
        return frozenset(self._devices)

    def await_devices(self, count: int, look: Callable[[int], object] = lambda devices: None) -> None:
        """Wait until ``count`` devices are connected. ``look``: called meanwhile with how many there are; what it
        raises ends the wait. Raises ConfigError: so many never are."""
        if count > self.gateway.places:
            text = f"the gateway has room for {self.gateway.places} devices, and a session takes {count}"
            raise ConfigError(f"{text}: raise gateway.devices, or the limit of open files", about="gateway.devices")
        while (devices := len(self.gateway.devices())) < count:
            look(devices)
            self.clock.sleep(LOOK)

    def keep(self, devices: Collection[str]) -> None:
        self.gateway.keep(devices)

    def turns_over(self) -> float:
        return self._turnover if self.gateway.turns_over() else 0.0

    def get_node_ids(self) -> Iterable[int]:
        listed = {node_of(device): device for device in self.gateway.devices()}
        self._devices |= listed
        return list(listed)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Return the ids of those messages whose devices are there and do not have too much to do."""
        batch = [message for message in messages if message.metadata.dst_node_id in self._devices]
        if not batch:
            return []
        requests = {}
        for message in batch:
            record = message.content.config_records.get(RECORD, ConfigRecord())
            fields = {name: value for name, value in record.items() if isinstance(value, bytes)}
            step = message.metadata.message_type.partition(".")[2]
            requests[self._devices[message.metadata.dst_node_id]] = (step, fields)
        numbers = self.gateway.ask(requests, min(message.metadata.ttl for message in batch))
        pushed = []
        with self._lock:
            for message in batch:
                number = numbers[self._devices[message.metadata.dst_node_id]]
                if number is not None:
                    pushed.append(f"{PREFIX}{next(self._numbers)}")
                    self.number(message, pushed[-1])
                    self._asked[number] = message
            now = self.clock.now()  # replies to an exchange that ended without them
            self._replies = {number: kept for number, kept in self._replies.items() if kept[0] > now}
            early, self._early = self._early, {}
        for number, answer in early.items():
            self._answered(number, answer)
        return pushed

    def arrived(self, waiting: Collection[str]) -> Iterable[str]:
        with self._lock:
            return [number for number in self._replies if number in waiting]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        with self._lock:
            return [self._replies.pop(number)[1] for number in message_ids if number in self._replies]

    def _answered(self, number: int, answer: bytes | NoAnswer) -> None:
        with self._lock:
            message = self._asked.pop(number, None)
            if message is None:
                self._early[number] = answer
                return
            void = self.clock.now() + message.metadata.ttl
            self._replies[message.metadata.message_id] = void, _reply(message, answer)
        self.clock.arrived.set()


def _reply(message: Message, answer: bytes | NoAnswer) -> Message:
    if isinstance(answer, bytes):
        return Message(RecordDict({RECORD: ConfigRecord({BODY: answer})}), reply_to=message)
    code = ErrorCode.NODE_UNAVAILABLE if answer.code is None else answer.code
    return Message(Error(code, answer.reason), reply_to=message)


class JoinedGrid(OwnGrid):
    """Join SuperNodes and light devices in one cohort: a grid of Flower, and one over the gateway. Its clock is the
    gateway's: an answer of a light device ends a wait. SuperNodes are polled as often as on a grid of their own."""

    def __init__(self, flower: Grid, light: GatewayGrid) -> None:
        super().__init__()
        self._flower, self._light = flower, light
        self.clock = light.clock

    def keep(self, devices: Collection[str]) -> None:
        self._light.keep(devices)

    def turns_over(self) -> float:
        return self._light.turns_over()

    def await_devices(self, count: int, look: Callable[[int], object] = lambda devices: None) -> None:
        """Wait for SuperNodes and light devices together, like ``GatewayGrid.await_devices``."""
        while (devices := len([*self.get_node_ids()])) < count:
            look(devices)
            self.clock.sleep(LOOK_AT_LINK)

    def get_node_ids(self) -> Iterable[int]:
        """List the nodes of both. A light device whose node is that of a SuperNode is not listed."""
        flower = [*self._flower.get_node_ids()]
        return [*flower, *(node for node in self._light.get_node_ids() if node not in flower)]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        batch, light = list(messages), self._light.known
        ours = [message for message in batch if message.metadata.dst_node_id in light]
        others = [message for message in batch if message.metadata.dst_node_id not in light]
        pushed = [*self._light.push_messages(ours)]  # first: light devices need not wait for the database of Flower
        return [*pushed, *(self._flower.push_messages(others) if others else ())]

    def arrived(self, waiting: Collection[str]) -> Iterable[str]:
        others = (number for number in waiting if not number.startswith(PREFIX))
        return [*self._light.arrived(waiting), *others]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        others = [number for number in ids if not number.startswith(PREFIX)]
        replies = [*self._light.pull_messages(number for number in ids if number.startswith(PREFIX))]
        return [*replies, *(self._flower.pull_messages(others) if others else ())]
