"""The agent of a light device: it attends at a gateway, and answers each request with a step of ``client.node.step``.

It attends only while its owner's conditions are met (``client.node.eligibility``), and waits without a connection while
they are not. Meanwhile it has its certificates renewed before they end (``client.gateway.renewal``).

The connection is mutual TLS under the pinned authority. Whatever can pass by itself is tried again, at each address of
the gateway in turn, and after a pause that grows, or that the gateway names; a refusal ends the agent. An answer that
did not reach the gateway, or not the coordinator, which then asks the same once more, is sent again and never made
again: the device's state has moved on.
"""

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc import StatusCode

from adapters import storage
from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError
from aggregation.pki.certificates import load, subject, to_der
from aggregation.pki.tls import bind
from aggregation.steps import Step
from client.gateway.calls import FIRST_PAUSE, PASSING, pause, refusal, until
from client.gateway.renewal import Renewal, tls_pair
from client.node.eligibility import LOOK, Condition, conditions, machine_conditions
from client.node.readings import Readings, SystemReadings
from client.node.statedir import AGENT_LOCK, AUTHORITY, LONGEST, DeviceStateDir
from client.node.step import Refusal, RefusalCode, answer

TRANSFER = 180.0  # seconds for an answer or a blob
ATTEMPTS = 6  # at a transfer; the request is void soon after
log = logging.getLogger("edgeadapt.agent")
T = TypeVar("T")


