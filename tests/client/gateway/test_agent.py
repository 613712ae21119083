"""When an agent calls again, how it ends a conversation, and what it answers when it is asked once more."""

from datetime import UTC, datetime, timedelta

import grpc
import pytest
from grpc import StatusCode

from client.gateway import agent as module
from client.gateway.agent import Agent
from client.gateway.calls import FIRST_PAUSE, LONGEST_PAUSE, Asked, conversation, one_line, pause
from client.node.step import Refusal, RefusalCode
from coordinator.gateway.server import Gateway
from coordinator.servertls import ServerTls
from edgeadapt.formats.gateway import messages
from tests.coordinator.gateway.conftest import Site, SiteOf, site_of
from tests.support.authority import signer, store
from tests.support.gateway import HOST, certify
from tests.support.lightdevice import GrpcTalk, Kind

__all__ = ["signer", "site_of", "store"]


class Failed(grpc.RpcError):
    """A call's end, as gRPC raises it."""

    def __init__(self, code: StatusCode) -> None:
        super().__init__(code.name)
        self.trailing_metadata = lambda: None


def test_pauses_grow_to_a_minute_and_stay_below_the_time_that_the_gateway_was_away() -> None:
    error, away = Failed(StatusCode.UNAVAILABLE), FIRST_PAUSE
    for attempt in range(1, 30):
        longest = max(pause(attempt, error) for _ in range(50))
        assert longest <= LONGEST_PAUSE
        assert attempt < 4 or longest <= 0.75 * away
        away += longest
    assert longest > LONGEST_PAUSE / 2


def test_a_device_that_declines_is_heard_out_before_its_conversation_ends(site_of: SiteOf) -> None:
    site: Site = site_of()
    talk = site.device("kitchen").attend()
    assert isinstance(talk, GrpcTalk)
    number, answer = site.ask("kitchen"), bytes(2**22)
    talk.answer(talk.request().id, answer)
    talk.conversation.finish()
    assert site.answered() == (number, answer)
    assert talk.ended().kind is Kind.DONE


def test_a_repeated_request_gets_the_last_answer_and_one_that_was_refused_may_get_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    answers = iter([b"first", Refusal(RefusalCode.REFUSED, "no"), b"second", b"third"])
    monkeypatch.setattr(module, "answer", lambda *given, **options: next(answers))
    monkeypatch.setattr(module, "subject", lambda certificate: "kitchen")
    monkeypatch.setattr(module, "load", lambda certificate: None)
    monkeypatch.setattr(module.DeviceStateDir, "open", lambda folder: FakeStateDir())
    agent, fields = Agent(tmp_path_factory.mktemp("device"), ()), {"body": b"a", "adapter": b"b"}
    assert agent._answered(Asked(1, "plan", fields)) == b"first"
    assert agent._answered(Asked(2, "plan", dict(reversed(fields.items())))) == b"first"
    refused = agent._answered(Asked(3, "offer", fields))
    assert agent._answered(Asked(3, "offer", fields)) is refused
    assert agent._answered(Asked(4, "offer", fields)) == b"second"
    assert agent._answered(Asked(5, "offer", {"body": b"ab", "adapter": b""})) == b"third"


class FakeStateDir:
    certificate = b""


@pytest.mark.parametrize(("days", "why"), [(1, "is not yet valid"), (-3, "has expired")])
def test_a_device_that_takes_a_gateways_certificate_for_invalid_says_its_own_clock(
    site_of: SiteOf, days: int, why: str
) -> None:
    authority, begin = site_of().authority, datetime.now(UTC) + timedelta(days=days)
    tls = ServerTls(*certify(authority, not_before=begin, not_after=begin + timedelta(days=1)))
    gateway = Gateway(f"{HOST}:0", tls, lambda at: authority.root, lambda number, answer: None)
    talking = conversation(f"{HOST}:{gateway.port}", messages.ATTEND, authority.root.to_pem())
    with pytest.raises(grpc.RpcError) as caught, talking as talk:
        talk.receive()
    gateway.close()
    before, _, clock = one_line(caught.value).partition("; the clock of this device says ")
    assert before == f"TLS: certificate {why}"
    assert datetime.now(UTC) - datetime.strptime(f"{clock}+0000", "%Y-%m-%d %H:%M UTC%z") < timedelta(days=1)
