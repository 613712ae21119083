"""A light device that a test drives call by call, so that it can send what no agent sends."""

import queue
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc

from adapters.gateway import frames
from adapters.gateway import gateway_pb2 as pb
from aggregation.entropy import SystemEntropy
from aggregation.pki import Authority, IdentityKey
from aggregation.pki.certificates import to_der
from aggregation.pki.tls import TlsRole, bind
from tests.support.gateway import certify, channel

PATIENCE = 20.0  # seconds


@dataclass
class LightDevice:
    """A device with a certified identity and a certified TLS key, connected to a gateway."""

    port: int
    authority: Authority
    name: str
    identity: IdentityKey = field(default_factory=lambda: IdentityKey.generate(SystemEntropy()))
    role: TlsRole = TlsRole.DEVICE
    version: str = "1.2.3"

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        dates = {"not_before": now - timedelta(days=1), "not_after": now + timedelta(days=1)}
        self.certificate = self.authority.issue(self.name, self.identity.public, **dates)
        self.tls_key, self.tls_certificate = certify(self.authority, self.name, self.role)
        self.connect()

    def connect(self) -> None:
        """A new connection with the same credentials."""
        self.channel = channel(self.port, self.tls_key, self.tls_certificate, self.authority)

    @property
    def hello(self) -> bytes:
        binding = bind(self.identity, to_der(self.tls_certificate))
        return bytes(pb.Hello(certificate=self.certificate, binding=binding, version=self.version).SerializeToString())

    def attend(self, hello: bytes | None = None) -> "Attendance":
        """Open a stream; returns when it is admitted or refused."""
        return Attendance(self.channel.unary_stream(frames.ATTEND)(self.hello if hello is None else hello))

    def answer(self, parts: Iterable[bytes], seconds: float = PATIENCE) -> bytes:
        found: bytes = self.channel.stream_unary(frames.ANSWER)(iter(parts), timeout=seconds)
        return found

    def fetch(self, sha256: bytes, offset: int = 0) -> bytes:
        asked = pb.Range(sha256=sha256, offset=offset).SerializeToString()
        call = self.channel.unary_stream(frames.FETCH)(asked, timeout=PATIENCE)
        return b"".join(frames.chunk(raw) for raw in call)

    def status(self) -> pb.StatusReply:
        return pb.StatusReply.FromString(self.channel.unary_unary(frames.STATUS)(b"", timeout=PATIENCE))

    def raw(self, method: str, kind: str, message: bytes) -> Any:
        """Any bytes to a call of any kind."""
        call = getattr(self.channel, kind)(method)
        given = iter([message]) if kind.startswith("stream") else message
        found = call(given, timeout=PATIENCE)
        return list(found) if kind.endswith("stream") else found

    def close(self) -> None:
        self.channel.close()


class Attendance:
    """An open stream, read by a thread."""

    def __init__(self, call: Any) -> None:
        self.call = call
        call.initial_metadata()  # waits until the device is admitted or refused
        self.requests: queue.Queue[pb.Request] = queue.Queue()
        self.error: grpc.RpcError | None = None
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for raw in self.call:
                self.requests.put(frames.request(raw))
        except grpc.RpcError as error:
            self.error = error

    def request(self, seconds: float = PATIENCE) -> pb.Request:
        return self.requests.get(timeout=seconds)

    def refused(self) -> tuple[grpc.StatusCode, str]:
        self._thread.join(PATIENCE)
        assert self.error is not None
        return self.error.code(), self.error.details()

    def cancel(self) -> None:
        self.call.cancel()
        self._thread.join(PATIENCE)
