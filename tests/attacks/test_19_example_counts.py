"""From what is published of an honest run, its reader computes how many examples single devices have.

A round's survivors are published. Their total number of examples is an equation in the counts of the devices, and
rounds have different survivors. The total is read from the record of the round; or it is a period of the published
adapters, whose coordinates differ by multiples of (rounding step / total), or of (twice the learning rate / total)
after a round in which every device trained one step of AdamW; or it is the denominator of an accuracy.
"""

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from aggregation import rotation
from client.training.examples import Example, write_examples
from coordinator.settings import FederationSettings
from edgeadapt.formats.layout import Layout, TensorSpec
from edgeadapt.formats.manifest import PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds import sums, task
from edgeadapt.rounds.sums import Bounds
from tests.support import FleetOf
from tests.support.fleet import session_spec

DEVICES = 10


@dataclass(frozen=True)
class Published:
    """What anybody who has the published files knows of a run, and (for comparison) what the devices have."""

    names: tuple[str, ...]
    records: tuple[Any, ...]
    manifests: tuple[Any, ...]
    adapters: tuple[NDArray[np.float64], ...]
    seeds: tuple[bytes, ...]  # of the rotation of the sum from each adapter
    unchanged: NDArray[np.bool_]  # coordinates that no device changes in the first round
    step: float
    first: float  # the step of AdamW: its learning rate
    most: int  # examples of all devices
    train: dict[str, int]
    held_out: dict[str, int]

    def total(self, counts: dict[str, int], record: Any) -> int:
        return sum(counts[name] for name in record.survivors)


