"""Federated methods through the real apps: what is trained moves, what is not shared stays, and audits agree."""

from typing import Any

import numpy as np
import pytest

from client.node.privateparts import PrivateParts
from edgeadapt.auditing import AuditInput, AuditOptions, Check, Status
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.methods.lorasb import with_squares
from edgeadapt.methods.parts import Part, part_of
from edgeadapt.rounds.federatedmethods import METHODS
from tests.support import FleetOf

DEVICES = 4


def differs(before: Tensors, after: Tensors) -> set[Part]:
    """The parts in which two adapters differ, be it by the noise of a mean."""
    return {part_of(name) for name in before if not np.array_equal(after[name], before[name])}


def private_parts(fleet: Any) -> dict[str, PrivateParts]:
    found = {f"device-{number:02d}": None for number in range(DEVICES)}
    return {name: parts for name in found if (parts := fleet.state_dir(name).load(PrivateParts)) is not None}


@pytest.mark.parametrize("method", METHODS)
def test_each_method_moves_its_parts_and_an_audit_recomputes_its_adapters(fleet_of: FleetOf, method: str) -> None:
    fleet, rule = fleet_of(DEVICES, method=method, aggregation__keep_masked_inputs=True), METHODS[method]
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3]
    adapters = [fleet.registry().tensors(version) for version in range(4)]
    for version in range(3):
        turn = {*rule.trained(version)} & {*rule.shared} - {Part.VECTORS}  # LoRA has none of these
        turn = {Part.B if part is Part.R else part for part in turn}  # into which R is folded
        assert differs(adapters[version], adapters[version + 1]) == turn
    offered = with_squares(Layout.of(adapters[0]))
    shared = Layout(tuple(spec for spec in offered.tensors if part_of(spec.name) in rule.shared))
    masked = records[-1].bytes_up / DEVICES
    assert 22 / 8 * shared.size < masked < 22 / 8 * shared.size + 2_000  # the ring's bits, and signatures
    reports = AuditInput.open(fleet.out / "coordinator", AuditOptions()).audit(unfinished=False)
    (finding,) = (each for report in reports.values() for each in report.findings if each.check is Check.ADAPTERS)
    assert finding.status is Status.PASS, finding
    assert "3 of 3 recomputed" in finding.text


@pytest.mark.parametrize(("method", "private"), [("fedper", {Part.HEAD}), ("fedsa", {Part.B})])
def test_what_is_not_shared_is_trained_on_from_round_to_round(
    fleet_of: FleetOf, method: str, private: set[Part]
) -> None:
    fleet, kept = fleet_of(DEVICES, method=method), list[dict[str, PrivateParts]]()
    for rounds in (1, 2, 3):  # each in a session of its own
        fleet.configure({"rounds": rounds})
        fleet.federate(fleet.grid())
        kept.append(private_parts(fleet))
    seed = fleet.registry().tensors(0)
    for device, first in kept[0].items():
        begin, end = (files.decode(blob) for blob in (first.before, first.after))
        assert {part_of(name) for name in begin} == private
        assert all(np.array_equal(begin[name], seed[name]) for name in begin)  # the seed's, in the first round
        assert differs(begin, end) == private
        second, third = kept[1][device], kept[2][device]
        assert second.before == first.after
        assert third.before == second.after
    ends = {files.sha256(parts.after) for parts in kept[-1].values()}
    assert len(ends) == DEVICES
