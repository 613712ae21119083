"""A device that contributes every coordinate at its bound, or a weight that no device has, to drown the others out.

Each coordinate is within its own bound, so the masked vector is a legal one. Only the sum shows that a device lied: its
norm is more than the clip norm allows for so many examples.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from adapters import task
from aggregation.spec import SessionSpec
from client.node import app as node
from client.node import training
from client.training.limits import TrainingLimits
from coordinator import optimizer, rounds
from coordinator.audit import AuditInput, AuditOptions, Check, Status, audit, sums
from coordinator.audit.transcripts import logs, vector_path
from coordinator.statedir import CoordinatorStateDir

FleetOf = Callable[..., Any]
DEVICES, LIAR = 8, "device-03"
CLIP = 2.0
KEPT = {"aggregation__keep_masked_inputs": True}


@dataclasses.dataclass
class OneLiar:
    """The real app; the contribution of one device is what ``lie`` makes of an honest one.

    Args:
        lie: (spec, contribution) → contribution, in ring elements.
    """

    lie: Callable[[SessionSpec, Any], Any]

    def __call__(self, message: Message, context: Context) -> Message:
        if not str(context.node_config["state"]).endswith(LIAR):
            return node.app(message, context)
        honest = training.contribution

        def contribution(*given: Any) -> Any:
            return self.lie(next(each for each in given if isinstance(each, SessionSpec)), honest(*given))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "contribution", contribution)
            return node.app(message, context)


def put(spec: SessionSpec, vector: Any, **values: float) -> Any:
    """The vector with every element of these segments at a value."""
    start = 0
    for segment in spec.vector.segments:
        if segment.name in values:
            vector[start : start + segment.size] = int(values[segment.name] / spec.vector.step(segment)) % 2**32
        start += segment.size
    return vector


def at_the_bound(spec: SessionSpec, vector: Any) -> Any:
    return put(spec, vector, delta=spec.clip_norm * spec.weight_cap, weight=1)


LIES: dict[str, Callable[[SessionSpec, Any], Any]] = {
    "every coordinate at its bound": at_the_bound,
    "so many negative examples that none are left": lambda spec, vector: put(spec, vector, weight=-spec.weight_cap),
    "half an example": lambda spec, vector: put(spec, vector, weight=0.5),
}


def run(app_fleet_of: FleetOf, lie: Callable[[SessionSpec, Any], Any]) -> tuple[Any, Any]:
    fleet = app_fleet_of(DEVICES, rounds=1, **KEPT, aggregation__clip_norm=CLIP)
    (record,) = fleet.federate(fleet.grid(app=OneLiar(lie)))
    return fleet, record


def moved(fleet: Any) -> float:
    """The norm of the step from version 0 to version 1."""
    registry = fleet.registry()
    before, after = registry.tensors(0), registry.tensors(1)
    return float(np.sqrt(sum(np.sum((after[name] - before[name]) ** 2.0) for name in before)))


def found(fleet: Any) -> tuple[Status, str]:
    """What the audit of the log finds about the sums."""
    state_dir = CoordinatorStateDir.open(fleet.out / "coordinator")
    folder = state_dir.folder / "transcript"
    (path,) = logs(folder)

    def kept(digest: bytes, _: int) -> bytes | None:
        file: Path = vector_path(folder / "vectors", digest)
        return file.read_bytes() if file.exists() else None

    report = audit(path.read_bytes(), state_dir.root, state_dir.key.public, kept)
    finding = next(finding for finding in report.findings if finding.check is Check.SUMS)
    return finding.status, finding.about


@pytest.mark.parametrize("lie", LIES)
def test_the_round_is_aborted_and_the_adapter_stays_as_it_was(app_fleet_of: FleetOf, lie: str) -> None:
    fleet, record = run(app_fleet_of, LIES[lie])
    assert (record.version, record.metrics, record.dropped) == (None, {}, {})
    assert record.aborted
    assert [version.manifest.version for version in fleet.registry().versions()] == [0]
    assert found(fleet)[0] is Status.PASS  # no result names the sum


def unchecked(monkeypatch: pytest.MonkeyPatch, *modules: Any) -> None:
    for module in modules:
        monkeypatch.setattr(module, "require_reach", lambda *given: None)


def test_without_the_check_one_device_decides_where_the_adapter_goes(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    unchecked(monkeypatch, rounds, task, sums)
    fleet, record = run(app_fleet_of, at_the_bound)
    assert record.version == 1
    assert moved(fleet) > 50 * CLIP
    assert found(fleet)[0] is Status.PASS
    monkeypatch.undo()
    assert found(fleet) == (Status.FAIL, "vector.delta")  # the auditor has the same bound


def test_a_device_that_lies_within_the_bound_moves_the_mean_by_no_more_than_the_clip_norm(
    app_fleet_of: FleetOf,
) -> None:
    """What remains: the direction. It is that of the liar, as if all examples were its own."""

    def largest(spec: SessionSpec, vector: Any) -> Any:
        segment = spec.vector.segments[0]
        return put(
            spec, vector, delta=0.9 * CLIP * 30 / np.sqrt(segment.size), weight=1
        )  # the others have more than 30

    fleet, record = run(app_fleet_of, largest)
    assert record.version == 1
    honest, _ = run(app_fleet_of, lambda spec, vector: vector)
    assert 3 * moved(honest) < moved(fleet) <= CLIP
    assert found(fleet)[0] is Status.PASS


# One coordinate, round after round, until every device refuses the adapter.

WIDE = 600.0  # clip norm: two rounds lead as far as a hundred do with the default


def led_away(app_fleet_of: FleetOf) -> tuple[Any, list[int | None]]:
    """A fleet after three rounds in which the first coordinate moved by most of the clip norm; their versions."""

    def lie(spec: SessionSpec, vector: Any) -> Any:
        vector = put(spec, vector, delta=0, weight=1)
        vector[0] = int(0.9 * WIDE * 39 / spec.vector.step(spec.vector.segments[0]))  # all survivors have 39 examples
        return vector

    bounds = {"aggregation__clip_norm": WIDE, "aggregation__ring_bits": 32}
    fleet = app_fleet_of(DEVICES, rounds=3, **KEPT, **bounds)
    return fleet, [record.version for record in fleet.federate(fleet.grid(app=OneLiar(lie)))]


def test_a_device_cannot_lead_an_adapter_to_where_the_others_refuse_it(app_fleet_of: FleetOf) -> None:
    fleet, versions = led_away(app_fleet_of)
    assert versions == [1, 2, 3]
    registry = fleet.registry()
    for version in versions:
        assert max(np.abs(tensor).max() for tensor in registry.tensors(version).values()) == optimizer.LARGEST
    assert TrainingLimits().maximum_magnitude > optimizer.LARGEST
    audited = AuditInput.open(fleet.out / "coordinator", AuditOptions())
    audited.require(audited.audit(unfinished=False), unfinished=False)  # the auditor computes the same adapters


def test_without_the_largest_value_of_a_coordinate_the_training_ends_for_ever(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "LARGEST", 1e9)
    _, versions = led_away(app_fleet_of)
    assert versions == [1, 2, None]
