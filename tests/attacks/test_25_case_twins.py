"""Two devices whose names differ in upper and lower case only: people, reports and many file systems see one device.

A stranger who gets ``Device-02`` certified next to ``device-02`` is counted as a second device of a cohort, while a
reader of the transcript, a spreadsheet or a folder of certificates finds one.
"""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from aggregation import checks, client, envelope
from aggregation.errors import ConfigError, ProtocolError
from aggregation.messages import Offer
from aggregation.pki import Authority
from aggregation.transcript.entries import read
from client.node.statedir import AUTHORITY, CERTIFICATE, IDENTITY
from edgeadapt.authority import AuthorityStore
from edgeadapt.authority import store as authority_store
from tests.support import FleetOf, refused
from tests.support.authority import new_key, signer, store
from tests.support.fleet import BEGIN, END, Fleet, make_fleet
from tests.support.hostile import audit_failures

__all__ = ["signer", "store"]
FIRST, SECOND = "device-02", "device-03"
DAY = timedelta(days=1)


def test_no_twin_is_certified_even_after_the_first_was_revoked(store: AuthorityStore, signer: Authority) -> None:
    store.issue(signer, "Kitchen", new_key().public, 10)
    for twin in ("kitchen", "KITCHEN"):
        with refused(ConfigError, "name.case", value="Kitchen"):
            store.issue(signer, twin, new_key().public, 10)
    store.revoke(signer, "Kitchen", authority_store.Reason.SUPERSEDED, 10)
    with refused(ConfigError, "name.case", value="Kitchen"):
        store.issue(signer, "kitchen", new_key().public, 10)
    store.issue(signer, "Kitchen", new_key().public, 10)
    store.issue(signer, "kitchen2", new_key().public, 10)


def offer_with_twins(fleet: Fleet) -> bytes:
    key = fleet.devices["device-005"].identity.public
    twin = fleet.authority.issue("Device-004", key, not_before=BEGIN, not_after=END)
    offer = envelope.open_verified(Offer, fleet.offer()[1], fleet.key.public, "coordinator")
    kept = [each for number, each in enumerate(offer.certificates) if number != 5]
    return envelope.sign(fleet.key, replace(offer, certificates=(twin, *kept)))


def test_a_device_joins_no_cohort_with_twins_and_without_the_check_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = make_fleet(8)
    offer = offer_with_twins(fleet)
    with refused(ProtocolError, "offer.names"):
        client.join(fleet.devices["device-002"], offer, fleet.entropy)
    monkeypatch.setattr(checks, "same_name", lambda device: device)
    client.join(fleet.devices["device-002"], offer, fleet.entropy)


@pytest.mark.parametrize("checked", [True, False])
def test_the_coordinators_app_admits_the_first_of_two_twins(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    fleet, now = app_fleet_of(8, rounds=1), datetime.now(UTC)
    authority = Authority.from_pem((fleet.out / "authority" / AUTHORITY).read_bytes())
    second = fleet.state_dir(SECOND)
    twin = authority.issue(FIRST.upper(), second.identity.public, not_before=now - DAY, not_after=now + DAY)
    (second.folder / CERTIFICATE).write_bytes(twin)
    if not checked:
        monkeypatch.setattr(checks, "same_name", lambda device: device)
        monkeypatch.setattr("coordinator.session.same_name", lambda device: device)
    (record,) = fleet.federate(fleet.grid())
    (log,) = (fleet.out / "coordinator" / "transcript").glob("*.log")
    offer = Offer.decode(envelope.unverified_body(read(log.read_bytes()).entries[0].message))
    assert len(offer.certificates) == len(record.survivors) == (7 if checked else 8)
    assert len({name.lower() for name in record.survivors}) == 7
    monkeypatch.undo()
    assert audit_failures(fleet.out) == (set() if checked else {"offer.names"})


@pytest.mark.parametrize("checked", [True, False])
def test_a_device_with_two_names_takes_part_as_one_and_does_not_end_the_run(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """An authority that certified its key twice; ours does not."""
    fleet, now = app_fleet_of(8, rounds=1), datetime.now(UTC)
    authority = Authority.from_pem((fleet.out / "authority" / AUTHORITY).read_bytes())
    first, second = fleet.state_dir(FIRST), fleet.state_dir(SECOND)
    again = authority.issue(SECOND, first.identity.public, not_before=now - DAY, not_after=now + DAY)
    (second.folder / CERTIFICATE).write_bytes(again)
    (second.folder / IDENTITY).write_bytes(first.identity.to_pem())
    if not checked:
        monkeypatch.setattr("coordinator.session.identity", lambda certificate: SimpleNamespace(key_id=object()))
        with refused(ProtocolError, "offer.keys"):
            fleet.federate(fleet.grid())
        return
    (record,) = fleet.federate(fleet.grid())
    assert len(record.survivors) == 7
    assert audit_failures(fleet.out) == set()
