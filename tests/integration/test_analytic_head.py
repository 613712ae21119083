"""A federation of the analytic head, alone and after rounds of training: its adapters, lineage and audit.

The apps are the real ones and the base is tiny. The tests compute the head a second time, from all texts in one place.
"""

from typing import Any

import numpy as np
import pytest

from client.training.engine import classifier_trainer
from client.training.examples import Example, Split, in_split, read_examples, write_examples
from client.training.trainer import ClassifierTrainer
from coordinator.settings import FederationSettings
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import PrivacyBound
from edgeadapt.rounds.analytic import EVEN, FLOOR, LEAST_DAMPING, NOISE, AnalyticTask, ClassifierHead
from edgeadapt.rounds.ridge import EmbeddingMoments, Matrix, cross_validated
from edgeadapt.rounds.sums import UNIFORMS
from simulations.engine import provision as provisioned
from tests.support import FleetOf
from tests.support.hostile import audit_failures

DEVICES = 8
CLIP = 0.3
PRIVATE = {"privacy__mechanism": "skellam", "analytic__clip_norm": CLIP}
KEPT = {"aggregation__keep_masked_inputs": True, "aggregation__ring_bits": 32}


@pytest.fixture
def fleet_with_many(fleet_of: FleetOf) -> FleetOf:
    """A fleet whose devices have enough examples together for a head to be published."""

    def make(**settings: Any) -> Any:
        fleet = fleet_of(DEVICES, **(KEPT | settings))
        for number, household in enumerate(fleet.population.clients):
            path = fleet.state_dir(household.name).examples
            own = read_examples(path, len(fleet.population.labels))
            extra = [Example(f"{e.text} {k}", e.label) for k in range(3) for e in in_split(own, Split.TRAIN)]
            write_examples(path, [*own, *extra, Example(f"number {number}", 0)])
        return fleet

    return make


def trainer_of(fleet: Any) -> ClassifierTrainer:
    return classifier_trainer(
        fleet.base, len(fleet.population.labels), provisioned.peft_config(fleet.scenario, fleet.base)
    )


def pooled_head(fleet: Any, version: int, survivors: tuple[str, ...]) -> tuple[Matrix, int]:
    """The head that a ridge regression fits to the survivors' texts in one place, and the number of texts."""
    adapter, mine = fleet.registry().tensors(version), trainer_of(fleet)
    head = ClassifierHead.of(Layout.of(adapter))
    settings = FederationSettings.read(fleet.out / "coordinator" / "federation.toml").analytic
    own = [
        example
        for name in survivors
        for example in in_split(read_examples(fleet.state_dir(name).examples, head.labels), Split.TRAIN)
    ]
    x = mine.embed([example.text for example in own], adapter).astype(np.float64)
    y = np.eye(head.labels)[[example.label for example in own]] - adapter[head.bias] / settings.scale
    before = adapter[head.weight].T.astype(np.float64) / settings.scale
    if settings.ridge == "gcv":
        labels = np.eye(head.labels)[[example.label for example in own]]
        strength = cross_validated(EmbeddingMoments(x.T @ x, x.T @ labels, float(len(own))))
    else:
        strength = settings.ridge * len(own)
    right = x.T @ y + strength * before
    solution = settings.scale * np.linalg.solve(x.T @ x + strength * np.eye(head.hidden), right).T
    return solution, len(own)


def test_one_round_makes_the_head_that_all_texts_in_one_place_would_make(fleet_with_many: FleetOf) -> None:
    fleet = fleet_with_many(rounds=1, analytic__rounds=1, analytic__ridge="gcv", aggregation__ring_bits=48)
    (record,) = fleet.federate(fleet.grid(message_loss=0.01, forced_dropouts=1))
    registry = fleet.registry()
    before, after = registry.tensors(0), registry.tensors(1)
    expected, count = pooled_head(fleet, 0, record.survivors)
    head = ClassifierHead.of(Layout.of(before))
    assert count > 100
    error = np.abs(after[head.weight] - expected).max()
    assert error <= 16.0 * NOISE * UNIFORMS / 2 + 0.05  # the noise, and the rounding of 48 bits
    assert error < 0.02 * np.abs(expected).max()  # so that it is the head of these and of no others
    assert all(np.array_equal(after[name], before[name]) for name in before if name != head.weight)
    manifest = registry.version(1).manifest
    assert manifest.parent == registry.version(0).manifest.sha256
    assert (manifest.rule.name, manifest.rule.numbers) == ("AnalyticHead", {})
    assert record.metrics.keys() == {"accuracy", "loss"}  # of the adapter that the round began with
    assert audit_failures(fleet.out / "coordinator") == set()


def test_after_rounds_of_training_the_head_is_fitted_to_the_adapted_embeddings(fleet_with_many: FleetOf) -> None:
    fleet = fleet_with_many(rounds=3, analytic__rounds=1, server__optimizer="fedadam", server__learning_rate=0.01)
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3]
    assert len({record.offer for record in records}) == 2  # the sums of a head need a session of their own
    registry = fleet.registry()
    rules = [version.manifest.rule.name for version in registry.versions() if version.manifest.rule]
    assert rules == ["FedAdam", "FedAdam", "AnalyticHead"]
    trained, last = registry.tensors(2), registry.tensors(3)
    head = ClassifierHead.of(Layout.of(trained))
    assert any(np.abs(value).max() > 0 for name, value in trained.items() if ".lora_B." in name)
    assert all(np.array_equal(trained[name], last[name]) for name in trained if name != head.weight)
    expected, _ = pooled_head(fleet, 2, records[2].survivors)
    assert np.abs(last[head.weight] - expected).max() < 0.02 * np.abs(expected).max()
    assert audit_failures(fleet.out / "coordinator") == set()