def publish(app_fleet_of: FleetOf, *, rounds: int = 6, examples: int | None = None, **settings: Any) -> Published:
    """``examples``: how many all devices have together, one each; None: as the fleet is made."""
    fleet = app_fleet_of(DEVICES, rounds=rounds, aggregation__session_rounds=rounds, **settings)
    if examples is not None:
        for number in range(DEVICES):
            path = fleet.state_dir(f"device-{number:02d}").examples
            write_examples(path, [Example("turn on the light", 0)] if number < examples else [])
    records = fleet.federate(fleet.grid(message_loss=0.02, forced_dropouts=1))
    registry, seen = fleet.registry(), [h for h in fleet.population.clients if not h.unseen]
    versions = registry.versions()
    layout = Layout.of(registry.tensors(0))
    read = FederationSettings.read(fleet.out / "coordinator" / "federation.toml")
    vector = read.aggregation.spec(DEVICES, layout, fleet.base.digest, rounds).vector
    return Published(
        names=tuple(home.name for home in seen),
        records=tuple(record for record in records if record.version is not None),
        manifests=tuple(version.manifest for version in versions),
        adapters=tuple(
            layout.flatten(registry.tensors(version.manifest.version)).astype(np.float64) for version in versions
        ),
        seeds=tuple(rotation.seed(bytes.fromhex(version.manifest.sha256)) for version in versions),
        unchanged=layout.flatten(
            {name: np.full_like(value, "lora_A" in name) for name, value in registry.tensors(0).items()}
        ).astype(bool),
        step=vector.step(vector.segments[0]),
        first=read.training.learning_rate,
        most=DEVICES * read.aggregation.weight_cap,
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


def moved_by(found: Published, record: Any) -> NDArray[np.float64]:
    return found.adapters[record.version] - found.adapters[record.version - 1]


def strength(found: Published, record: Any, weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """In the rotated step from one adapter to the next: a sum is rounded after its rotation."""
    rotated = rotation.rotate(moved_by(found, record), found.seeds[record.version - 1])
    return agreement(rotated, weights, found.step)


def agreement(moved: NDArray[np.float64], weights: NDArray[np.int64], step: float) -> NDArray[np.float64]:
    """How strongly (step / weight) shows as a period, for each weight: 1 if all coordinates agree, near 0 if none."""
    return np.array([abs(np.mean(np.exp(2j * np.pi * moved * weight / step))) for weight in weights])


def denominators(found: Published) -> dict[int, int]:
    """Round → the denominator of its accuracy, which divides the number of held-out examples."""
    fractions = {r.round: Fraction(r.metrics["accuracy"]).limit_denominator(found.most) for r in found.records}
    return {number: fraction.denominator for number, fraction in fractions.items()}


def with_examples(_: Any, spec: Any, values: Any, *rest: Any) -> dict[str, float]:
    return {"examples": float(values["weight"][0]), **sums.published(values)}


def test_exact_totals_the_plain_mean_and_an_exact_accuracy_reveal_the_counts_of_single_devices(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task.Task, "metrics", with_examples)
    monkeypatch.setattr(sums, "DECIMALS", 15)
    monkeypatch.setattr(sums, "MINIMUM_HELD_OUT", 1)
    monkeypatch.setattr(task, "dither", lambda key, size: np.zeros(size))
    found = publish(app_fleet_of, aggregation__ring_bits=22)
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


# Rounds in which every device trains one step: those of this fleet, whose devices have fewer examples than a batch.

FIRST_STEPS = [
    {"aggregation__ring_bits": 32, "training__learning_rate": 0.01},
    {"aggregation__ring_bits": 22, "training__learning_rate": 0.1},
]


def first_steps(found: Published) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """The coordinates that moved in the first round; how strongly each total weight shows in them; the true one."""
    (record,) = found.records
    moved = moved_by(found, record)
    moved = moved[np.abs(moved) > 0.02 * found.first]  # without A, which has no gradient while B is zero
    shown = agreement(moved, np.arange(1, found.most + 1), 2 * found.first)
    return moved, shown, found.total(found.train, record)


@pytest.mark.parametrize("settings", FIRST_STEPS, ids=["fine", "coarse"])
def test_with_the_noise_of_the_rounding_alone_the_first_step_of_adamw_reveals_the_total(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    monkeypatch.setattr(task, "_width", lambda spec, *_: step_of(spec))
    _, shown, total = first_steps(publish(app_fleet_of, rounds=1, **settings))
    assert int(shown[1:].argmax()) + 2 == total
    assert shown[total - 1] > 0.5


@pytest.mark.parametrize("settings", FIRST_STEPS, ids=["fine", "coarse"])
def test_the_first_step_of_adamw_does_not_show_in_what_is_published(
    app_fleet_of: FleetOf, settings: dict[str, Any]
) -> None:
    moved, shown, total = first_steps(publish(app_fleet_of, rounds=1, **settings))
    assert shown[total - 1] < 4.5 / np.sqrt(moved.size)


@pytest.mark.parametrize("divisor", [1, 3, 10])
def test_nor_does_it_show_if_the_weights_have_a_common_divisor(divisor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The period is then so many times as long."""
    rng, rate, size = np.random.default_rng(divisor), 0.01, 20_000
    weights = divisor * np.array([3, 5, 7, 4, 11, 6])
    signs = np.where(rng.random((6, size)) < 0.7, 1.0, -1.0) * rng.choice([-1.0, 1.0], size)
    layout = Layout((TensorSpec("a", (1, size)),))
    vector = task.contribution_spec(layout, Bounds(clip_norm=12.0, weight_cap=128, ring_bits=32, max_clients=6))
    spec = session_spec(6, vector=vector, clip_norm=12.0, weight_cap=128)
    others = {name: np.zeros(1) for name in ("correct", "loss", "held_out")}
    delta = rotation.rotate(rate * weights @ signs, rotation.seed(bytes(32)))
    sums = {"delta": delta, "weight": np.array([float(weights.sum())]), **others}
    plan = task.Task(PeftConfig("LORA", 2, 4, ("query",)), ("off", "on"), 1, 16, rate, 0.0, 0.0, PARTS, PARTS)

    def shown() -> float:
        mean = task.weighted_mean(spec, plan, layout, sums, 6, bytes(32)).astype(np.float64)
        return float(agreement(mean, np.array([weights.sum() // divisor]), 2 * rate)[0])

    assert shown() < 4.5 / np.sqrt(size)
    monkeypatch.setattr(task, "_width", lambda spec, *_: step_of(spec))
    assert shown() > 0.9
    monkeypatch.setattr(task, "_width", lambda *_: 2 * rate)  # of one example, not of a device's
    assert (shown() > 0.05) == (divisor > 1)


def test_a_step_of_sgd_has_no_such_period_and_needs_no_wider_noise() -> None:
    rng, rate, size = np.random.default_rng(1), 0.1, 20_000
    weights, gradients = np.array([3, 5, 7, 4, 11, 6]), rng.normal(size=(6, size))
    layout = Layout((TensorSpec("a", (1, size)),))
    vector = task.contribution_spec(layout, Bounds(clip_norm=120.0, weight_cap=128, ring_bits=32, max_clients=6))
    spec = session_spec(6, vector=vector, clip_norm=120.0, weight_cap=128)
    delta = rotation.rotate(rate * weights @ gradients, rotation.seed(bytes(32)))
    others = {name: np.zeros(1) for name in ("correct", "loss", "held_out")}
    sums = {"delta": delta, "weight": np.array([float(weights.sum())]), **others}
    config, labels = PeftConfig("LORA", 2, 4, ("query",)), ("off", "on")
    plan = task.Task(config, labels, 1, 16, rate, 0.0, 0.0, PARTS, PARTS, task.OptimizerName.SGD)
    mean = task.weighted_mean(spec, plan, layout, sums, 6, bytes(32)).astype(np.float64)
    assert agreement(mean, np.array([weights.sum()]), 2 * rate)[0] < 4.5 / np.sqrt(size)
    assert task._width(spec, plan, float(weights.sum()), 6) < 0.1 * rate
    assert task._width(spec, replace(plan, optimizer=task.OptimizerName.ADAMW), float(weights.sum()), 6) > rate


# Coordinates that no device changed: the mean is the noise, and nothing else.


def spread(found: Published) -> float:
    """The standard deviation of A in the first round, when B is zero, so that A has no gradient."""
    (record,) = found.records
    return float(moved_by(found, record)[found.unchanged].std())


def step_of(spec: Any) -> float:
    return float(spec.vector.step(spec.vector.segment("delta")))


def deviation(width: float) -> float:
    return width * np.sqrt(task.UNIFORMS / 12)


def test_noise_of_a_fixed_width_in_the_sum_reveals_the_total_by_its_spread_in_the_mean(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "_width", lambda spec, *_: step_of(spec))
    found = publish(app_fleet_of, rounds=1)
    total, survivors = found.total(found.train, found.records[0]), len(found.records[0].survivors)
    both = np.hypot(deviation(found.step), np.sqrt(survivors) * found.step / 2)  # with the rounding errors
    assert total / 1.15 < both / spread(found) < total * 1.15


def test_noise_that_does_not_allow_for_rounding_errors_reveals_the_total_by_what_they_add(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rotation spreads them over all coordinates, and their deviation in the sum is the same for every total."""
    monkeypatch.setattr(task, "_width", lambda spec, _, weight, survivors: step_of(spec) * weight / survivors)
    found = publish(app_fleet_of, rounds=1, examples=DEVICES)  # one each
    total = survivors = len(found.records[0].survivors)
    added = spread(found) ** 2 - (deviation(found.step) / survivors) ** 2
    shown = np.sqrt(survivors / added) * found.step / 2
    assert total / 1.15 < shown < total * 1.15


def test_the_spread_of_the_noise_does_not_depend_on_the_examples(app_fleet_of: FleetOf) -> None:
    found = publish(app_fleet_of, rounds=1)
    known = deviation(max(found.step, 2 * found.first)) / len(found.records[0].survivors)
    # A has 256 coordinates, so the deviation of all of them has a standard error of 4.4 %.
    assert known / 1.15 < spread(found) < known * 1.15


def of_few(app_fleet_of: FleetOf, examples: int) -> tuple[int, float]:
    """Examples of all survivors, of whom most have none, and how many the spread shows."""
    found = publish(app_fleet_of, rounds=1, examples=examples, aggregation__ring_bits=32)
    (record,) = found.records
    total = sum(int(name[-2:]) < examples for name in record.survivors)
    assert total < len(record.survivors)
    return total, deviation(max(found.step, 2 * found.first)) / spread(found)


def test_noise_that_only_covers_the_rounding_of_few_examples_reveals_their_number(
    app_fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task, "_width", lambda spec, plan, *_: max(step_of(spec), 2 * plan.learning_rate))
    for examples in (3, 4, 5):
        total, shown = of_few(app_fleet_of, examples)
        assert total / 1.15 < shown < total * 1.15


def test_the_spread_of_few_examples_shows_no_more_than_a_power_of_two(app_fleet_of: FleetOf) -> None:
    total, shown = of_few(app_fleet_of, 5)
    assert total == 3
    assert 2 / 1.15 < shown < 2 * 1.15


def test_the_noise_is_the_same_for_whoever_knows_the_sums_and_another_for_other_sums() -> None:
    """Its deviation is 0.8 of its width, and it has no mean."""
    noise, again, other = (task.dither(bytes([key]) * 32, 100_000) for key in (1, 1, 2))
    assert np.array_equal(noise, again)
    assert abs(np.corrcoef(noise, other)[0, 1]) < 0.02
    assert abs(noise.mean()) < 0.02
    assert 0.8 < noise.std() < 0.83
    assert np.abs(noise).max() <= task.UNIFORMS / 2
