"""A device that a test drives message by message over either carrier, so that it can send what no device sends."""

import queue
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import grpc
from grpc import StatusCode
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, IdentityKey
from client.gateway.calls import Asked, Conversation, conversation
from coordinator.gateway.carriers import ConversationServer
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.gateway.messages import RetryWindow, retry_window
from tests.support.gateway import HOST

PATIENCE = 20.0  # seconds
PAGE = "http://127.0.0.1:8765"
GRPC, SOCKET = "gRPC", "WebSocket"
CARRIERS = (GRPC, SOCKET)


class Kind(Enum):
    """How a conversation ends, whichever the carrier, by what the device does then."""

    DONE = ("over", {StatusCode.OK}, {1000, 1001})
    LATER = (
        "tries again",
        {StatusCode.RESOURCE_EXHAUSTED, StatusCode.DEADLINE_EXCEEDED, StatusCode.UNAVAILABLE, StatusCode.CANCELLED},
        {1006, 1009, 1013},
    )
    INVALID = ("sent what is not valid", {StatusCode.INVALID_ARGUMENT}, {1007})
    REFUSED = ("is refused", {StatusCode.PERMISSION_DENIED}, {1008})

    @classmethod
    def of(cls, code: StatusCode | int) -> "Kind":
        return next(kind for kind in cls if code in kind.value[1] | kind.value[2])


class Over(Exception):  # noqa: N818
    """A conversation has ended."""

    def __init__(self, code: StatusCode | int, reason: str, window: RetryWindow | None = None) -> None:
        super().__init__(f"{code}: {reason}")
        self.kind, self.code, self.reason, self.window = Kind.of(code), code, reason, window


class Talk:
    """A conversation; a thread receives."""

    def __init__(self) -> None:
        self._received: queue.Queue[bytes | Over] = queue.Queue()
        self._thread = threading.Thread(target=self._receive, daemon=True)
        self._thread.start()

    def _messages(self) -> Iterator[bytes]:
        """The messages; raises Over."""
        raise NotImplementedError

    def send(self, *sent: bytes | str) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    def _receive(self) -> None:
        try:
            for raw in self._messages():
                self._received.put(raw)
        except Over as over:
            self._received.put(over)

    def receive(self, seconds: float = PATIENCE) -> bytes:
        """The next message. Raises Over."""
        found = self._received.get(timeout=seconds)
        if isinstance(found, Over):
            self._received.put(found)
            raise found
        return found

    def ended(self) -> Over:
        """How it ends; what comes before that is dropped."""
        try:
            while True:
                self.receive()
        except Over as over:
            return over

    def is_quiet(self) -> bool:
        """Whether nothing came that was not read."""
        return self._received.empty()

    def request(self) -> Asked:
        head = messages.REQUEST.decode(self.receive())
        fields = dict(head.fields)
        for name, size in sorted(head.blobs.items()):
            reader = messages.PartReader(size)
            while reader.left:
                reader.add(self.receive())
            fields[name] = bytes(reader.body)
        return Asked(head.id, head.step, fields)

    def answer(self, number: int | None, body: bytes) -> None:
        self.send(*messages.answer_messages(number or 0, body))


class GrpcTalk(Talk):
    def __init__(self, address: str, path: str, authority: Authority) -> None:
        self._opened = conversation(address, path, authority.root.to_pem())
        self.conversation: Conversation = self._opened.__enter__()
        super().__init__()

    def _messages(self) -> Iterator[bytes]:
        call = self.conversation.call
        try:
            yield from call
        except grpc.RpcError:
            pass
        except ValueError as error:  # the channel was closed
            raise Over(StatusCode.CANCELLED, str(error)) from None
        raise Over(call.code(), str(call.details()), retry_window(call.trailing_metadata()))

    def send(self, *sent: bytes | str) -> None:
        self.conversation.send([each.encode() if isinstance(each, str) else each for each in sent])

    def close(self) -> None:
        self.conversation.call.cancel()
        self._opened.__exit__(None, None, None)


class SocketTalk(Talk):
    def __init__(self, url: str, **options: Any) -> None:
        given = {"origin": PAGE, "compression": None, "max_size": None, "proxy": None, **options}
        self.connection: ClientConnection = connect(url, **given)
        super().__init__()

    def _messages(self) -> Iterator[bytes]:
        try:
            while True:
                raw = self.connection.recv()
                assert isinstance(raw, bytes)
                yield raw
        except ConnectionClosed as closed:
            code, reason = (closed.rcvd.code, closed.rcvd.reason) if closed.rcvd else (1006, "")
            window, _, text = reason.partition(" ")
            found = retry_window(((messages.RETRY_WINDOW, window),))
            raise Over(code, text if found else reason, found) from None

    def send(self, *sent: bytes | str) -> None:
        with suppress(ConnectionClosed):  # as over gRPC, ``ended`` says that the service has ended it meanwhile
            for each in sent:
                self.connection.send(each)

    def close(self) -> None:
        self.connection.close()


def talk_of(carrier: str, server: ConversationServer, path: str, authority: Authority, **options: Any) -> Talk:
    """A conversation with a service."""
    if carrier == GRPC:
        return GrpcTalk(f"{HOST}:{server.port}", path, authority)
    return SocketTalk(server.url(path), **options)


@dataclass
class LightDevice:
    """A device with a certified identity, at a gateway."""

    server: ConversationServer
    authority: Authority
    name: str
    carrier: str = GRPC
    version: str = "1.2.3"
    clock: int | None = None
    identity: IdentityKey = field(default_factory=lambda: IdentityKey.generate(SystemEntropy()))
    talks: list[Talk] = field(default_factory=list)

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        dates = {"not_before": now - timedelta(days=1), "not_after": now + timedelta(days=1)}
        self.certificate = self.authority.issue(self.name, self.identity.public, **dates)

    def connect(self, **options: Any) -> Talk:
        """A conversation in which nothing was said yet."""
        self.talks.append(talk_of(self.carrier, self.server, messages.ATTEND, self.authority, **options))
        return self.talks[-1]

    def hello(self, challenge: bytes, *, host: str = HOST, key: IdentityKey | None = None, stated: str = "") -> bytes:
        """The answer to a challenge; ``stated``: a host other than the signed one."""
        nonce = messages.CHALLENGE.decode(challenge).nonce
        signature = (key or self.identity).sign(messages.CHALLENGE_TAG, nonce + host.encode())
        return messages.HELLO.encode(
            messages.DeviceHello(self.certificate, stated or host, signature, self.version, self.clock)
        )

    def greet(self, **options: Any) -> Talk:
        """A conversation in which the challenge was answered; it may be refused."""
        talk = self.connect(**options)
        talk.send(self.hello(talk.receive()))
        return talk

    def attend(self, **options: Any) -> Talk:
        """A conversation in which the device is admitted."""
        talk = self.greet(**options)
        assert talk.receive() == messages.ADMITTED
        return talk

    def is_let_in(self) -> bool:
        try:
            self.attend().close()
        except (Over, OSError, queue.Empty, WebSocketException):
            return False
        return True

    def close(self) -> None:
        for talk in self.talks:
            talk.close()