@dataclass(slots=True)
class Agent:
    """A device at a gateway.

    Args:
        folder: The device's state directory.
        addresses: ``HOST:PORT`` of the gateway; several where another coordinator can take over.
        readings: Of the machine.
        look: Seconds between two looks at the conditions.
    """

    folder: Path
    addresses: tuple[str, ...]
    readings: Readings = field(default_factory=SystemReadings)
    look: float = LOOK
    _failed: int = 0  # addresses in a row, of the attempts so far
    _stop: threading.Event = field(default_factory=threading.Event)
    _call: grpc.Call | None = None
    _last: tuple[pb.Request, bytes | Refusal] | None = None  # the last request, and its answer
    _answering: bool = False
    _declined: bool = False  # a condition is not met any more, or the connection's certificate is not the newest
    _renewal: Renewal = field(init=False)

    def __post_init__(self) -> None:
        self._renewal = Renewal(self.folder)

    @property
    def address(self) -> str:
        """The one that is tried next, or used."""
        return self.addresses[self._failed % len(self.addresses)]

    def stop(self) -> None:
        """End ``run`` soon; a step that is under way is finished."""
        self._stop.set()
        if self._call is not None:
            self._call.cancel()

    def run(self) -> None:
        """Attend until ``stop``.

        Raises:
            ConfigError: Another agent uses the state directory, or it is not one.
            TrustError: A file of it is missing or damaged, or its certificate has expired.
            EdgeAdaptError: The gateway refuses this device.
        """
        state_dir = DeviceStateDir.open(self.folder)
        try:
            with storage.locked(self.folder / AGENT_LOCK, timeout=0):
                self._run(state_dir)
        except TimeoutError:
            raise ConfigError(f"another agent uses {self.folder}: end it first", about=AGENT_LOCK) from None

    def _run(self, state_dir: DeviceStateDir) -> None:
        while self._await_conditions():
            try:
                with _channel(state_dir, self.address) as channel:
                    requests = self._attend(channel, state_dir)
                    if requests.is_active():  # begin with this address again
                        self._failed %= len(self.addresses)
                    with self._looking(requests):
                        for raw in requests:
                            self._handle(channel, state_dir, frames.request(raw))
                            if self._declined:
                                break
                        else:
                            if not self._come_back(requests):
                                self._pause(FIRST_PAUSE)
            except grpc.RpcError as error:
                if self._stop.is_set():
                    return
                if self._declined:
                    continue
                if error.code() not in PASSING:
                    raise refusal(error, "the gateway") from error
                if self._come_back(error):
                    continue
                away, reason = self.address, _one_line(error)
                self._failed += 1
                if self._failed % len(self.addresses):
                    log.info("no gateway at %s, trying %s: %s", away, self.address, reason)
                    continue
                seconds = pause(self._failed // len(self.addresses), error)
                log.info("no gateway at %s, again in %.1f s: %s", away, seconds, reason)
                self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self._stop.wait(min(left, self.look)):
            self._renewal.attempt()

    def _come_back(self, call: grpc.Call) -> bool:
        """Wait as the gateway asks at the end of a call. Returns False if it does not."""
        window = frames.retry_window(call.trailing_metadata())
        if window is None:
            return False
        seconds = max(FIRST_PAUSE, until(window))
        log.info("the gateway at %s asks this device to come back: in %.1f s", self.address, seconds)
        self._pause(seconds)
        return True

    def _await_conditions(self) -> bool:
        """Wait until all conditions are met. Returns False if the agent is to stop."""
        said: tuple[str, ...] = ()
        while not self._stop.is_set():
            self._renewal.attempt()
            unmet = self._unmet(to_join=True)
            if not unmet:
                self._declined = False
                return True
            names = tuple(each.name for each in unmet)
            if names != said:
                log.info("not eligible: %s", "; ".join(f"{each.name}: {each.reading}" for each in unmet))
                said = names
            self._stop.wait(self.look)
        return False

    def _unmet(self, *, to_join: bool) -> list[Condition]:
        """The conditions that are not met now: all, or only those of the machine."""
        now = datetime.now().astimezone()
        try:
            state_dir = DeviceStateDir.open(self.folder)  # the owner may have changed the settings
        except EdgeAdaptError as error:
            return [Condition("device.toml", str(error), met=False)]
        if to_join:
            found = conditions(state_dir, self.readings, now)
        else:
            found = machine_conditions(state_dir.eligibility, self.readings, now)
        return [each for each in found if not each.met]

    @contextmanager
    def _looking(self, call: grpc.Call) -> Iterator[None]:
        """While the block runs, end ``call`` once a condition is not met, unless a request is being answered.

        So it does with new certificates: the gateway ends a connection whose certificate has expired.
        """
        done = threading.Event()

        def look() -> None:
            renewed = False
            while not done.wait(self.look):
                renewed = self._renewed() or renewed
                if not self._answering and (renewed or self._unmet(to_join=False)):
                    self._declined = True
                    call.cancel()
                    return

        looking = threading.Thread(target=look, name="eligibility")
        looking.start()
        try:
            yield
        finally:
            done.set()
            looking.join()

    def _renewed(self) -> bool:
        """Whether there are new certificates now. A failure that stays ends the agent before its next connection."""
        try:
            return self._renewal.attempt()
        except (EdgeAdaptError, OSError):
            return False

    def _attend(self, channel: grpc.Channel, state_dir: DeviceStateDir) -> Any:
        own = to_der(tls_pair(state_dir.folder)[1])
        binding = bind(state_dir.identity, own)
        hello = pb.Hello(certificate=state_dir.certificate, binding=binding, version=version("edgeadapt"))
        call = channel.unary_stream(frames.ATTEND)(hello.SerializeToString())
        self._call = call
        call.initial_metadata()  # waits until the gateway has admitted the device
        if call.is_active():
            log.info("connected to %s", self.address)
        if self._stop.is_set():
            call.cancel()
        return call

    def _handle(self, channel: grpc.Channel, state_dir: DeviceStateDir, request: pb.Request) -> None:
        self._answering = True
        try:
            self._answer_once(channel, state_dir, request)
        finally:
            self._answering = False

    def _answer_once(self, channel: grpc.Channel, state_dir: DeviceStateDir, request: pb.Request) -> None:
        if self._last is None or not _same(self._last[0], request, refused=isinstance(self._last[1], Refusal)):
            self._last = request, self._answer(channel, state_dir, request)
        number, found = request.id, self._last[1]
        self._declined = isinstance(found, Refusal) and found.code is RefusalCode.NOT_ELIGIBLE
        try:
            self._transfer(partial(_send, channel, number, found))
        except grpc.RpcError as error:
            if error.code() is not StatusCode.FAILED_PRECONDITION:
                raise
            log.warning("the answer to %s came too late", request.step)  # the request is void

    def _answer(self, channel: grpc.Channel, state_dir: DeviceStateDir, request: pb.Request) -> bytes | Refusal:
        try:
            fetched = {
                name: self._transfer(partial(_fetch, channel, blob, bytearray())) for name, blob in _blobs(request)
            }
        except ProtocolError as error:
            return Refusal(RefusalCode.REFUSED, str(error))
        device = subject(load(state_dir.certificate))
        step, fields = Step(request.step), {**request.fields, **fetched}
        log.info("answering %s", step.value)
        node, opened = frames.node_of(device), partial(DeviceStateDir.open, self.folder)
        return answer(opened, step, fields, node, readings=self.readings)

    def _attends(self) -> bool:
        return self._call is not None and bool(self._call.is_active())

    def _transfer(self, call: Callable[[], T]) -> T:
        """Call until it succeeds, while the device attends: a gateway takes no call of another device.

        Raises:
            grpc.RpcError: The gateway refuses, cannot be reached after ``ATTEMPTS``, or the stream broke as well. The
                device then connects again, and is asked again what it has not answered.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return call()
            except grpc.RpcError as error:
                if error.code() not in PASSING or attempt == ATTEMPTS or not self._attends():
                    raise
                if self._stop.wait(pause(attempt, error)) or not self._attends():
                    raise
        raise AssertionError


def _channel(state_dir: DeviceStateDir, address: str) -> grpc.Channel:
    """A connection to the gateway, which nothing is sent on yet.

    Raises:
        TrustError: A file is missing or damaged.
    """
    key, certificate = tls_pair(state_dir.folder)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=storage.read(state_dir.folder / AUTHORITY, LONGEST),
        private_key=key.pem,
        certificate_chain=certificate,
    )
    return grpc.secure_channel(address, credentials, options=frames.DEVICE_OPTIONS)


def _blobs(request: pb.Request) -> Iterable[tuple[str, pb.Blob]]:
    found: Mapping[str, pb.Blob] = request.blobs
    return found.items()


def _fetch(channel: grpc.Channel, blob: pb.Blob, content: bytearray) -> bytes:
    """A field of the request under way; what ``content`` has from an earlier attempt is not sent again.

    Raises:
        ProtocolError: It is not what the request says.
    """
    asked = pb.Range(sha256=blob.sha256, offset=len(content)).SerializeToString()
    for raw in channel.unary_stream(frames.FETCH)(asked, timeout=TRANSFER):
        content += frames.chunk(raw)
        if len(content) > blob.size:
            break
    if len(content) != blob.size or hashlib.sha256(content).digest() != blob.sha256:
        raise ProtocolError("a field of the request does not match its digest", about="request.blobs")
    return bytes(content)


def _send(channel: grpc.Channel, number: int, found: bytes | Refusal) -> None:
    if isinstance(found, Refusal):
        parts = frames.reason_parts(number, found.code, found.reason)
    else:
        parts = frames.answer_parts(number, found)
    channel.stream_unary(frames.ANSWER)(parts, timeout=TRANSFER)


def _one_line(error: grpc.RpcError) -> str:
    return " ".join(f"{error.code().name}: {error.details()}".split())[:200]


def _same(last: pb.Request, request: pb.Request, *, refused: bool) -> bool:
    """Whether a request is the last one, or repeats it; what was refused may be answered when it is repeated."""
    if refused or last.id == request.id:
        return last.id == request.id
    return (last.step, last.fields, last.blobs) == (request.step, request.fields, request.blobs)
