"""The messages between a page in a browser and the gateway over a WebSocket, in the protocol's canonical encoding.

    gateway → page    SocketChallenge
    page → gateway    SocketHello
    gateway → page    ADMITTED, then each SocketRequest, one at a time
    page → gateway    for each a SocketAnswer, then its body in messages of at most ``frames.CHUNK`` bytes

``client/browser/page/aggregation/websocket.js`` is the page's side. At the authority's enrolment service there is one
message each way: a SocketEnrolment or a SocketRenewal, and the certificate (DER). That side is in
``client/browser/page/invitation.js``.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from adapters.gateway import frames
from aggregation import wire
from aggregation.errors import ConfigError
from aggregation.pki.certificates import MAX_CERTIFICATE
from aggregation.pki.identity import KEY, SIGNATURE
from aggregation.pki.requests import MAX_REQUEST

PATH = "/edgeadapt.gateway.v1/attend"
ENROLMENT_PATH = "/edgeadapt.gateway.v1/enrol"
RENEWAL_PATH = "/edgeadapt.gateway.v1/renew"
ADMITTED = b""
NONCE = 32  # bytes
_NAME = wire.text(r"[a-z_]{1,32}")  # of a step or a field


@dataclass(frozen=True, slots=True)
class SocketChallenge:
    """What the device is to sign, together with the host of the gateway (``aggregation.pki.tls.verify_challenge``)."""

    nonce: Annotated[bytes, wire.fixed(NONCE)]


@dataclass(frozen=True, slots=True)
class SocketHello:
    """Who the device is: the certificate of its identity, in DER, its answer to the challenge, and its version."""

    certificate: Annotated[bytes, wire.blob(MAX_CERTIFICATE)]
    binding: Annotated[bytes, wire.fixed(SIGNATURE)]
    version: Annotated[str, wire.text(r"[0-9A-Za-z.+!-]{1,64}")]


@dataclass(frozen=True, slots=True)
class SocketRequest:
    """A step of the protocol, with all of its fields."""

    id: Annotated[int, wire.uint(64)]
    step: Annotated[str, _NAME]
    fields: Annotated[Mapping[str, bytes], wire.mapping(_NAME, wire.blob(frames.MAX_BLOB - 1), frames.MAX_FIELDS)]


@dataclass(frozen=True, slots=True)
class SocketAnswer:
    """How an answer begins: the size of its body, or a code and the reason why it is missing."""

    id: Annotated[int, wire.uint(64)]
    size: Annotated[int, wire.uint(32)]
    code: Annotated[int, wire.uint(16)]
    reason: Annotated[bytes, wire.blob(frames.MAX_REASON)] = field(default=b"")

    def __post_init__(self) -> None:
        if (self.size > 0) == (self.code > 0) or (self.size and self.reason):
            raise ConfigError("an answer has either a body or a reason", about="answer.reason")
        if self.size > frames.MAX_ANSWER:
            raise ConfigError(f"answer of {self.size} bytes is over the limit", about="answer.size", value=self.size)


@dataclass(frozen=True, slots=True)
class SocketEnrolment:
    """What an invited page asks for: a certificate for the key in its request.

    Attributes:
        invited: The public half of the invitation's key.
        signature: Of that key, on the request.
        request: PKCS #10, PEM or DER.
    """

    invited: Annotated[bytes, wire.fixed(KEY)]
    signature: Annotated[bytes, wire.fixed(SIGNATURE)]
    request: Annotated[bytes, wire.blob(MAX_REQUEST)]


@dataclass(frozen=True, slots=True)
class SocketRenewal:
    """What a page asks for whose certificate ends soon: a newer one for the same key.

    Attributes:
        certificate: Of its identity, DER.
        signature: Of that identity, on the certificate.
    """

    certificate: Annotated[bytes, wire.blob(MAX_CERTIFICATE)]
    signature: Annotated[bytes, wire.fixed(SIGNATURE)]


CHALLENGE, HELLO = wire.record(SocketChallenge), wire.record(SocketHello)
REQUEST, ANSWER = wire.record(SocketRequest), wire.record(SocketAnswer)
ENROLMENT, RENEWAL = wire.record(SocketEnrolment), wire.record(SocketRenewal)


def answer_messages(number: int, body: bytes) -> Iterator[bytes]:
    """The messages that carry an answer."""
    yield ANSWER.encode(SocketAnswer(number, len(body), 0))
    for at in range(0, len(body), frames.CHUNK):
        yield body[at : at + frames.CHUNK]
