"""From what is published of an honest run, its reader computes how many examples single devices have.

A round's survivors are published. Their total number of examples is an equation in the counts of the devices, and
rounds have different survivors. The total is read from the record of the round; or it is a period of the published
adapters, whose coordinates differ by multiples of (rounding step / total); or it is the denominator of an accuracy.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from adapters import task
from adapters.layout import Layout
from coordinator import rounds
from coordinator.settings import FederationSettings

FleetOf = Callable[..., Any]
DEVICES = 10


@dataclass(frozen=True)
class Published:
    """What anybody who has the published files knows of a run, and (for comparison) what the devices have."""

    names: tuple[str, ...]
    records: tuple[Any, ...]
    manifests: tuple[Any, ...]
    adapters: tuple[NDArray[np.float64], ...]
    step: float
    most: int  # examples of all devices
    train: dict[str, int]
    held_out: dict[str, int]

    def total(self, counts: dict[str, int], record: Any) -> int:
        return sum(counts[name] for name in record.survivors)


def publish(app_fleet_of: FleetOf) -> Published:
    fleet = app_fleet_of(DEVICES, rounds=6, aggregation__session_rounds=6)
    records = fleet.federate(fleet.grid(message_loss=0.02, forced_dropouts=1))
    registry, seen = fleet.registry(), [h for h in fleet.population.households if not h.unseen]
    versions = registry.versions()
    layout = Layout.of(registry.tensors(0))
    aggregation = FederationSettings.read(fleet.out / "coordinator" / "federation.toml").aggregation
    vector = aggregation.spec(DEVICES, layout, fleet.base.digest, 6).vector
    return Published(
        names=tuple(home.name for home in seen),
        records=tuple(record for record in records if record.version is not None),
        manifests=tuple(version.manifest for version in versions),
        adapters=tuple(
            layout.flatten(registry.tensors(version.manifest.version)).astype(np.float64) for version in versions
        ),
        step=vector.step(vector.segments[0]),
        most=DEVICES * aggregation.weight_cap,
        train={home.name: len(home.train) for home in seen},
        held_out={home.name: len(home.validation) for home in seen},
    )


def solve(found: Published, totals: dict[int, float]) -> dict[str, float]:
    """The devices whose counts follow from the totals of these rounds. ``totals``: round → examples."""
    rows = [[name in r.survivors for name in found.names] for r in found.records if r.round in totals]
    if not rows:
        return {}
    equations = np.array(rows, float)
    solution = np.linalg.lstsq(equations, np.array(list(totals.values())), rcond=None)[0]
    row_space = np.linalg.pinv(equations) @ equations
    return {
        name: float(solution[i]) for i, name in enumerate(found.names) if np.allclose(row_space[i], np.eye(DEVICES)[i])
    }


def periods(found: Published) -> dict[int, float]:
    """Round → the total weight, where the step from one published adapter to the next has a period."""
    totals = {}
    for record in found.records:
        score = strength(found, record, np.arange(1, found.most + 1))
        peaks = [w for w in range(2, found.most) if score[w - 1] > max(0.9, score[w - 2] + 0.1, score[w] + 0.1)]
        if peaks:
            totals[record.round] = float(peaks[0])
    return totals


def strength(found: Published, record: Any, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """How strongly each of these total weights shows as a period: 1 if all coordinates agree, about 0 if none do."""
    moved = found.adapters[record.version] - found.adapters[record.version - 1]
    return np.array([abs(np.mean(np.exp(2j * np.pi * moved * weight / found.step))) for weight in weights])


def denominators(found: Published) -> dict[int, int]:
    """Round → the denominator of its accuracy, which divides the number of held-out examples."""
    fractions = {r.round: Fraction(r.metrics["accuracy"]).limit_denominator(found.most) for r in found.records}
    return {number: fraction.denominator for number, fraction in fractions.items()}


def with_examples(result: Any) -> dict[str, float]:
    return {"examples": float(result.values["weight"][0]), **METRICS(result)}


METRICS = rounds.metrics_of


def test_exact_totals_the_plain_mean_and_an_exact_accuracy_reveal_the_counts_of_single_devices(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "metrics_of", with_examples)
    monkeypatch.setattr(rounds, "DECIMALS", 15)
    monkeypatch.setattr(task, "_dither", lambda key, size: np.zeros(size))
    found = publish(app_fleet_of)
    named = {record.round: record.metrics["examples"] for record in found.records}
    assert periods(found) == named
    counts = solve(found, named)
    assert len(counts) >= 3
    assert {name: round(count) for name, count in counts.items()} == {name: found.train[name] for name in counts}
    held_out = {record.round: found.total(found.held_out, record) for record in found.records}
    shown = denominators(found)
    assert all(held_out[number] % denominator == 0 for number, denominator in shown.items())
    assert max(shown.values()) >= 3


def test_nothing_published_determines_a_count(app_fleet_of: FleetOf) -> None:
    found = publish(app_fleet_of)
    assert len(found.records) >= 4
    for record in found.records:
        assert record.metrics.keys() == {"accuracy", "loss"}
        assert found.manifests[record.version].metrics == record.metrics
        # Each number of examples from a hundred on can have this accuracy.
        shares = record.metrics["accuracy"]
        assert all(abs(round(shares * h) / h - shares) <= 0.005 for h in range(100, found.most))
        assert all(round(value, 2) == value for value in record.metrics.values())
    assert periods(found) == {}
    for record in found.records:  # nor is the true total any stronger than chance among so many coordinates
        true = np.array([found.total(found.train, record)])
        assert strength(found, record, true)[0] < 4.5 / np.sqrt(found.adapters[0].size)


def test_the_noise_is_the_same_for_whoever_knows_the_sums_and_another_for_other_sums() -> None:
    """Its deviation is 0.8 steps of the sum, and it has no mean."""
    noise, again, other = (task._dither(bytes([key]) * 32, 100_000) for key in (1, 1, 2))
    assert np.array_equal(noise, again)
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02
    assert abs(noise.mean()) < 0.02
    assert 0.8 < noise.std() < 0.83
    assert np.abs(noise).max() <= task.UNIFORMS / 2
