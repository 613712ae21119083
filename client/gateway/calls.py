"""Which failures of a call pass by themselves, how long to wait then, and what the others mean."""

import secrets

import grpc
from grpc import StatusCode

from adapters.gateway import frames
from aggregation.errors import EdgeAdaptError, ProtocolError, TrustError

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before another attempt
GROWTH = 1.5  # of the pauses: a gateway that was away for a time is found again within half of it
PASSING = {
    StatusCode.UNAVAILABLE,
    StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.CANCELLED,  # by a service that is shutting down
    StatusCode.UNKNOWN,
    StatusCode.INTERNAL,
}


def pause(attempt: int, error: grpc.RpcError) -> float:
    """Seconds before another attempt: what the service says, or up to ``GROWTH`` times as long each time, at random.

    Args:
        attempt: From 1.
        error: Of the last one.
    """
    named = dict(error.trailing_metadata() or ()).get(frames.RETRY_AFTER, "")
    if isinstance(named, str) and named.isdecimal() and len(named) < 8:
        return min(int(named) / 1000, LONGEST_PAUSE)
    most = min(FIRST_PAUSE * GROWTH ** min(attempt, 16), LONGEST_PAUSE)
    return most * (0.5 + secrets.randbelow(2**20) / 2**21)  # so that not all devices come back at once


def until(window: frames.RetryWindow) -> float:
    """Seconds until a device comes back: a random time within the window, by the operating system's entropy."""
    return secrets.SystemRandom().uniform(window.earliest, window.latest)


def refusal(error: grpc.RpcError, peer: str) -> EdgeAdaptError:
    """What a refusal of ``peer`` means."""
    text = f"{peer} refuses this device: {' '.join(str(error.details()).split())[:400]}"
    if error.code() in (StatusCode.PERMISSION_DENIED, StatusCode.UNAUTHENTICATED):
        return TrustError(text, about="gateway")
    return ProtocolError(text, about="gateway")
