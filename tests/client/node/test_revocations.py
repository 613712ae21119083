"""Revocation in complete runs: the list goes from authority to coordinator, and with an offer to the devices."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from flwr.app import Message

from aggregation.errors import EdgeAdaptError, TrustError
from aggregation.pki import Authority
from aggregation.pki.revocation import Revocation, RevocationList
from aggregation.steps import RECORD, REVOCATIONS, Step
from client.node.app import app
from coordinator.statedir import CoordinatorStateDir
from tests.support import FleetOf, refused
from tests.support.subtracting import VICTIM, Subtracting

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
GONE = "device-01"


def list_of(fleet: Any, number: int, *names: str, begin: datetime = NOW - DAY, days: int = 30) -> RevocationList:
    """A list that the fleet's authority signs."""
    authority = Authority.from_pem((fleet.out / "authority" / "authority.pem").read_bytes())
    certificates = [x509.load_der_x509_certificate(fleet.state_dir(name).certificate) for name in names]
    revoked = {certificate.serial_number: Revocation(begin) for certificate in certificates}
    return authority.revocations(number, revoked, begin, begin + days * DAY)


def install(fleet: Any, revoked: RevocationList) -> None:
    (fleet.out / "coordinator" / "revoked.crl").write_bytes(revoked.to_pem())


def demand(fleet: Any, line: str) -> None:
    for state_dir in (fleet.out / "devices").iterdir():
        with (state_dir / "device.toml").open("a") as file:
            file.write(f"{line}\n")


def replaced(revoked: bytes | None) -> Callable[[Message, Any], Message]:
    """The real app, behind a coordinator that sends this list with its offers, or none."""

    def call(message: Message, context: Any) -> Message:
        fields = message.content.config_records[RECORD]
        if message.metadata.message_type.endswith(Step.OFFER.value):
            fields.pop(REVOCATIONS, None)
            if revoked is not None:
                fields[REVOCATIONS] = revoked
        return app(message, context)

    return call


def test_a_revoked_device_is_not_in_the_next_session_and_every_device_has_the_list(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6, rounds=1)
    (first,) = fleet.federate(fleet.grid())
    assert GONE in first.survivors
    revoked = list_of(fleet, 1, GONE)
    install(fleet, revoked)
    fleet.configure({"rounds": 2})
    second = fleet.federate(fleet.grid())[1]
    assert second.survivors == tuple(name for name in first.survivors if name != GONE)
    for name in second.survivors:
        assert fleet.state_dir(name).root().revoked == revoked
    assert (fleet.out / "coordinator" / "transcript" / "revoked.crl").read_bytes() == revoked.to_pem()


@pytest.mark.parametrize("revoked", [True, False])
def test_a_round_that_failed_while_it_was_unmasked_is_repeated_without_a_device_once_that_is_revoked(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, revoked: bool
) -> None:
    fleet = fleet_of(6, rounds=1)
    failing = Subtracting(monkeypatch, aborted={1}, withheld={"2"})  # the victim is lost after the first round
    (first,) = fleet.federate(fleet.grid(app=failing))
    assert first.aborted
    assert len(failing.sums) == 1
    if revoked:
        install(fleet, list_of(fleet, 1, VICTIM))
    fleet.configure({"rounds": 2})
    repeated = fleet.federate(fleet.grid(app=failing))[1]
    others = tuple(f"device-{number:02d}" for number in range(1, 6))
    assert repeated.survivors == (others if revoked else ())
    assert repeated.version == (1 if revoked else None)


def test_a_new_revocation_list_takes_effect_with_the_next_session(fleet_of: FleetOf) -> None:
    fleet = fleet_of(6, rounds=3, aggregation__session_rounds=1)

    def late(message: Message, context: Any) -> Message:
        if message.metadata.group_id == "2":
            install(fleet, list_of(fleet, 1, GONE))
        return app(message, context)

    records = fleet.federate(fleet.grid(app=late))
    assert [GONE in record.survivors for record in records] == [True, True, False]


def test_devices_do_not_join_a_session_with_a_revoked_device(fleet_of: FleetOf, refusals: list[str]) -> None:
    """The coordinator forwards the list, and offers a cohort with the revoked device nevertheless."""
    fleet = fleet_of(6, rounds=1, attempts=1)
    revoked = list_of(fleet, 1, GONE)
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid(app=replaced(revoked.der)))
    assert refusals == ["certificate.revoked"] * 6


def test_an_older_revocation_list_is_not_applied_by_the_coordinator_and_refused_by_devices(
    fleet_of: FleetOf, refusals: list[str]
) -> None:
    fleet = fleet_of(4, rounds=1, attempts=1)
    old, new = list_of(fleet, 1), list_of(fleet, 2)
    install(fleet, new)
    fleet.federate(fleet.grid())
    install(fleet, old)
    fleet.configure({"rounds": 2})
    fleet.federate(fleet.grid())
    assert fleet.state_dir("device-00").root().revoked == new
    fleet.configure({"rounds": 3})
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid(app=replaced(old.der)))
    assert refusals == ["revocations.number"] * 4
    assert fleet.state_dir("device-00").root().revoked == new


def test_a_revocation_list_that_the_authority_did_not_sign_is_refused(fleet_of: FleetOf, refusals: list[str]) -> None:
    fleet, stranger = fleet_of(4, rounds=1, attempts=1), fleet_of(4)
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid(app=replaced(list_of(stranger, 9).der)))
    assert refusals == ["revocations.signature"] * 4
    assert fleet.state_dir("device-00").root().revoked is None
    install(fleet, list_of(stranger, 9))
    with refused(TrustError, "revocations.signature"):
        fleet.federate(fleet.grid())


def test_an_expired_revocation_list_stops_the_coordinator_before_the_first_message(fleet_of: FleetOf) -> None:
    fleet = fleet_of(4, rounds=1)
    install(fleet, list_of(fleet, 1, begin=NOW - 40 * DAY))
    with refused(TrustError, "revocations.next-update"):
        fleet.federate(fleet.grid())


def test_a_device_that_requires_a_recent_list_joins_only_with_one(fleet_of: FleetOf, refusals: list[str]) -> None:
    """The coordinator withholds the newer list, and the device's own is older than its policy allows."""
    fleet = fleet_of(4, rounds=1, attempts=1)
    demand(fleet, "revocation_days = 7")
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid())
    install(fleet, list_of(fleet, 1, begin=NOW - 8 * DAY))
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid())
    assert refusals == ["offer.revocations"] * 4 + ["offer.revocations.age"] * 4
    install(fleet, list_of(fleet, 2, begin=NOW - 6 * DAY))
    (record,) = fleet.federate(fleet.grid())
    assert len(record.survivors) == 4


def test_a_device_keeps_its_revocation_list_when_the_coordinator_sends_none(
    fleet_of: FleetOf, refusals: list[str]
) -> None:
    fleet = fleet_of(4, rounds=1, attempts=1)
    for path in (fleet.out / "devices").iterdir():
        fleet.state_dir(path.name).revoke(list_of(fleet, 1, GONE).der)
    with refused(EdgeAdaptError, "session"):
        fleet.federate(fleet.grid(app=replaced(None)))
    assert refusals == ["certificate.revoked"] * 4


def test_without_a_revocation_list_the_coordinator_trusts_its_root(fleet_of: FleetOf, tmp_path: Path) -> None:
    state_dir = CoordinatorStateDir.open(fleet_of(3).out / "coordinator")
    assert state_dir.read_root(NOW) == state_dir.root
    state_dir.registry.close()
