"""Which bytes a device and a gateway accept from each other, and the limits and settings of their connection.

Both sides hand raw bytes to these functions: any bytes give a message within the limits or raise ``ProtocolError``. The
content of the fields is the protocol's; its core checks it. Unknown fields are ignored, as protocol buffers demand.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from adapters.gateway import gateway_pb2 as pb
from aggregation.errors import ProtocolError
from aggregation.pki.certificates import MAX_CERTIFICATE, same_name
from aggregation.pki.identity import SIGNATURE
from aggregation.pki.requests import MAX_REQUEST
from aggregation.steps import Step

SERVICE = pb.DESCRIPTOR.services_by_name["Gateway"].full_name
ENROLMENT = pb.DESCRIPTOR.services_by_name["Enrolment"].full_name
ATTEND, FETCH, ANSWER, STATUS = (f"/{SERVICE}/{name}" for name in ("Attend", "Fetch", "Answer", "Status"))
ENROL, RENEW = (f"/{ENROLMENT}/{name}" for name in ("Enrol", "Renew"))

RETRY_AFTER = "retry-after-ms"  # trailing metadata of an error: when the call may succeed
RETRY_WINDOW = "retry-window-ms"  # trailing metadata of the end of Attend: FROM-TO, when the device comes back
LONGEST_WAIT = 86_400.0  # seconds until a device comes back
INLINE = 2**16  # bytes of a field that is in the request itself; a longer one is fetched
CHUNK = 2**18  # bytes
MAX_MESSAGE = 2**19  # bytes of one gRPC message
MAX_METADATA = 2**13  # bytes
MAX_FIELDS = 8
MAX_BLOB = 2**32  # bytes of an adapter
MAX_ANSWER = 2**26 + 2**16  # bytes: a masked input at its limit, with its signature
MAX_REASON = 400  # bytes
DIGEST = 32  # bytes of SHA-256
_NAME = 32  # characters of a field's name
_VERSION = 64  # characters of a version

M = TypeVar("M", bound=Message)  # of the generated classes

# A peer that is gone shows within a minute. A device may ping no more often than the gateway allows.
_COMMON = {
    "grpc.max_receive_message_length": MAX_MESSAGE,
    "grpc.max_send_message_length": MAX_MESSAGE,
    "grpc.max_metadata_size": MAX_METADATA,
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.keepalive_permit_without_calls": 1,
}
DEVICE_OPTIONS = tuple({**_COMMON, "grpc.enable_retries": 0, "grpc.http2.max_pings_without_data": 0}.items())
GATEWAY_OPTIONS = tuple(
    {
        **_COMMON,
        "grpc.http2.max_pings_without_data": 0,
        "grpc.http2.min_recv_ping_interval_without_data_ms": 10_000,
        "grpc.server_handshake_timeout_ms": 10_000,  # a peer that connects and says nothing
        "grpc.max_concurrent_streams": 8,  # calls on one connection; a device has two at once
        "grpc.so_reuseport": 0,  # a second gateway on one port is an error
    }.items()
)


def node_of(device: str) -> int:
    """The node of a device on the coordinator's grid: 63 bits of a digest of its certified name, never 0.

    Both sides compute it, so that a device signs challenges for its own node only.
    """
    digest = hashlib.sha256(b"edgeadapt/node\x00" + same_name(device).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1 or 1


@dataclass(frozen=True, slots=True)
class RetryWindow:
    """Within which seconds from now on a device comes back, at a random time."""

    earliest: float
    latest: float

    def metadata(self) -> tuple[tuple[str, str]]:
        """For the end of a call; the reader is ``retry_window``."""
        return ((RETRY_WINDOW, f"{math.ceil(1000 * self.earliest)}-{math.ceil(1000 * self.latest)}"),)


def retry_window(metadata: Iterable[tuple[str, str | bytes]] | None) -> RetryWindow | None:
    """The window in the trailing metadata of a call, at most a day. None: it has no window, or a damaged one."""
    found = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", str(dict(metadata or ()).get(RETRY_WINDOW, "")))
    if found is None or int(found[1]) > int(found[2]):
        return None
    earliest, latest = (min(int(text) / 1000, LONGEST_WAIT) for text in found.groups())
    return RetryWindow(earliest, latest)


def hello(raw: bytes) -> pb.Hello:
    """What a device presents.

    Raises:
        ProtocolError: The bytes are no ``Hello``, or a part has another length than any certificate or signature.
    """
    message = _parse(pb.Hello, raw)
    _require(0 < len(message.certificate) <= MAX_CERTIFICATE, "hello.certificate")
    _require(len(message.binding) == SIGNATURE, "hello.binding")
    _require(0 < len(message.version) <= _VERSION, "hello.version")
    return message


def request(raw: bytes) -> pb.Request:
    """A request of the coordinator.

    Raises:
        ProtocolError: The bytes are no ``Request``, or it has an unknown step or fields that no step has.
    """
    message = _parse(pb.Request, raw)
    _require(message.id > 0, "request.id")
    _require(message.step in {step.value for step in Step}, "request.step")
    names = [*message.fields, *message.blobs]
    _require(len(names) == len(set(names)) and 0 < len(names) <= MAX_FIELDS, "request.fields")
    _require(all(0 < len(name) <= _NAME for name in names), "request.fields")
    for blob in message.blobs.values():
        _require(len(blob.sha256) == DIGEST and blob.size <= MAX_BLOB, "request.blobs")
    return message


def byte_range(raw: bytes) -> pb.Range:
    """Which bytes a device asks for.

    Raises:
        ProtocolError: The bytes are no ``Range``.
    """
    message = _parse(pb.Range, raw)
    _require(len(message.sha256) == DIGEST and message.offset <= MAX_BLOB, "range")
    return message


def chunk(raw: bytes) -> bytes:
    """A part of a blob.

    Raises:
        ProtocolError: The bytes are no ``Chunk``, or it is empty or over the limit.
    """
    message = _parse(pb.Chunk, raw)
    _require(0 < len(message.data) <= CHUNK, "chunk")
    return message.data


def beginning(raw: bytes) -> pb.Beginning:
    """How an answer begins.

    Raises:
        ProtocolError: The bytes are no such part, or the answer is empty without a reason, or over the limit.
    """
    message = _parse(pb.AnswerPart, raw)
    _require(message.WhichOneof("part") == "beginning", "answer.beginning")
    found = message.beginning
    _require(found.request > 0, "answer.request")
    _require(found.HasField("reason") != (found.size > 0), "answer.reason")
    _require(found.size <= MAX_ANSWER, "answer.size", found.size)
    _require(len(found.reason.text.encode()) <= MAX_REASON, "answer.reason")
    return found


def answer_data(raw: bytes) -> bytes:
    """A later part of an answer.

    Raises:
        ProtocolError: The bytes are no such part, or it is empty or over the limit.
    """
    message = _parse(pb.AnswerPart, raw)
    _require(message.WhichOneof("part") == "data", "answer.data")
    _require(0 < len(message.data) <= CHUNK, "answer.data")
    return message.data


def answer_parts(number: int, body: bytes) -> Iterator[bytes]:
    """The messages that carry an answer; the readers are ``beginning`` and ``answer_data``."""
    yield pb.AnswerPart(beginning=pb.Beginning(request=number, size=len(body))).SerializeToString()
    for at in range(0, len(body), CHUNK):
        yield pb.AnswerPart(data=body[at : at + CHUNK]).SerializeToString()


def reason_parts(number: int, code: int, text: str) -> Iterator[bytes]:
    """The message that says why there is no answer; a long text is cut."""
    cut = text.encode()[:MAX_REASON].decode(errors="ignore")
    found = pb.Beginning(request=number, reason=pb.Reason(code=code, text=cut))
    yield pb.AnswerPart(beginning=found).SerializeToString()


def chunks(content: bytes, offset: int) -> Iterator[bytes]:
    """The messages that carry a blob from an offset on; the reader is ``chunk``."""
    for at in range(offset, len(content), CHUNK):
        yield pb.Chunk(data=content[at : at + CHUNK]).SerializeToString()


def request_message(number: int, step: str, fields: Mapping[str, bytes], digests: Mapping[str, bytes]) -> bytes:
    """A request; the reader is ``request``.

    Args:
        number: Its id.
        step: Of the protocol.
        fields: All of them.
        digests: Field → SHA-256, for those that are fetched.
    """
    inline = {name: content for name, content in fields.items() if name not in digests}
    blobs = {name: pb.Blob(sha256=digest, size=len(fields[name])) for name, digest in digests.items()}
    return bytes(pb.Request(id=number, step=step, fields=inline, blobs=blobs).SerializeToString())


def enrol_request(raw: bytes) -> pb.EnrolRequest:
    """What a device that enrols asks for.

    Raises:
        ProtocolError: The bytes are no ``EnrolRequest``, or a part is missing.
    """
    message = _parse(pb.EnrolRequest, raw)
    _require(bool(message.token and message.request and message.tls_request), "enrol.request")
    return message


def renew_request(raw: bytes) -> pb.RenewRequest:
    """What a device asks for whose certificates end soon.

    Raises:
        ProtocolError: The bytes are no ``RenewRequest``, or a part is missing or too long.
    """
    message = _parse(pb.RenewRequest, raw)
    _require(0 < len(message.certificate) <= MAX_CERTIFICATE, "renew.certificate")
    _require(len(message.signature) == SIGNATURE, "renew.signature")
    _require(0 < len(message.tls_request) <= MAX_REQUEST, "renew.request")
    return message


def enrolled(raw: bytes) -> pb.Enrolled:
    """What a device that enrols receives. Raises as ``enrol_request``."""
    message = _parse(pb.Enrolled, raw)
    _require(bool(message.certificate and message.tls_certificate), "enrol.reply")
    return message


def _parse(kind: type[M], raw: bytes) -> M:
    message: M = kind()
    name = kind.DESCRIPTOR.name
    if len(raw) > MAX_MESSAGE:
        raise ProtocolError(f"{name} of {len(raw)} bytes is over the limit of {MAX_MESSAGE}", about="message.size")
    try:
        message.ParseFromString(raw)
    except DecodeError:
        raise ProtocolError(f"the bytes are not a {name}", about="message.encoding") from None
    return message


def _require(holds: bool, about: str, value: object = None) -> None:
    if not holds:
        shown = "" if value is None else f" of {value}"
        raise ProtocolError(f"{about}{shown} is missing or outside its limits", about=about, value=value)
