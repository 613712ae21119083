"""The gateway: the conversation in which a device attends, and the service around the hub.

A device proves that it has the Ed25519 identity of a certificate: it signs the gateway's nonce and the host that it has
connected to. The gateway accepts its own names only, so a host that passes a challenge on to a device cannot use the
signature here. Before that a peer has a place for ten seconds, and its network one turn at a time
(``coordinator.gateway.places``). What comes afterwards is the same for light devices and pages."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from packaging.version import InvalidVersion, Version

from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError, ProtocolError, TrustError
from aggregation.pki import Root
from aggregation.pki.revocation import EXPIRED
from coordinator.gateway.carriers import BrowserSettings, Carrier, Conversations, ConversationServer, HangUp
from coordinator.gateway.hub import RELEASED, ComeBack, Credentials, Hub, NoAnswer, Stream
from coordinator.gateway.pace import Pace, TokenBucket
from coordinator.gateway.places import Turns, raise_descriptors
from coordinator.gateway.room import Room
from coordinator.runstate import GatewaySnapshot
from coordinator.servertls import TlsSource
from coordinator.settings import GatewaySettings
from edgeadapt import traces
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.gateway.messages import PartReader, RetryWindow

SKEWED = 60.0  # seconds by which a clock may be off
VERSIONS = 32  # in a snapshot; devices state them
REMIND = 60.0  # seconds between two lines of the log while the gateway is full
log = logging.getLogger("edgeadapt.gateway")
ReadRoot = Callable[[datetime], Root]
Refused = Callable[[str, str, str], None]  # field, version that the device states or "", text; from the event loop


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    settings: GatewaySettings = field(default_factory=GatewaySettings)
    calls: int = 60  # check-ins and unasked answers of one device in a row; it regains all of them in ``seconds``
    seconds: float = 30.0
    transfer: float = 120.0  # seconds for one message to a device, or for the whole of an answer
    uploading: int = 2**30  # bytes of answers that are being received, of all devices
    grace: float = 10.0  # seconds in which a device whose stream broke may come back


@dataclass(slots=True)
class Service:
    answered: Callable[[int, bytes | NoAnswer], None]
    read_root: ReadRoot
    limits: GatewayLimits
    check_ins: Counter[str] = field(default_factory=Counter)  # by outcome, as in ``GatewaySnapshot``
    ends: Counter[str] = field(default_factory=Counter)  # by reason, likewise
    hub: Hub = field(init=False)
    room: Room = field(init=False)
    refused: Refused = lambda kind, version, text: None
    asked_by: traces.Span = traces.NO_SPAN  # the step whose requests were sent last; answers are parts of it
    _receiving: int = 0  # bytes of answers
    _buckets: dict[str, TokenBucket] = field(default_factory=dict)
    _turns: Turns = field(default_factory=Turns)
    _root: tuple[datetime, Root] | None = None
    _pace: Pace = field(init=False)
    _full: TokenBucket = field(default_factory=lambda: TokenBucket(1, REMIND))

    def __post_init__(self) -> None:
        own = self.limits.settings
        self.room = Room(own.devices, own.rejected_seconds)
        self.hub = Hub(self.answered, self.limits.grace, self.room.leave)
        self._pace = Pace(own.check_ins_per_minute / 60.0, own.accepted_seconds, own.rejected_seconds)

    async def attend(self, carrier: Carrier) -> None:
        """Send requests to a device and take its answers, until one of the two ends it."""
        credentials = await self._identified(carrier)
        comes_back = credentials.device in self.room
        try:
            self._let_in(credentials.device)
        except ComeBack as sent_away:
            self.check_ins[sent_away.why] += 1
            raise
        carrier.admit()
        stream, ended = self.hub.open(credentials), None
        of = {"device": credentials.device}
        log.info("%s is connected over %s", credentials.device, carrier.protocol, extra=of)
        try:
            await carrier.send(messages.ADMITTED)
            self.check_ins["admitted"] += not comes_back
            await _either(self._send(carrier, stream), self._take(carrier, stream))
        except BaseException as error:
            ended = error
            raise
        finally:
            self.hub.closed(stream)
            why, text = reason_of(stream.over or ended)
            self.ends[why] += 1
            level = logging.INFO if why in AS_IT_SHOULD else logging.WARNING
            log.log(level, "%s is disconnected: %s", credentials.device, text, extra=of)

    async def _identified(self, carrier: Carrier) -> Credentials:
        nonce = SystemEntropy().bytes(messages.NONCE)
        await carrier.send(messages.CHALLENGE.encode(messages.GatewayChallenge(nonce)))
        hello, version = await carrier.receive(), ""
        try:
            known = messages.HELLO.decode(hello)
            version = known.version
            check_version(version, self.limits.settings.client_version)
            async with self._turns.proving(carrier.host):
                return self._verified(known, nonce, carrier.names)
        except (ProtocolError, TrustError) as error:
            self.check_ins["refused"] += 1
            self.refused(error.about, version, str(error))
            raise

    def _verified(self, hello: messages.DeviceHello, nonce: bytes, names: frozenset[str]) -> Credentials:
        if hello.host not in names:
            text = f"the signature is for the host {hello.host}, which is not a name of this gateway"
            raise TrustError(text, about="hello.host")
        device, key = self.root(datetime.now(UTC)).verify(hello.certificate, datetime.now(UTC))
        key.verify(messages.CHALLENGE_TAG, nonce + hello.host.encode(), hello.signature)
        ahead = 0.0 if hello.clock is None else hello.clock - time.time()
        if abs(ahead) > SKEWED:
            log.warning("the clock of %s is %.0f s %s", device, abs(ahead), "ahead" if ahead > 0 else "behind")
        return Credentials(device, hello.certificate, hello.version, ahead)

    def _let_in(self, device: str) -> None:
        """Give a device a place. Raises ComeBack: it comes too often or before its window, or too many are there."""
        now = time.monotonic()
        if wait := self._count_call(device):
            raise ComeBack("calls", "too many calls", RetryWindow(wait, wait))
        if device in self.room:  # a device whose stream broke comes back at once
            return
        if window := self._pace.early(device, now):
            raise ComeBack("early", "too early: the gateway asked this device to come back later", window)
        if not self._pace.admits(now):
            raise ComeBack("paced", "too many devices check in", self._rejected(device, now))
        leaving = self.room.enter(device, now)
        if leaving is None:
            window = self._rejected(device, now)
            if not self._full.wait(now):
                text = "the gateway is full: %d devices are connected, and %d wait for their turn; gateway.devices in "
                text += "federation.toml, file descriptors and memory limit how many may be connected"
                log.warning(text, self.room.places, self.room.waiting(now))
            raise ComeBack("full", "the gateway is full: others have waited longer, or are in a session", window)
        for other, served in leaving:
            window = self._pace.accept(other, now) if served else self._rejected(other, now)
            self.room.leave(other)
            self.hub.send_away(other, ComeBack("turn", "the gateway is full, and it is another device's turn", window))

    def _rejected(self, device: str, now: float) -> RetryWindow:
        window = self._pace.reject(device, now)
        self.room.send_away(device, now, now + window.latest)
        return window

    def _count_call(self, device: str) -> float:
        bucket = self._buckets.setdefault(device, TokenBucket(self.limits.calls, self.limits.seconds))
        return bucket.wait(time.monotonic())

    async def _send(self, carrier: Carrier, stream: Stream) -> None:
        while True:
            asked = await self.hub.next(stream)
            for message in messages.request_messages(asked.id, asked.step, asked.fields):
                async with asyncio.timeout(self.limits.transfer):
                    await carrier.send(message)

    async def _take(self, carrier: Carrier, stream: Stream) -> None:
        """Take answers. One that is void is received and dropped."""
        device = stream.credentials.device
        while True:
            raw = await carrier.receive()
            name = f"{messages.SERVICE}/answer"
            with traces.span(name, within=self.asked_by, protocol=carrier.protocol) as call:
                answer = messages.ANSWER.decode(raw)
                soon = RetryWindow(self.limits.grace / 4, self.limits.grace / 2)
                if not self.hub.is_asked(stream, answer.id) and self._count_call(device):
                    raise ComeBack("answers", "too many answers to no request", soon)
                if self._receiving + answer.size > self.limits.uploading:
                    raise ComeBack("memory", "too many answers at once", soon)
                body: bytes | NoAnswer = NoAnswer(answer.code, answer.reason.decode(errors="replace"))
                if answer.size:
                    body = await self._body(carrier, answer.size)
                try:
                    self.hub.answer(stream, answer.id, body)
                except ProtocolError as error:
                    call.fail(type(error).__name__)
                    log.warning("an answer of %s is dropped: %s", device, error, extra={"device": device})

    async def _body(self, carrier: Carrier, size: int) -> bytes:
        reader = PartReader(size)
        self._receiving += size
        try:
            async with asyncio.timeout(self.limits.transfer):
                while reader.left:
                    reader.add(await carrier.receive())
        finally:
            self._receiving -= size
        return bytes(reader.body)

    def release(self) -> None:
        """End all streams without an error; the devices come back within their windows."""
        for stream in [*self.hub.streams()]:
            device = stream.credentials.device
            window = self._pace.accept(device, time.monotonic())
            self.room.leave(device)
            self.hub.send_away(device, ComeBack(RELEASED, "the run is over", window))

    def end_revoked(self, at: datetime) -> None:
        """End the streams of devices whose certificates have expired or were revoked since they connected; none while
        the revocation list has expired, when no round begins."""
        try:
            root = self.root(at)
        except EdgeAdaptError as error:
            if error.about != EXPIRED:
                raise
            return
        for stream in self.hub.streams():
            try:
                root.verify(stream.credentials.certificate, at)
            except TrustError as error:
                self.hub.end(stream, error)

    def root(self, at: datetime) -> Root:
        """Read the authority with its revocation list, once a second at most: a list may be long. Raises
        EdgeAdaptError: the list is damaged or has expired. It is not a ``TrustError``, which refuses the device."""
        if self._root is None or not at - self._root[0] < timedelta(seconds=1):
            try:
                self._root = at, self.read_root(at)
            except TrustError as error:
                raise EdgeAdaptError(str(error), about=error.about) from error
        return self._root[1]


AS_IT_SHOULD = ("left", "replaced", RELEASED, "turn")  # reasons for which a session of a device ends


def reason_of(ended: BaseException | None) -> tuple[str, str]:
    """Name the reason for which the session of a device ended, as ``GatewaySnapshot.ends`` has it, and describe it."""
    match ended:
        case ComeBack():
            return ended.why, str(ended)
        case ProtocolError(about="gateway.stream"):
            return "replaced", str(ended)
        case ProtocolError():
            return "invalid", str(ended)
        case TrustError():
            return "revoked", str(ended)
        case EdgeAdaptError():
            return "failed", str(ended)
        case TimeoutError():
            return "slow", "a message or an answer took too long"
        case None | HangUp() | asyncio.CancelledError():
            return "left", "the device left, or its connection broke"
    return "failed", type(ended).__name__


async def _either(*coroutines: Coroutine[object, object, None]) -> None:
    """Run coroutines until the first one ends or fails, which ends the others."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