def test_with_noise_the_head_is_that_of_the_noisy_sum_and_the_audit_computes_it_again(fleet_with_many: FleetOf) -> None:
    fleet = fleet_with_many(rounds=2, analytic__rounds=1, **PRIVATE, privacy__noise_multiplier=0.5)
    trained, fitted = fleet.federate(fleet.grid(message_loss=0.01, forced_dropouts=1))
    assert 0 < trained.epsilon < fitted.epsilon
    assert (fitted.version, fitted.spoiled, fitted.metrics) == (2, None, {})
    registry = fleet.registry()
    before, after = registry.tensors(1), registry.tensors(2)
    head = ClassifierHead.of(Layout.of(before))
    assert registry.version(2).manifest.privacy == PrivacyBound(fitted.epsilon, 1e-6)
    assert all(np.array_equal(after[name], before[name]) for name in before if name != head.weight)
    assert audit_failures(fleet.out / "coordinator") == set()


def test_with_little_noise_the_head_corrects_what_it_got_wrong_on_the_devices(fleet_with_many: FleetOf) -> None:
    fleet = fleet_with_many(rounds=1, analytic__rounds=1, **PRIVATE, privacy__noise_multiplier=1e-4)
    fleet.state_dir("device-01").examples.write_bytes(b"not JSON\n")
    (record,) = fleet.federate(fleet.grid())
    before, after = fleet.registry().tensors(0), fleet.registry().tensors(1)
    head, mine = ClassifierHead.of(Layout.of(before)), trainer_of(fleet)
    weight, bias = before[head.weight].astype(float), before[head.bias].astype(float)
    unit = weight / np.linalg.norm(weight, axis=1, keepdims=True)
    covariance = (1 - EVEN) / head.labels * unit.T @ unit + EVEN / head.hidden * np.eye(head.hidden)
    lower = np.linalg.cholesky(covariance + FLOOR * np.eye(head.hidden))
    total = np.zeros((head.hidden, head.labels))
    for name in record.survivors:
        if name == "device-01":
            continue
        own = in_split(read_examples(fleet.state_dir(name).examples, head.labels), Split.TRAIN)
        x = mine.embed([e.text for e in own], before).astype(float)
        powers = np.exp(x @ weight.T + bias)
        wrong = np.eye(head.labels)[[e.label for e in own]] - powers / powers.sum(axis=1, keepdims=True)
        mean = np.linalg.solve(lower, x.T @ wrong / len(own))
        total += mean * min(1.0, CLIP / np.linalg.norm(mean))
    step = np.linalg.solve(covariance + LEAST_DAMPING * np.eye(head.hidden), lower @ total / len(record.survivors))
    moved = after[head.weight] - weight
    assert np.abs(moved - 8.0 * step.T).max() < 0.02 * np.abs(moved).max()


def test_an_audit_finds_a_head_that_is_not_the_one_that_the_sum_gives(
    fleet_with_many: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = AnalyticTask.next_adapter

    def moved(*given: Any, **named: Any) -> Any:
        state, tensors = honest(*given, **named)
        head = ClassifierHead.of(Layout.of(tensors))
        return state, tensors | {head.weight: tensors[head.weight] * np.float32(1 + 2**-20)}

    fleet = fleet_with_many(rounds=1, analytic__rounds=1)
    with monkeypatch.context() as hostile:
        hostile.setattr(AnalyticTask, "next_adapter", moved)
        fleet.federate(fleet.grid())
    assert audit_failures(fleet.out / "coordinator") == {"result.adapter"}


def test_a_fleet_with_few_examples_publishes_noise_and_says_so_nowhere_else(fleet_of: FleetOf) -> None:
    fleet = fleet_of(DEVICES, **KEPT, rounds=1, analytic__rounds=1)
    (record,) = fleet.federate(fleet.grid())
    assert (record.version, record.spoiled) == (1, None)
    before, after = fleet.registry().tensors(0), fleet.registry().tensors(1)
    (name,) = (name for name in before if not np.array_equal(before[name], after[name]))
    assert np.abs(after[name] - before[name]).max() <= 16.0 * NOISE * UNIFORMS / 2 + 1e-5
    assert audit_failures(fleet.out / "coordinator") == set()


def test_a_device_whose_owner_shares_no_moments_refuses(fleet_with_many: FleetOf) -> None:
    fleet = fleet_with_many(rounds=1, analytic__rounds=1)
    settings = fleet.state_dir("device-03").folder / "device.toml"
    settings.write_text(settings.read_text().replace("[policy]\n", "[policy]\nmoments = false\n"))
    assert not fleet.state_dir("device-03").settings.policy.moments
    (record,) = fleet.federate(fleet.grid())
    assert "device-03" not in {*record.survivors, *record.dropped}
