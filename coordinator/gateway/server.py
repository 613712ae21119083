"""The gRPC service of the gateway, with mutual TLS, on an event loop in a thread of its own.

What a device may do follows from its connection: the TLS certificate names it, and with ``Attend`` it proves that the
identity of the same name is its own (``aggregation.pki.tls``). Status codes tell a retry from a refusal: after
``UNAVAILABLE``, ``RESOURCE_EXHAUSTED`` and ``DEADLINE_EXCEEDED`` the same call may succeed later; after any other it
will not (docs/reference/gateway.md).
"""

import asyncio
import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self, TypeVar

import grpc
from grpc import StatusCode, aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from packaging.version import InvalidVersion, Version

from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from adapters.gateway.frames import RetryWindow
from aggregation.errors import ConfigError, EdgeAdaptError, ProtocolError, TrustError
from aggregation.pki import Root, certificates
from aggregation.pki.tls import TlsRole, verify_binding, verify_challenge, verify_tls
from coordinator import traces
from coordinator.gateway.admission import Admission, Context, later
from coordinator.gateway.hub import Channel, Credentials, Hub, NoAnswer, Released, Stream
from coordinator.gateway.pace import Pace, TokenBucket
from coordinator.gateway.snapshot import GatewaySnapshot
from coordinator.servertls import TlsSource, credentials

CLOSING = 2.0  # seconds for the end of the streams
VERSIONS = 32  # in a snapshot; devices state them
log = logging.getLogger("edgeadapt.gateway")
T = TypeVar("T")
ReadRoot = Callable[[datetime], Root]


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    """What one device can cost the gateway.

    Attributes:
        calls: Calls of one device in a row; after that as many in ``seconds``.
        seconds: In which a device regains all of its calls.
        transfer: Seconds for one message to a device, or for the whole of an answer or a blob.
        uploading: Bytes of answers that are being received, of all devices.
        devices: Connected at the same time.
        grace: Seconds in which a device whose stream broke may come back.
        check_ins: A minute, of all devices that are not connected.
        accepted: Seconds until a device that took part comes back, at least.
        rejected: Seconds until a device that was not admitted comes back, at least.
        client_version: Least version of edgeadapt on a device; empty: any.
    """

    calls: int = 60
    seconds: float = 30.0
    transfer: float = 120.0
    uploading: int = 2**30
    devices: int = 4096
    grace: float = 10.0
    check_ins: float = 10_000.0
    accepted: float = 1.0
    rejected: float = 10.0
    client_version: str = ""


