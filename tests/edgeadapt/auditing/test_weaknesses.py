"""An audit warns, each with a code, of what no rule forbids and yet shows more of a few devices."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregation.groups import GroupSum
from edgeadapt.auditing import AuditInput, AuditOptions
from edgeadapt.auditing.findings import Check, Report, Status
from edgeadapt.auditing.weaknesses import Weaknesses
from edgeadapt.methods.parts import Part
from edgeadapt.rounds.task import OptimizerName, Task
from tests.support import FleetOf


def audited(fleet: Any) -> list[Report]:
    return list(AuditInput.open(fleet.out / "coordinator", AuditOptions()).audit(unfinished=False).values())


def warnings(*reports: Report, still: dict[int, str] | None = None) -> list[str]:
    """The codes of the warnings in sessions that follow each other."""
    weaknesses = Weaknesses()
    found = [finding for report in reports for finding in weaknesses.check(report, still or {})]
    assert {finding.check for finding in found} == {Check.WEAKNESSES}
    assert all((finding.status is Status.WARNING) == bool(finding.about) for finding in found)
    return [finding.about for finding in found if finding.about]


@pytest.fixture
def sound(app_fleet_of: FleetOf) -> Report:
    fleet = app_fleet_of(8, rounds=2, aggregation__keep_masked_inputs=True)
    fleet.federate(fleet.grid())
    (report,) = audited(fleet)
    statuses = [finding.status for finding in report.findings if finding.check is Check.WEAKNESSES]
    assert statuses == [Status.PASS]
    return report


def with_tasks(report: Report, *tasks: Task) -> Report:
    ((place, _), *_) = report.tasks
    return replace(report, tasks=tuple((place, task.encode()) for task in tasks))


def weighing(report: Report, *weights: float) -> Report:
    produced = tuple(
        replace(report.produced[0], sums=(GroupSum(report.produced[0].survivors, {"weight": np.array([weight])}),))
        for weight in weights
    )
    return replace(report, produced=produced)


def test_what_a_device_with_the_default_policy_refuses_is_named_by_its_code(sound: Report) -> None:
    task = Task.decode(sound.tasks[0][1])
    sgd = replace(task, optimizer=OptimizerName.SGD, learning_rate=0.1)
    for changed, about in (
        (replace(task, batch_size=1), "task.batch_size"),
        (replace(task, weight_decay=0.5), "task.weight_decay"),
        (replace(sgd, momentum=0.999), "task.momentum"),
        (replace(sgd, proximal=1000.0), "task.proximal"),
    ):
        assert warnings(with_tasks(sound, task, changed)) == [about]
    assert sound.spec is not None
    assert warnings(replace(sound, spec=replace(sound.spec, weight_cap=2**20))) == ["offer.weight_cap"]
    assert warnings(replace(sound, participation=dict.fromkeys("abc", 1))) == ["offer.cohort"]


def test_a_part_that_was_private_and_is_shared_is_named_also_in_a_later_session(sound: Report) -> None:
    shared = Task.decode(sound.tasks[0][1])
    private = replace(shared, shared=(Part.A, Part.B))
    assert warnings(with_tasks(sound, private, private)) == []
    assert warnings(with_tasks(sound, private, shared)) == ["task.shared"]
    assert warnings(with_tasks(sound, private), with_tasks(sound, shared)) == ["task.shared"]
    assert warnings(with_tasks(sound, shared), with_tasks(sound, private)) == []
    assert sound.spec is not None
    of_another_base = replace(with_tasks(sound, shared), base="0" * 64, spec=replace(sound.spec, base_digest="0" * 64))
    assert warnings(with_tasks(sound, private), of_another_base) == []


def test_a_round_of_far_fewer_examples_than_usual_is_named(sound: Report) -> None:
    assert warnings(weighing(sound, 80.0, 40.0, 160.0, 21.0)) == []
    assert warnings(weighing(sound, 80.0, 80.0, 16.0)) == ["round.weight"]
    assert warnings(weighing(sound, 80.0, 80.0), weighing(sound, 8.0)) == ["round.weight"]


def test_a_round_that_hardly_moves_its_adapter_is_named(app_fleet_of: FleetOf) -> None:
    fleet = app_fleet_of(8, rounds=2, server__learning_rate=1e-6)
    fleet.federate(fleet.grid())
    found = [finding for report in audited(fleet) for finding in report.findings if finding.check is Check.WEAKNESSES]
    assert [(finding.status, finding.about) for finding in found] == [(Status.WARNING, "adapter.movement")]
    assert "round 1 moved its adapter by" in found[0].text
