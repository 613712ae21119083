"""Conversations of a light device over gRPC: the messages in both directions, and what the end of a call means. The
server's TLS certificate is verified under the authority that the device pins, for the host of the address."""

import ipaddress
import queue
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import chain
from typing import Any, NamedTuple

import grpc
from grpc import StatusCode

from aggregation.errors import EdgeAdaptError, ProtocolError, TrustError
from edgeadapt.formats.gateway import messages
from edgeadapt.formats.gateway.messages import PartReader

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before another attempt
GROWTH = 1.5  # a gateway that was away for a time is found again within half of that
PASSING = {
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.CANCELLED,  # by a service that is shutting down
    StatusCode.UNKNOWN,
    StatusCode.INTERNAL,
}


class Asked(NamedTuple):
    id: int
    step: str
    fields: dict[str, bytes]


class Conversation:
    """An open call. What its methods raise is gRPC's error if the call broke or was refused."""

    def __init__(self, call: Any, sent: "queue.SimpleQueue[Iterable[bytes] | None]") -> None:
        self.call = call  # grpc.Call and an iterator, which has no types
        self._sent = sent

    def send(self, parts: Iterable[bytes]) -> None:
        """Send messages once the peer has room for them. Does not wait for that."""
        self._sent.put(parts)

    def finish(self) -> None:
        """Send no more after what was sent so far. The peer then ends the call."""
        self._sent.put(None)

    def receive(self) -> bytes:
        """Wait for the next message. Raises EdgeAdaptError: the peer has ended the call."""
        for raw in self.call:
            return bytes(raw)
        raise EdgeAdaptError("the conversation ended early", about="gateway.end")

    def requests(self) -> Iterator[Asked]:
        """Yield the gateway's requests, until it ends the call. Raises ProtocolError: bytes are not a request."""
        for raw in self.call:
            head = messages.REQUEST.decode(raw)
            fields = dict(head.fields)
            for name, size in sorted(head.blobs.items()):
                reader = PartReader(size)
                while reader.left:
                    reader.add(self.receive())
                fields[name] = bytes(reader.body)
            yield Asked(head.id, head.step, fields)


@contextmanager
def conversation(address: str, path: str, authority: bytes, timeout: float | None = None) -> Iterator[Conversation]:
    """Have a conversation with the service at ``address``, ``HOST:PORT``, while the block runs. ``path``: which one, of
    ``edgeadapt.formats.gateway.messages``. ``authority``: the pinned certificate, PEM, under which the service's own is
    verified. ``timeout``: seconds for the whole; None: as long as the peer is there."""
    credentials = grpc.ssl_channel_credentials(authority)
    sent: queue.SimpleQueue[Iterable[bytes] | None] = queue.SimpleQueue()
    with grpc.secure_channel(address, credentials, options=messages.DEVICE_OPTIONS) as channel:
        outgoing = chain.from_iterable(iter(sent.get, None))
        try:
            yield Conversation(channel.stream_stream(path)(outgoing, timeout=timeout), sent)
        finally:
            sent.put(None)  # ends gRPC's thread that waits for it


def ask(address: str, path: str, authority: bytes, message: bytes, timeout: float) -> bytes:
    """Send one message in a conversation, and return the answer. Raises RpcError, and EdgeAdaptError without one."""
    with conversation(address, path, authority, timeout) as talk:
        talk.send((message,))
        talk.finish()
        return talk.receive()


def host_of(address: str) -> str:
    """Extract the host in ``HOST:PORT`` as a certificate names it.

    >>> host_of("Fleet.Example:9443"), host_of("[2001:DB8:0::1]:9443")
    ('fleet.example', '2001:db8::1')
    """
    host = address.rpartition(":")[0].strip("[]").lower()
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host


def pause(attempt: int, error: grpc.RpcError) -> float:
    """Choose the seconds before another ``attempt`` (from 1) after an error. They are what the service says, or up to
    ``GROWTH`` times as long each time, at random."""
    if window := messages.retry_window(error.trailing_metadata()):
        return min(until(window), LONGEST_PAUSE)
    most = min(FIRST_PAUSE * GROWTH ** min(attempt, 16), LONGEST_PAUSE)
    return most * (0.5 + secrets.randbelow(2**20) / 2**21)  # so that not all devices come back at once


def until(window: messages.RetryWindow) -> float:
    """Draw the seconds until a device comes back, a random time within the window, by the system's entropy."""
    return secrets.SystemRandom().uniform(window.earliest, window.latest)


def refusal(error: grpc.RpcError, peer: str) -> EdgeAdaptError:
    text = f"{peer} refuses this device: {one_line(error, 400)}"
    if error.code() is StatusCode.PERMISSION_DENIED:
        return TrustError(text, about="gateway")
    return ProtocolError(text, about="gateway")


def one_line(error: grpc.RpcError, longest: int = 200) -> str:
    """Say why a call failed. Where a certificate is not valid at this time, the clock of this device may be wrong."""
    text = " ".join(str(error.details()).split())
    if refused := re.search("CERTIFICATE_VERIFY_FAILED: ([a-z ]+)", text):
        text = f"TLS: {refused[1]}"
    return text[:longest] + (clock() if re.search("expired|not (yet )?valid", text) else "")


def clock() -> str:
    return f"; the clock of this device says {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