@dataclass(slots=True)
class Service:
    """The calls. Raw bytes come in and go out; ``adapters.gateway.frames`` decides what is accepted."""

    hub: Hub
    read_root: ReadRoot
    limits: GatewayLimits
    began: float = field(default_factory=time.monotonic)
    check_ins: Counter[str] = field(default_factory=Counter)  # by outcome, as in ``GatewaySnapshot``
    asked_by: traces.Span = traces.NO_SPAN  # the step whose requests were sent last; calls of devices are parts of it
    _answers: dict[str, tuple[int, asyncio.Timeout]] = field(default_factory=dict)
    _buckets: dict[str, TokenBucket] = field(default_factory=dict)
    _root: tuple[datetime, Root] | None = None
    _pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self._pace = Pace(self.limits.check_ins / 60.0, self.limits.accepted, self.limits.rejected)

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            frames.SERVICE,
            {
                "Attend": grpc.unary_stream_rpc_method_handler(self.attend),
                "Fetch": grpc.unary_stream_rpc_method_handler(self.fetch),
                "Answer": grpc.stream_unary_rpc_method_handler(self.answer),
                "Status": grpc.unary_unary_rpc_method_handler(self.status),
            },
        )

    async def attend(self, raw: bytes, context: Context) -> None:
        """Send requests to a device until its stream ends."""
        async with _Call(context, "Attend") as call:
            name, tls_certificate = await self._peer(context)
            await self._keep_pace(context, name)
            hello = frames.hello(raw)
            require_version(hello.version, self.limits.client_version)
            credentials = Credentials(name, tls_certificate, hello.certificate, hello.binding, hello.version)
            self.verify(credentials, datetime.now(UTC))
            stream = self.hub.open(credentials)
            log.info("%s is connected", name)
            try:
                await context.send_initial_metadata(())  # the device is admitted
                call.end()
                while True:
                    asked = await self.hub.next(stream)
                    async with asyncio.timeout(self.limits.transfer):
                        await context.write(frames.request_message(asked.id, asked.step, asked.fields, asked.digests))
            except Released:
                context.set_trailing_metadata(self.accepted(name).metadata())
            finally:
                self.hub.closed(stream)
                log.info("%s is disconnected", name)

    async def _keep_pace(self, context: Context, name: str) -> None:
        if found := self.rejected(name):
            reason, window = found
            await context.abort(StatusCode.RESOURCE_EXHAUSTED, reason, window.metadata())

    def rejected(self, name: str) -> tuple[str, RetryWindow] | None:
        """Why a device is not admitted now, and when it comes back: before its window, or too many are there."""
        now = time.monotonic()
        if name in self.hub.devices:  # a device whose stream broke comes back at once
            return None
        if window := self._pace.early(name, now):
            outcome, reason = "early", "too early: the gateway asked this device to come back later"
        elif not self._pace.admits(now):
            outcome, reason, window = "paced", "too many devices check in", self._pace.reject(name, now)
        elif len(self.hub.devices) >= self.limits.devices:
            outcome, reason, window = "full", "the gateway is full", self._pace.reject(name, now)
        else:
            self.check_ins["admitted"] += 1
            return None
        self.check_ins[outcome] += 1
        return reason, window

    def accepted(self, name: str) -> RetryWindow:
        """When a device that took part comes back."""
        return self._pace.accept(name, time.monotonic())

    def count_call(self, caller: str) -> float:
        """Count a call of a device, or with a TLS certificate. Returns 0, or the seconds until it may make one."""
        bucket = self._buckets.setdefault(caller, TokenBucket(self.limits.calls, self.limits.seconds))
        return bucket.wait(time.monotonic())

    def release(self) -> None:
        """End all streams without an error; the devices come back within their windows."""
        for stream in self.hub.streams():
            self.hub.end(stream, Released(f"{stream.credentials.device} took part"))

    async def fetch(self, raw: bytes, context: Context) -> None:
        """Send a field of the request under way, from an offset on."""
        async with _Call(context, "Fetch", self.asked_by):
            stream = await self._stream(context)
            asked_for = frames.byte_range(raw)
            content = self.hub.under_way(stream).blob(asked_for.sha256)
            if content is None:
                raise ProtocolError("the request under way has no such field", about="range.sha256")
            async with asyncio.timeout(self.limits.transfer):
                for part in frames.chunks(content, asked_for.offset):
                    await context.write(part)

    async def answer(self, parts: AsyncIterator[bytes], context: Context) -> bytes:
        """Take the answer to the request under way."""
        async with _Call(context, "Answer", self.asked_by), asyncio.timeout(self.limits.transfer) as patience:
            stream = await self._stream(context)
            beginning = frames.beginning(await anext(parts, b""))
            self.hub.under_way(stream, beginning.request)
            if beginning.HasField("reason"):
                found: bytes | NoAnswer = NoAnswer(beginning.reason.code, beginning.reason.text)
                await _no_more(parts)
            elif not self.has_room(stream.credentials.device, beginning.size):
                await later(context, StatusCode.RESOURCE_EXHAUSTED, "too many answers at once", 2.0)
            else:
                with self.receiving(stream.credentials.device, beginning.size, patience):
                    found = await _body(parts, beginning.size)
            self.hub.answer(stream, beginning.request, found)
        return bytes(pb.Receipt().SerializeToString())

    async def status(self, raw: bytes, context: Context) -> bytes:
        """How much there is to do."""
        async with _Call(context, "Status"):
            await self._peer(context)
        seconds = int(time.monotonic() - self.began)
        reply = pb.StatusReply(devices=len(self.hub.devices), requests=self.hub.requests, seconds=seconds)
        return bytes(reply.SerializeToString())

    def verify(self, credentials: Credentials, at: datetime) -> None:
        """Return if the credentials are valid at a time, with the newest revocation list.

        Raises:
            TrustError: They are not.
        """
        verified = verify_binding if credentials.channel is Channel.GRPC else verify_challenge
        verified(self.root(at), credentials.signed, credentials.certificate, credentials.binding, at)

    def end_revoked(self, at: datetime) -> None:
        """End the streams of devices whose certificates have expired or were revoked since they connected."""
        for stream in self.hub.streams():
            try:
                self.verify(stream.credentials, at)
            except TrustError as error:
                log.warning("%s is disconnected: %s", stream.credentials.device, error)
                self.hub.end(stream, error)

    def root(self, at: datetime) -> Root:
        """The authority with its revocation list, read once a second at most: a list may be long.

        Raises:
            EdgeAdaptError: The list is damaged or has expired. It is no ``TrustError``, which would refuse the device.
        """
        if self._root is None or not at - self._root[0] < timedelta(seconds=1):
            try:
                self._root = at, self.read_root(at)
            except TrustError as error:
                raise EdgeAdaptError(str(error), about=error.about, value=error.value) from error
        return self._root[1]

    async def _peer(self, context: Context) -> tuple[str, bytes]:
        """The device that the TLS certificate of a call names, and the certificate in DER; counts the call first."""
        (pem,) = context.auth_context().get("x509_pem_cert", [b""])
        at = datetime.now(UTC)
        der = certificates.to_der(pem)
        if wait := self.count_call(hashlib.sha256(der).hexdigest()):  # by name, a revoked one would use up the new one
            await later(context, StatusCode.RESOURCE_EXHAUSTED, "too many calls", wait)
        return verify_tls(self.root(at), der, TlsRole.DEVICE, at), der

    async def _stream(self, context: Context) -> Stream:
        return self.hub.stream_of(*await self._peer(context))

    def has_room(self, name: str, size: int) -> bool:
        """Whether an answer of a device can be received now, with those of all others."""
        others = sum(other for device, (other, _) in self._answers.items() if device != name)
        return others + size <= self.limits.uploading

    @contextmanager
    def receiving(self, device: str, size: int, patience: asyncio.Timeout) -> Iterator[None]:
        """Count an answer while the block runs. An older one of the device, which may be half open, is out of time."""
        if device in self._answers:
            self._answers[device][1].reschedule(asyncio.get_running_loop().time())
        mine = self._answers[device] = size, patience
        try:
            yield
        finally:
            if self._answers.get(device) is mine:
                del self._answers[device]


