"""The conversation of a device with the gateway and with the authority: its messages, their limits, and who signs what.

Two carriers bring the same messages in the protocol's canonical encoding: gRPC to light devices, as one call with a
stream in each direction, and a WebSocket to pages.

    ATTEND   gateway → device     GatewayChallenge
             device → gateway     DeviceHello
             gateway → device     ADMITTED, then each DeviceRequest, one at a time, and its blobs in parts
             device → gateway     for each a DeviceAnswer, then its body in parts
    ENROL    device → authority   DeviceEnrolment, and back the certificate (DER)
    RENEW    device → authority   DeviceRenewal, and back the certificate (DER)

``client/browser/page/aggregation/websocket.js`` and ``client/browser/page/invitation.js`` are the page's side."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from aggregation import wire
from aggregation.errors import ConfigError, ProtocolError
from aggregation.pki.certificates import MAX_CERTIFICATE, same_name
from aggregation.pki.identity import KEY, SIGNATURE
from aggregation.pki.requests import MAX_REQUEST
from aggregation.steps import Step

SERVICE = "edgeadapt.gateway.v1"
ATTEND, ENROL, RENEW = (f"/{SERVICE}/{name}" for name in ("attend", "enrol", "renew"))  # of a call, and of a URL
CHALLENGE_TAG = "gateway-challenge"  # of the identity's signature on the nonce and the host
RENEWAL_TAG = "renewal"  # of the identity's signature on its certificate

RETRY_WINDOW = "retry-window-ms"  # trailing metadata of a call: FROM-TO, when the device comes back
LONGEST_WAIT = 86_400.0  # seconds until a device comes back
ADMITTED = b""
NONCE = 32  # bytes
INLINE = 2**16  # bytes of a field that is in the request itself; a longer one follows it in parts
CHUNK = 2**18  # bytes of a part, and of any message to a gateway
MAX_MESSAGE = 2**19  # bytes of a message to a device
MAX_FIELDS = 8
MAX_ANSWER = 2**26 + 2**16  # bytes: a masked input at its limit, with its signature
MAX_REASON = 400  # bytes
_NAME = wire.text(r"[a-z_]{1,32}")  # of a step or a field
_STEPS = frozenset(step.value for step in Step)

# A peer that is gone shows within a minute. A device may ping no more often than the gateway allows.
_COMMON = {
    "grpc.max_metadata_size": 2**13,  # bytes
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
}
DEVICE_OPTIONS = tuple({**_COMMON, "grpc.max_receive_message_length": MAX_MESSAGE, "grpc.enable_retries": 0}.items())
GATEWAY_OPTIONS = tuple(
    {
        **_COMMON,
        "grpc.http2.min_recv_ping_interval_without_data_ms": 10_000,
        "grpc.server_handshake_timeout_ms": 10_000,  # a peer that connects and says nothing
        "grpc.max_connection_idle_ms": 10_000,  # a connection without a call
        "grpc.max_concurrent_streams": 4,  # calls on one connection; a device has one
        "grpc.so_reuseport": 0,  # a second gateway on one port is an error
    }.items()
)


@dataclass(frozen=True, slots=True)
class GatewayChallenge:
    """Asks the device to sign this, followed by the host of the gateway."""

    nonce: Annotated[bytes, wire.fixed(NONCE)]


@dataclass(frozen=True, slots=True)
class DeviceHello:
    """Says who the device is.

    Attributes:
        certificate: The certificate of its identity, DER.
        host: Name or address of the gateway, to which the device has connected and whose TLS it has verified.
        signature: Made by the identity over the nonce and ``host``: a challenge of another host cannot be passed on.
        version: The version of edgeadapt on the device, PEP 440.
        clock: The device's own, in seconds since 1970; an earlier version does not send it.
    """

    certificate: Annotated[bytes, wire.blob(MAX_CERTIFICATE)]
    host: Annotated[str, wire.text(r"[a-z0-9._:-]{1,253}")]
    signature: Annotated[bytes, wire.fixed(SIGNATURE)]
    version: Annotated[str, wire.text(r"[0-9A-Za-z.+!-]{1,64}")]
    clock: Annotated[int | None, wire.last(wire.uint(32))] = None


@dataclass(frozen=True, slots=True)
class DeviceRequest:
    """Asks for a step of the protocol. ``blobs``: size of each field that follows in parts, ordered by name."""

    id: Annotated[int, wire.uint(64)]
    step: Annotated[str, _NAME]
    fields: Annotated[Mapping[str, bytes], wire.mapping(_NAME, wire.blob(INLINE), MAX_FIELDS)]
    blobs: Annotated[Mapping[str, int], wire.mapping(_NAME, wire.uint(32), MAX_FIELDS)] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = {*self.fields, *self.blobs}
        if not 0 < len(names) == len(self.fields) + len(self.blobs) <= MAX_FIELDS:
            raise ConfigError("a request has 1 to 8 fields, each once", about="request.fields")
        if self.step not in _STEPS or not self.id:
            raise ConfigError(f"{self.step!r} is not a step of the protocol", about="request.step")


@dataclass(frozen=True, slots=True)
class DeviceAnswer:
    """Begins an answer: the size of its body, or a code and the reason why it is missing."""

    id: Annotated[int, wire.uint(64)]
    size: Annotated[int, wire.uint(32)]
    code: Annotated[int, wire.uint(16)] = 0
    reason: Annotated[bytes, wire.blob(MAX_REASON)] = b""

    def __post_init__(self) -> None:
        if (self.size > 0) == (self.code > 0) or (self.size and self.reason):
            raise ConfigError("an answer has either a body or a reason", about="answer.reason")
        if self.size > MAX_ANSWER:
            raise ConfigError(f"answer of {self.size} bytes is over the limit", about="answer.size")


@dataclass(frozen=True, slots=True)
class DeviceEnrolment:
    """Asks for a certificate for the key in an invited device's request. ``invited``: the public half of the
    invitation's key. ``signature``: made with that key over the request. ``request``: PKCS #10, PEM or DER."""

    invited: Annotated[bytes, wire.fixed(KEY)]
    signature: Annotated[bytes, wire.fixed(SIGNATURE)]
    request: Annotated[bytes, wire.blob(MAX_REQUEST)]


