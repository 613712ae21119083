"""A federation with groups, from the devices to the audit: the apps and files are the real ones."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Error, Message

from aggregation.groups import deal
from aggregation.steps import Step
from client.node.app import app as client_app
from coordinator import rounds
from coordinator.statedir import CoordinatorStateDir
from coordinator.status import lines_of, status_of
from edgeadapt.auditing.findings import Check
from edgeadapt.auditing.transcripts import AuditInput, AuditOptions
from edgeadapt.rounds import task
from tests.attacks.test_18_one_lying_device import LIAR, OneLiar, put
from tests.support import FleetOf
from tests.support.hostile import audit_failures

DEVICES = 14  # of which 2 may be corrupt, and 4 honest ones must be in each sum: 6 of the 7 in a group
GROUPS = {"aggregation__groups": 2, "aggregation__keep_masked_inputs": True, "aggregation__session_rounds": 2}


def sums_of(record: Any, registry: Any, members: tuple[str, ...]) -> list[tuple[str, ...]]:
    group_of = deal(registry.version(record.version - 1).manifest.sha256, members, 2)
    return [tuple(name for name in sorted(record.survivors) if group_of[name] == number) for number in range(2)]


def test_each_round_is_summed_in_groups_and_audited_bit_for_bit(fleet_of: FleetOf) -> None:
    fleet = fleet_of(DEVICES, rounds=3, **GROUPS)
    records = fleet.federate(fleet.grid(forced_dropouts=1))
    registry, names = fleet.registry(), tuple(f"device-{number:02d}" for number in range(DEVICES))
    assert [record.version for record in records] == [1, 2, 3]
    for record in records:
        assert [group.survivors for group in record.groups] == sums_of(record, registry, names)
        assert all(np.isfinite(group.distance) and group.distance > 0 for group in record.groups)
        assert registry.version(record.version).manifest.combination.name == "Median"
    assert len({record.groups[0].survivors for record in records}) == 3  # dealt anew for each adapter
    assert audit_failures(fleet.out / "coordinator") == set()
    reports = AuditInput.open(fleet.out / "coordinator", AuditOptions()).audit(unfinished=False)
    texts = [each.text for report in reports.values() for each in report.findings if each.check is Check.ADAPTERS]
    assert ["2 of 2 recomputed" in texts[0], "1 of 1 recomputed" in texts[1]] == [True, True]


def test_a_combination_that_is_not_the_one_in_the_manifest_is_found(
    fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(DEVICES, rounds=1, **GROUPS)
    with monkeypatch.context() as hostile:
        hostile.setattr(task, "combine", lambda rule, means: means[0])
        fleet.federate(fleet.grid())
    assert audit_failures(fleet.out / "coordinator") == {"result.adapter"}


def test_groups_that_are_recorded_otherwise_are_found(fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = rounds.RoundOutcome.record

    def swapped(*given: Any, **named: Any) -> Any:
        record = honest(*given, **named)
        return replace(record, groups=record.groups[::-1])

    fleet = fleet_of(DEVICES, rounds=1, **GROUPS)
    with monkeypatch.context() as hostile:
        hostile.setattr(rounds.RoundOutcome, "record", swapped)
        fleet.federate(fleet.grid())
    with pytest.raises(Exception, match="was recorded with another ending"):
        audit_failures(fleet.out / "coordinator")


def test_a_device_that_lies_spoils_the_sum_of_its_group_alone(fleet_of: FleetOf) -> None:
    lie = OneLiar(lambda spec, vector, _: put(spec, vector, weight=0.5))
    results = {}
    for groups in (1, 2):
        fleet = fleet_of(DEVICES, rounds=1, **GROUPS | {"aggregation__groups": groups, "aggregation__ring_bits": 32})
        (record,) = fleet.federate(fleet.grid(app=lie))
        assert record.version == 1
        assert audit_failures(fleet.out / "coordinator") == set()
        before, after = fleet.registry().tensors(0), fleet.registry().tensors(1)
        moved = np.sqrt(sum(np.sum((after[name] - before[name]) ** 2.0) for name in before))
        results[groups] = record.spoiled, float(moved)
        shown = "\n".join(lines_of(status_of(CoordinatorStateDir.open(fleet.out / "coordinator"))))
        assert record.spoiled in shown
    number = next(i for i, group in enumerate(record.groups, 1) if LIAR in group.survivors)
    assert results[2][0].startswith(f"group {number}: ")
    assert results[2][1] > 2 * results[1][1]  # without groups, the adapter moves by the noise alone


def test_after_an_abort_that_binds_devices_the_round_is_repeated_in_its_groups(fleet_of: FleetOf) -> None:
    gone = 2  # the node that is away in the first round, and so is a former member of the second

    def call(message: Message, context: Context) -> Message:
        step, group = Step(message.metadata.message_type.partition(".")[2]), message.metadata.group_id
        if group.partition("-")[0] == "1" and (step is Step.UNMASK or (step is Step.PLAN and context.node_id == gone)):
            return Message(Error(7, "lost"), reply_to=message)
        return client_app(message, context)

    fleet = fleet_of(DEVICES, rounds=2, attempts=1, **GROUPS)
    first, second = fleet.federate(fleet.grid(app=call))
    assert (first.version, second.version) == (None, 1)
    names = tuple(f"device-{number:02d}" for number in range(DEVICES))
    away = next(name for name in names if fleet.node(name) == gone)
    assert set(second.survivors) == set(names) - {away}
    assert [group.survivors for group in second.groups] == sums_of(second, fleet.registry(), names)
    assert audit_failures(fleet.out / "coordinator") == set()