def require_version(found: str, least: str) -> None:
    """Return if a device's version is at least ``least``; an empty one is any.

    The device states it, and could state another: this keeps out devices that would fail, not those that lie.

    Raises:
        ProtocolError: It is older, or no version.
    """
    try:
        old = Version(found) < Version(least or "0")
    except InvalidVersion:
        raise ProtocolError(f"{found!r} is no version", about="hello.version") from None
    if old:
        text = f"edgeadapt {found} is older than {least}, the least version of this federation: update it"
        raise ProtocolError(text, about="gateway.version")


async def _body(parts: AsyncIterator[bytes], size: int) -> bytes:
    """The bytes of an answer.

    Raises:
        ProtocolError: They are more or fewer than was said.
    """
    body = bytearray()
    async for raw in parts:
        body += frames.answer_data(raw)
        if len(body) > size:
            break
    if len(body) != size:
        raise ProtocolError(f"the answer has not the {size} bytes that it began with", about="answer.size", value=size)
    return bytes(body)


async def _no_more(parts: AsyncIterator[bytes]) -> None:
    if await anext(parts, None) is not None:
        raise ProtocolError("nothing may follow a reason", about="answer.reason")


class _Call:
    """Ends a call with the status code that its error means, and measures it: not for how long a device attends."""

    def __init__(self, context: Context, method: str, within: traces.Span | None = None) -> None:
        self._context = context
        self._span = traces.begin(f"{frames.SERVICE}/{method}", within=within)

    def end(self) -> None:
        self._span.end()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            await self._abort(error)
        finally:
            if code := self._context.code():  # a number
                self._span.fail(next((each.name for each in StatusCode if each.value[0] == code), str(code)))
            self._span.end()

    async def _abort(self, error: BaseException | None) -> None:
        if isinstance(error, TimeoutError):
            await self._context.abort(StatusCode.DEADLINE_EXCEEDED, "too slow: the transfer took longer than allowed")
        elif isinstance(error, TrustError):
            log.warning("a call is refused: %s", error)
            await self._context.abort(StatusCode.PERMISSION_DENIED, str(error))
        elif isinstance(error, ProtocolError):
            log.warning("a call is refused: %s", error)
            gone = error.about in ("gateway.stream", "gateway.request", "gateway.version")
            code = StatusCode.FAILED_PRECONDITION if gone else StatusCode.INVALID_ARGUMENT
            await self._context.abort(code, str(error))
        elif isinstance(error, EdgeAdaptError):
            log.error("calls cannot be served: %s", error)
            await later(self._context, StatusCode.UNAVAILABLE, "the gateway cannot serve this call now", 60.0)