@dataclass(frozen=True, slots=True)
class DeviceRenewal:
    """Asks for a newer certificate for the same key. ``signature``: made by the identity over its ``certificate``."""

    certificate: Annotated[bytes, wire.blob(MAX_CERTIFICATE)]
    signature: Annotated[bytes, wire.fixed(SIGNATURE)]


CHALLENGE, HELLO = wire.record(GatewayChallenge), wire.record(DeviceHello)
REQUEST, ANSWER = wire.record(DeviceRequest), wire.record(DeviceAnswer)
ENROLMENT, RENEWAL = wire.record(DeviceEnrolment), wire.record(DeviceRenewal)


@dataclass(slots=True)
class PartReader:
    left: int
    body: bytearray = field(default_factory=bytearray)

    def add(self, part: bytes) -> None:
        """Add the next part. Raises ProtocolError if it is empty, or longer than a part or what is left."""
        if not 0 < len(part) <= min(CHUNK, self.left):
            text = f"a part has {len(part)} bytes, and {self.left} are left of its body"
            raise ProtocolError(text, about="part.size")
        self.body += part
        self.left -= len(part)


def request_messages(number: int, step: str, fields: Mapping[str, bytes]) -> Iterator[bytes]:
    blobs = {name: content for name, content in fields.items() if len(content) > INLINE}
    short = {name: content for name, content in fields.items() if name not in blobs}
    sizes = {name: len(content) for name, content in blobs.items()}
    yield REQUEST.encode(DeviceRequest(number, step, short, sizes))
    for name in sorted(blobs):
        yield from _parts(blobs[name])


def answer_messages(number: int, body: bytes) -> Iterator[bytes]:
    yield ANSWER.encode(DeviceAnswer(number, len(body)))
    yield from _parts(body)


def reason_message(number: int, code: int, text: str) -> bytes:
    """Make the message that says why there is no answer; a long text is cut where a character ends."""
    cut = text.encode()[:MAX_REASON].decode(errors="ignore").encode()
    return ANSWER.encode(DeviceAnswer(number, 0, code, cut))


def _parts(body: bytes) -> Iterator[bytes]:
    for at in range(0, len(body), CHUNK):
        yield body[at : at + CHUNK]


def node_of(device: str) -> int:
    """Return a device's node on the coordinator's grid: 63 bits of a digest of its certified name, never 0. Both sides
    compute it, so that a device signs challenges for its own node only."""
    digest = hashlib.sha256(b"edgeadapt/node\x00" + same_name(device).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


@dataclass(frozen=True, slots=True)
class RetryWindow:
    """Says within which seconds from now on a device comes back, at a random time."""

    earliest: float
    latest: float

    def to_text(self) -> str:
        """Write the reason of a WebSocket's close; ``metadata`` has it for gRPC."""
        return f"{math.ceil(1000 * self.earliest)}-{math.ceil(1000 * self.latest)}"

    def metadata(self) -> tuple[tuple[str, str]]:
        """Return the metadata for the end of a call; the reader is ``retry_window``."""
        return ((RETRY_WINDOW, self.to_text()),)


def retry_window(metadata: Iterable[tuple[str, str | bytes]] | None) -> RetryWindow | None:
    """Read the window in a call's trailing metadata, at most a day. None: it has no window, or a damaged one."""
    match = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", str(dict(metadata or ()).get(RETRY_WINDOW, "")))
    if match is None or int(match[1]) > int(match[2]):
        return None
    earliest, latest = (min(int(text) / 1000, LONGEST_WAIT) for text in match.groups())
    return RetryWindow(earliest, latest)