def check_version(found: str, least: str) -> None:
    """Check that a device's version is at least ``least``; an empty one is any. The device states it, and could state
    another: this keeps out devices that would fail, not those that lie. Raises ProtocolError: it is older, or not a
    version."""
    try:
        old = Version(found) < Version(least or "0")
    except InvalidVersion:
        raise ProtocolError(f"{found!r} is not a version", about="hello.version") from None
    if old:
        text = f"edgeadapt {found} is older than {least}, the least version of this federation: update it"
        raise ProtocolError(text, about="gateway.version")


class Gateway(ConversationServer):
    """A running gateway. Its methods may be called from any thread; ``answered`` is called from the gateway's."""

    def __init__(
        self,
        address: str,
        tls: TlsSource,
        read_root: ReadRoot,
        answered: Callable[[int, bytes | NoAnswer], None],
        limits: GatewayLimits | None = None,
        browsers: BrowserSettings | None = None,
        refused: Refused = lambda kind, version, text: None,
    ) -> None:
        """Start listening. ``address``: ``HOST:PORT`` for light devices; port 0 takes any free one. ``read_root``: now
        → the authority with its newest revocation list. ``refused``: called for each peer that is not admitted for what
        it is."""
        limits, room = limits or GatewayLimits(), raise_descriptors() // 4
        if room < limits.settings.devices:
            log.warning("at most %d devices can be connected: this process may open no more files", room)
            limits = replace(limits, settings=limits.settings.model_copy(update={"devices": room}))
        self.service = Service(answered, read_root, limits, refused=refused)
        conversations = Conversations({messages.ATTEND: self.service.attend}, tls)
        super().__init__(conversations, address, browsers, about="--gateway")

    def devices(self) -> tuple[str, ...]:
        """Devices that are there now. Those that were revoked meanwhile are disconnected first."""

        async def listed() -> tuple[str, ...]:
            self.service.end_revoked(datetime.now(UTC))
            return tuple(stream.credentials.device for stream in self.service.hub.streams() if not stream.over)

        return self.call(listed())

    def ask(self, requests: Mapping[str, tuple[str, Mapping[str, bytes]]], seconds: float) -> dict[str, int | None]:
        """Send each device its step and fields, void after ``seconds``. Returns request ids; None as ``Hub.ask``."""
        span = traces.current()

        async def asked() -> dict[str, int | None]:
            self.service.asked_by = span
            for device in requests:
                self.service.room.ask(device)
            return {
                device: self.service.hub.ask(device, step, fields, seconds)
                for device, (step, fields) in requests.items()
            }

        return self.call(asked())

    @property
    def places(self) -> int:
        return self.service.room.places

    def keep(self, devices: Collection[str]) -> None:
        """Keep the places of these devices until the next call, and no others."""

        async def kept() -> None:
            self.service.room.keep(devices, time.monotonic())

        self.call(kept())

    def turns_over(self) -> bool:
        """Whether a device comes back that has waited longer than one that is there and is not kept."""

        async def found() -> bool:
            return self.service.room.turns_over(time.monotonic())

        return self.call(found())

    def snapshot(self, address: str) -> GatewaySnapshot:
        async def counted() -> GatewaySnapshot:
            hub = self.service.hub
            versions = Counter(stream.credentials.version for stream in hub.streams())
            counts = dict(versions.most_common(VERSIONS)), dict(self.service.check_ins)
            skewed = sum(abs(stream.credentials.ahead) > SKEWED for stream in hub.streams())
            places, waiting = self.places, self.service.room.waiting(time.monotonic())
            ends = dict(self.service.ends)
            return GatewaySnapshot(address, len(hub.devices), hub.requests, *counts, skewed, places, waiting, ends)

        return self.call(counted())

    def close(self, release: Callable[[], None] | None = None) -> None:
        """End all conversations and stop listening. The devices that are there come back within their windows."""
        super().close(release or self.service.release)