class _Digests(dict[int, bytes]):
    """SHA-256 of fields that are alive meanwhile; the same object is hashed once, because all devices get it."""

    def __call__(self, content: bytes) -> bytes:
        if id(content) not in self:
            self[id(content)] = hashlib.sha256(content).digest()
        return self[id(content)]


class Gateway:
    """A running gateway. Its methods may be called from any thread; ``answered`` is called from the gateway's."""

    def __init__(
        self,
        address: str,
        tls: TlsSource,
        read_root: ReadRoot,
        answered: Callable[[int, bytes | NoAnswer], None],
        limits: GatewayLimits | None = None,
    ) -> None:
        """Start listening.

        Args:
            address: ``HOST:PORT``; port 0 takes any free one.
            tls: Of the gateway.
            read_root: Now → the authority with its newest revocation list.
            answered: As for ``Hub``.
            limits: What a device may cost.

        Raises:
            ConfigError: The address is in use or not valid, or the TLS files do not fit together.
        """
        limits = limits or GatewayLimits()
        self.service = Service(Hub(answered, limits.grace), read_root, limits)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="gateway", daemon=True)
        self._thread.start()
        try:
            self._server, self.port = self.call(self._serve(address, tls))
        except RuntimeError as error:
            self._end()
            text = f"the gateway cannot listen at {address}: the port is in use, or the TLS files do not fit together"
            raise ConfigError(text, about="--gateway", value=address) from error

    async def _serve(self, address: str, tls: TlsSource) -> tuple[aio.Server, int]:
        calls = 4 * self.service.limits.devices
        server = aio.server(interceptors=(Admission(),), options=frames.GATEWAY_OPTIONS, maximum_concurrent_rpcs=calls)
        servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        server.add_generic_rpc_handlers((self.service.handlers(),))
        reflection.enable_server_reflection((frames.SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        port = server.add_secure_port(address, credentials(tls, certified_only=True))
        await server.start()
        await servicer.set(frames.SERVICE, health_pb2.HealthCheckResponse.SERVING)
        return server, port

    def devices(self) -> tuple[str, ...]:
        """The devices that are there now. Those that were revoked meanwhile are disconnected first."""

        async def listed() -> tuple[str, ...]:
            self.service.end_revoked(datetime.now(UTC))
            return tuple(stream.credentials.device for stream in self.service.hub.streams() if not stream.over)

        return self.call(listed())

    def ask(self, requests: Mapping[str, tuple[str, Mapping[str, bytes]]], seconds: float) -> dict[str, int | None]:
        """Ask devices.

        Args:
            requests: Device → step, and fields.
            seconds: Until the requests are void.

        Returns:
            Device → id of its request; None as ``Hub.ask``.
        """

        digest = _Digests()
        long = {
            device: {name: digest(content) for name, content in fields.items() if len(content) > frames.INLINE}
            for device, (_, fields) in requests.items()
        }

        step = traces.current()

        async def asked() -> dict[str, int | None]:
            hub, self.service.asked_by = self.service.hub, step
            return {
                device: hub.ask(device, step, fields, long[device], seconds)
                for device, (step, fields) in requests.items()
            }

        return self.call(asked())

    def snapshot(self, address: str) -> GatewaySnapshot:
        """Its numbers now. ``address``: at which devices reach it."""

        async def counted() -> GatewaySnapshot:
            hub = self.service.hub
            versions = Counter(stream.credentials.version for stream in hub.streams())
            found = dict(versions.most_common(VERSIONS)), dict(self.service.check_ins)
            return GatewaySnapshot(address, len(hub.devices), hub.requests, *found)

        return self.call(counted())

    def close(self) -> None:
        """End all calls and stop listening. The devices that are there come back within their windows."""

        if self._loop.is_closed():
            return

        async def released() -> None:
            self.service.release()

        self.call(released())
        self.call(self._server.stop(grace=CLOSING))
        self._end()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the gateway's event loop, and return its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
