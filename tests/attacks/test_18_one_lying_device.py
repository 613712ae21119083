"""A device that contributes every coordinate at its bound, or a weight that no device has, to drown the others out.

Each coordinate is within its own bound, so the masked vector is a legal one. Only the sum shows that a device lied: its
norm is more than the clip norm allows for so many examples. Such a sum counts as zero. If the round had no result, the
liar could use up the sums that devices help to from one adapter, and stop them for ever.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from aggregation import rotation
from aggregation.server import AbortReason, RoundAborted
from aggregation.spec import SessionSpec
from client.node import app as node
from client.node.policy import TrainingLimits
from coordinator import rounds
from edgeadapt.rounds import optimizer, task
from tests.support import FleetOf
from tests.support.hostile import audit_failures

DEVICES, LIAR = 8, "device-03"
CLIP = 2.0
KEPT = {"aggregation__keep_masked_inputs": True, "aggregation__ring_bits": 32}
Lie = Callable[[SessionSpec, Any, bytes], Any]


@dataclasses.dataclass
class OneLiar:
    """The real app; the contribution of one device is what ``lie`` makes of an honest one.

    Args:
        lie: (spec, contribution, SHA-256 of the adapter) → contribution, in ring elements.
    """

    lie: Lie

    def __call__(self, message: Message, context: Context) -> Message:
        if not str(context.node_config["state"]).endswith(LIAR):
            return node.app(message, context)
        honest = task.contribution

        def contribution(*given: Any) -> Any:
            return self.lie(given[2], honest(*given), given[3])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(task, "contribution", contribution)
            return node.app(message, context)


def put(spec: SessionSpec, vector: Any, **values: Any) -> Any:
    """The vector with the elements of these segments at a value, or at one each."""
    start = 0
    for segment in spec.vector.segments:
        if segment.name in values:
            steps = np.array(values[segment.name] / spec.vector.step(segment)).astype(np.int64)
            vector[start : start + segment.size] = steps % 2**spec.vector.ring_bits
        start += segment.size
    return vector


def at_the_bound(spec: SessionSpec, vector: Any, _: bytes) -> Any:
    return put(spec, vector, delta=spec.vector.segment("delta").bound, weight=1)


LIES: dict[str, Lie] = {
    "every coordinate at its bound": at_the_bound,
    "so many negative examples that none are left": lambda spec, vector, _: put(spec, vector, weight=-spec.weight_cap),
    "half an example": lambda spec, vector, _: put(spec, vector, weight=0.5),
}


def run(app_fleet_of: FleetOf, lie: Lie) -> tuple[Any, Any]:
    fleet = app_fleet_of(DEVICES, rounds=1, **KEPT, aggregation__clip_norm=CLIP)
    (record,) = fleet.federate(fleet.grid(app=OneLiar(lie)))
    return fleet, record


def moved(fleet: Any) -> float:
    """The norm of the step from version 0 to version 1."""
    registry = fleet.registry()
    before, after = registry.tensors(0), registry.tensors(1)
    return float(np.sqrt(sum(np.sum((after[name] - before[name]) ** 2.0) for name in before)))


def noise(fleet: Any) -> float:
    """The norm of the noise of a mean."""
    registry = fleet.registry()
    size = sum(tensor.size for tensor in registry.tensors(0).values())
    return float(2 * 0.01 / DEVICES * np.sqrt(task.UNIFORMS / 12 * size))  # the learning rate is above the step


@pytest.mark.parametrize("lie", LIES)
def test_such_a_sum_counts_as_zero(app_fleet_of: FleetOf, lie: str) -> None:
    fleet, record = run(app_fleet_of, LIES[lie])
    assert (record.version, record.metrics, record.dropped) == (1, {}, {})
    assert record.spoiled
    assert moved(fleet) < 1.2 * noise(fleet)
    assert audit_failures(fleet.out / "coordinator") == set()


def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "require_reach", lambda *given: None)


@pytest.mark.parametrize("lie", LIES)
def test_without_the_check_one_device_decides_where_the_adapter_goes(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    unchecked(monkeypatch)
    fleet, record = run(app_fleet_of, LIES[lie])
    assert (record.version, record.spoiled) == (1, None)
    assert LIES[lie] is not at_the_bound or moved(fleet) > 10 * CLIP
    assert audit_failures(fleet.out / "coordinator") == set()
    monkeypatch.undo()
    assert audit_failures(fleet.out / "coordinator") == {"manifest.metrics"}  # of a sum that counts


@dataclasses.dataclass
class UntilRound(OneLiar):
    """It lies in the rounds before ``last``."""

    last: int

    def __call__(self, message: Message, context: Context) -> Message:
        group = message.metadata.group_id
        honest = group.isdecimal() and int(group) >= self.last
        return node.app(message, context) if honest else OneLiar.__call__(self, message, context)


def spoilt(app_fleet_of: FleetOf) -> tuple[Any, tuple[Any, ...]]:
    """The records of seven rounds, of which a device spoils the first five."""
    fleet = app_fleet_of(DEVICES, rounds=7, **KEPT, aggregation__clip_norm=CLIP)
    return fleet, fleet.federate(fleet.grid(app=UntilRound(at_the_bound, 6)))


def test_a_liar_does_not_use_up_the_sums_from_an_adapter(app_fleet_of: FleetOf) -> None:
    fleet, records = spoilt(app_fleet_of)
    assert [bool(record.spoiled) for record in records] == [True] * 5 + [False] * 2
    assert [record.version for record in records] == [1, 2, 3, 4, 5, 6, 7]
    assert audit_failures(fleet.out / "coordinator") == set()


def test_if_its_rounds_had_no_result_the_training_would_end_for_ever(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    within = rounds.within_reach

    def aborting(session: Any, result: Any) -> Any:
        checked = within(session, result).result
        lied = RoundAborted(AbortReason.TOO_FEW, str(checked.sums[0].spoiled), session, (), result.survivors)
        return lied if checked.sums[0].spoiled else rounds.Summed(session, result)

    monkeypatch.setattr(rounds, "within_reach", aborting)
    _, records = spoilt(app_fleet_of)
    assert [record.version for record in records] == [None] * 7
    assert set(records[-1].dropped.values()) == {"plan"}  # also of the devices that never lied


def test_a_device_that_lies_within_the_bound_moves_the_mean_by_no_more_than_the_clip_norm(
    app_fleet_of: FleetOf,
) -> None:
    """What remains: the direction. It is that of the liar, as if all examples were its own."""

    def largest(spec: SessionSpec, vector: Any, _: bytes) -> Any:
        size = spec.vector.segment("delta").size
        return put(spec, vector, delta=0.9 * CLIP * 30 / np.sqrt(size), weight=1)  # the others have more than 30

    fleet, record = run(app_fleet_of, largest)
    assert record.version == 1
    honest, _ = run(app_fleet_of, lambda spec, vector, _: vector)
    assert 3 * moved(honest) < moved(fleet) <= CLIP
    assert audit_failures(fleet.out / "coordinator") == set()


# One coordinate, round after round, until every device refuses the adapter.

WIDE = 600.0  # clip norm: two rounds lead as far as a hundred do with the default


def led_away(app_fleet_of: FleetOf) -> tuple[Any, list[int | None]]:
    """A fleet after three rounds in which the first coordinate moved by most of the clip norm; their versions."""

    def lie(spec: SessionSpec, vector: Any, adapter: bytes) -> Any:
        delta = 0.9 * WIDE * 39 * np.eye(1, spec.vector.segment("delta").size)[0]  # all survivors have 39 examples
        return put(spec, vector, delta=rotation.rotate(delta, rotation.seed(adapter)), weight=1)

    fleet = app_fleet_of(DEVICES, rounds=3, **KEPT, aggregation__clip_norm=WIDE)
    return fleet, [record.version for record in fleet.federate(fleet.grid(app=OneLiar(lie)))]


def test_a_device_cannot_lead_an_adapter_to_where_the_others_refuse_it(app_fleet_of: FleetOf) -> None:
    fleet, versions = led_away(app_fleet_of)
    assert versions == [1, 2, 3]
    registry = fleet.registry()
    for version in versions:
        assert max(np.abs(tensor).max() for tensor in registry.tensors(version).values()) == optimizer.LARGEST
    assert TrainingLimits().maximum_magnitude > optimizer.LARGEST
    assert audit_failures(fleet.out / "coordinator") == set()  # the auditor computes the same adapters


def test_without_the_largest_value_of_a_coordinate_the_training_ends_for_ever(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "LARGEST", 1e9)
    _, versions = led_away(app_fleet_of)
    assert versions == [1, 2, None]
