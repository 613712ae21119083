"""Faults in the real processes of a fleet: training goes on, nothing is lost or counted twice, the audit passes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from aggregation.steps import Step
from benchmarks.faults import measure
from benchmarks.faults.faults import FAULTS
from benchmarks.faults.fleet import FaultFleet, running_fleet
from benchmarks.faults.measure import losses
from benchmarks.faults.postgresql import missing
from client.node.statedir import LEDGER
from edgeadapt.formats.storage import kill_safe
from tests.support.exhaustive import few
from tests.support.postgresql import REQUIRED
from tests.support.programs import need

pytestmark = pytest.mark.slow

SHOWN: Mapping[str, Sequence[Step]] = {
    "kill-up": [Step.OFFER],
    "kill-rounds": [Step.PLAN, Step.UNMASK],
    "kill-agent": [Step.UNMASK],
    "hang-rounds": [Step.PLAN],
    "cut-message": [Step.PLAN],
    "half-open": [Step.UNMASK],
    "disk": [Step.UNMASK],
    "disk-full": [Step.UNMASK],
    "disk-of-device": [Step.PLAN],
    "older-version": [Step.PLAN],
}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultFleet]:
    """Devices that attend; each test starts and stops the coordinator."""
    with kill_safe(), running_fleet(tmp_path_factory.mktemp("faults") / "fleet", measure.DEVICES) as made:
        measure.attend(made)
        yield made


@pytest.mark.parametrize("name", few(SHOWN, "half-open"))
def test_training_goes_on_after_a_fault_and_nothing_is_lost(fleet: FaultFleet, name: str) -> None:
    (fault,) = [fault for fault in FAULTS if fault.name == name]
    if why := fault.missing():
        pytest.skip(why)
    rows = measure.inject(fleet, fault, print, SHOWN[name])
    assert [row.stage for row in rows] == [measure.NAMES[step] for step in SHOWN[name]]
    assert [row.lost for row in rows] == [()] * len(rows)


@pytest.mark.parametrize("name", few(["kill-leader", "hang-leader", "restart-database"], "kill-leader"))
def test_another_coordinator_takes_over_from_one_that_cannot_lead_and_nothing_is_lost(
    tmp_path: Path, name: str
) -> None:
    """Their registry is in a real PostgreSQL."""
    need(not missing(), missing(), required=REQUIRED)
    (fault,) = [fault for fault in FAULTS if fault.name == name]
    with kill_safe(), running_fleet(tmp_path / "fleet", measure.DEVICES, fault.shape) as fleet:
        measure.attend(fleet)
        (row,) = measure.inject(fleet, fault, print, [Step.PLAN])
    assert row.lost == ()


def test_a_contribution_that_a_ledger_lacks_and_a_record_that_has_changed_are_found(fleet: FaultFleet) -> None:
    if not fleet.records():
        fleet.start()
        fleet.await_version(0, "a round")
        fleet.stop()
    records = fleet.records()
    assert losses(fleet, records) == []
    ledger = fleet.device(fleet.names[0]) / LEDGER
    kept = ledger.read_bytes()
    ledger.unlink()
    assert [line.split()[0] for line in losses(fleet, records)] == [fleet.names[0]] * 2
    ledger.write_bytes(kept)
    assert losses(fleet, (*records, records[0])) == ["finished rounds are not as they were"]
