"""A device that no longer belongs to the fleet: its certificate expires while a session of several rounds is under way.

Certificates are checked when a session is offered. A coordinator that makes sessions as long as devices allow keeps a
member for the whole of it, and the others go on hiding behind a device that the authority meant to be gone.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from flwr.app import Context, Message

from aggregation import checks, client, server
from aggregation.errors import ProtocolError
from aggregation.pki import Authority
from aggregation.sealedstate import seal, unseal
from aggregation.server import AbortReason, Coordinator, Established, RoundAborted
from aggregation.steps import Step
from client.node.app import app as client_app
from client.node.statedir import AUTHORITY, CERTIFICATE
from coordinator.app import run
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.auditing import audit
from tests.client.node.conftest import refusals
from tests.support import FleetOf, refused
from tests.support.fleet import ADAPTER, BEGIN, Fleet, make_fleet
from tests.support.hostile import audit_failures

__all__ = ["refusals"]
VICTIM = "device-02"
HOUR = timedelta(hours=1)
END = BEGIN + 2 * HOUR
SEALING = bytes(32)


class Later(datetime):
    """The clock of everyone, put forward."""

    ahead = timedelta()

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime.now(tz) + cls.ahead


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> type[Later]:
    for module in ("client.node.step", "coordinator.session", "coordinator.session", "coordinator.rounds"):
        monkeypatch.setattr(f"{module}.datetime", Later)
    monkeypatch.setattr(Later, "ahead", timedelta())
    return Later


def unchecked_time(root: Any, present: Any) -> Any:
    return present


@pytest.mark.parametrize("checked", [True, False])
def test_a_certificate_that_expires_while_others_check_in_does_not_end_the_run(
    fleet: Any, later: type[Later], monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    def waited(message: Message, context: Context) -> Message:
        answer = client_app(message, context)
        if message.metadata.message_type == Step.CHECK_IN.message_type:
            answered.append(context.node_id)
            later.ahead = timedelta() if len(answered) < 8 else 2 * HOUR  # for the last of them
        return answer

    answered = list[int]()
    if not checked:
        monkeypatch.setattr("coordinator.session._still_valid", unchecked_time)
        with refused(ProtocolError, "certificate.validity"):
            fleet.federate(fleet.grid(app=waited))
        return
    first, second = fleet.federate(fleet.grid(app=waited))
    assert len(first.survivors) == len(second.survivors) == 7
    assert VICTIM not in first.survivors


@pytest.fixture
def fleet(app_fleet_of: FleetOf) -> Any:
    """Eight devices and a session of four rounds; the certificate of one of them expires in an hour."""
    made, now = app_fleet_of(8, rounds=2, aggregation__session_rounds=4), datetime.now(UTC)
    authority = Authority.from_pem((made.out / "authority" / AUTHORITY).read_bytes())
    state_dir = made.state_dir(VICTIM)
    short = authority.issue(VICTIM, state_dir.identity.public, not_before=now - HOUR, not_after=now + HOUR)
    (state_dir.folder / CERTIFICATE).write_bytes(short)
    return made


def two_rounds(fleet: Any, later: type[Later]) -> tuple[Any, Any]:
    """The records of a round before the certificate expires, and of one after that."""
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    records = run(state_dir, fleet.grid())
    first = next(records)
    later.ahead = 2 * HOUR
    second = next(records)
    assert next(records, None) is None
    state_dir.registry.close()
    return first, second


def logs(fleet: Any) -> list[bytes]:
    return [path.read_bytes() for path in sorted((fleet.out / "coordinator" / "transcript").glob("*.log"))]


def test_the_session_ends_and_the_next_one_is_without_the_device(fleet: Any, later: type[Later]) -> None:
    first, second = two_rounds(fleet, later)
    assert VICTIM in first.survivors
    assert len(first.survivors) == 8
    assert VICTIM not in second.survivors
    assert len(second.survivors) == 7
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    reports = [audit(raw, state_dir.root, state_dir.key.public, lambda digest, _: None) for raw in logs(fleet)]
    state_dir.registry.close()
    assert len(reports) == 2
    assert all(not report.failed for report in reports)
    *_, newest = sorted((fleet.out / "coordinator" / "transcript").glob("*.log"))
    assert not audit_failures(newest, datetime.now(UTC) + 2 * HOUR)


def test_no_device_takes_part_if_the_coordinator_goes_on(
    fleet: Any, later: type[Later], monkeypatch: pytest.MonkeyPatch, refusals: list[str]
) -> None:
    monkeypatch.setattr(Established, "is_over", lambda self, at: not self.rounds_left)
    first, second = two_rounds(fleet, later)
    assert len(first.survivors) == 8
    assert second.aborted
    assert refusals == 8 * ["plan.time"]


def test_without_the_checks_the_device_takes_part_after_its_certificate_expired(
    fleet: Any, later: type[Later], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Established, "is_over", lambda self, at: not self.rounds_left)
    monkeypatch.setattr(checks, "before_end", lambda ends, at: None)
    _, second = two_rounds(fleet, later)
    assert VICTIM in second.survivors
    assert len(logs(fleet)) == 1
    assert not audit_failures(fleet.out)  # a log has no clock
    assert audit_failures(fleet.out, datetime.now(UTC) + 2 * HOUR) == {"certificate.validity"}


# The same without the apps: to the second, and from the sealed state.


def established(end_of: Callable[[int], datetime]) -> tuple[Fleet, Any]:
    """A session of four devices; certificate number n expires at ``end_of(n)``."""
    fleet = make_fleet(4)
    for number, (name, device) in enumerate(sorted(fleet.devices.items())):
        issued = fleet.authority.issue(name, device.identity.public, not_before=BEGIN, not_after=end_of(number))
        fleet.devices[name] = client.Device(device.identity, issued, device.root, device.coordinator, device.policy)
    return fleet, fleet.establish()


@pytest.mark.parametrize("shortest", [0, 3])
def test_a_session_ends_with_the_first_certificate_that_expires(shortest: int) -> None:
    fleet, session = established(lambda number: END if number == shortest else END + HOUR)
    whole = {"adapter_version": 1, "adapter_digest": ADAPTER, "training": b"", "cohort": None}
    over = session.plan(**whole, at=END + timedelta(seconds=1))
    assert isinstance(over, RoundAborted)
    assert (over.reason, over.session) == (AbortReason.SESSION_OVER, session)
    _, plans = session.plan(**whole, at=END)
    for name, plan in plans.items():
        ready = unseal(seal(fleet.states[name], SEALING), SEALING)
        with refused(ProtocolError, "plan.time", peer="coordinator"):
            ready.on_plan(fleet.devices[name], plan, END + timedelta(seconds=1))
        ready.on_plan(fleet.devices[name], plan, END)


def test_a_session_ends_with_the_authoritys_own_certificate() -> None:
    fleet, session = established(lambda number: fleet_end() + HOUR)
    assert session.ends == fleet.authority.root.not_after == fleet_end()


def test_a_session_ends_with_the_revocation_list_that_it_applies() -> None:
    fleet = make_fleet(4)
    listed = fleet.authority.revocations(1, {}, BEGIN, END)
    root = fleet.authority.root.with_revocations(listed.der)
    fleet.devices = {name: replace(device, root=root) for name, device in fleet.devices.items()}
    session = fleet.establish()
    _, plans = fleet.begin(session)
    for name, plan in plans.items():
        with refused(ProtocolError, "plan.time", peer="coordinator"):
            fleet.states[name].on_plan(fleet.devices[name], plan, END + timedelta(seconds=1))
        fleet.states[name].on_plan(fleet.devices[name], plan, END)
    offering, _ = server.open_session(Coordinator(fleet.key), root, fleet.spec, fleet.certificates, fleet.entropy)
    assert offering.ends == END


def fleet_end() -> datetime:
    return make_fleet(4).authority.root.not_after
