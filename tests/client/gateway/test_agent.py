"""When an agent calls again, and how long it waits before that."""

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from client.gateway import agent as module
from client.gateway.agent import ATTEMPTS, Agent
from client.gateway.calls import FIRST_PAUSE, LONGEST_PAUSE, pause


class Failed(grpc.RpcError):
    """A call's end, as gRPC raises it."""

    def __init__(self, code: StatusCode) -> None:
        super().__init__(code.name)
        self.code = lambda: code
        self.trailing_metadata = lambda: None


class Stream:
    """An open ``Attend`` call that ends after so many looks at it."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def is_active(self) -> bool:
        self.looks -= 1
        return self.looks >= 0


def failing(code: StatusCode) -> tuple[list[int], Callable[[], None]]:
    calls: list[int] = []

    def call() -> None:
        calls.append(len(calls))
        raise Failed(code)

    return calls, call


@pytest.mark.parametrize(
    ("code", "looks", "attempts"),
    [
        (StatusCode.UNAVAILABLE, 1000, ATTEMPTS),
        (StatusCode.UNAVAILABLE, 0, 1),  # the stream broke with the call: another gateway may be there by now
        (StatusCode.UNAVAILABLE, 1, 1),  # it broke during the pause
        (StatusCode.PERMISSION_DENIED, 1000, 1),
    ],
)
def test_a_transfer_is_repeated_only_while_the_device_attends(
    code: StatusCode, looks: int, attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pause", lambda attempt, error: 0.0)
    agent = Agent(tmp_path, ("127.0.0.1:1",))
    agent._call = Stream(looks)
    calls, call = failing(code)
    with pytest.raises(Failed):
        agent._transfer(call)
    assert len(calls) == attempts


def test_pauses_grow_to_a_minute_and_stay_below_the_time_that_the_gateway_was_away() -> None:
    error, away = Failed(StatusCode.UNAVAILABLE), FIRST_PAUSE
    for attempt in range(1, 30):
        longest = max(pause(attempt, error) for _ in range(50))
        assert longest <= LONGEST_PAUSE
        assert attempt < 4 or longest <= 0.75 * away
        away += longest
    assert longest > LONGEST_PAUSE / 2
