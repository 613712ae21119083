"""The settings of a federation: each key has a description and bounds, and a wrong value is refused before a round."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from aggregation import graph
from aggregation.errors import ConfigError, ProtocolError
from aggregation.policy import Policy
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Adversary, Privacy, SessionSpec
from coordinator.settings import Aggregation, Analytic, CohortSettings, FederationSettings, PrivacySettings, Server
from edgeadapt.formats.layout import Layout, TensorSpec
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS, Part
from edgeadapt.rounds.analytic import AnalyticTask
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.task import Task
from tests.support import refused

LAYOUT = Layout((TensorSpec("a", (100, 10)),))
BASE = "b" * 64
LORA = Layout((TensorSpec("a.lora_A.weight", (4, 100)), TensorSpec("a.lora_B.weight", (50, 4))))
TASK = Task(PeftConfig("LORA", 4, 8, ("a",)), ("off", "on"), 1, 4, 0.01, 0.0, 0.0, tuple(Part), tuple(Part))


def write(folder: Path, settings: Any) -> Path:
    path = folder / "federation.toml"
    path.write_text(settings if isinstance(settings, str) else tomli_w.dumps(settings))
    return path


def test_every_key_has_a_meaning_in_the_file_and_a_default_and_numbers_are_bounded() -> None:
    text = FederationSettings().to_toml().splitlines()
    for key, info in FederationSettings.fields():
        assert not info.is_required()
        assert info.description
        assert [line for line in text if line.startswith(f"{key.rpartition('.')[2]} = ") and info.description in line]
        for value in (-1, math.inf, math.nan, "1", True) if info.annotation in (int, float) else ():
            with refused(ConfigError, key):
                FederationSettings.parse(_table(key, value), "here")


def _table(key: str, value: object) -> dict[str, Any]:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[return-value]


def test_settings_are_read_as_they_were_written(tmp_path: Path) -> None:
    for settings in (
        FederationSettings(),
        FederationSettings(rounds=7, deadline=1.5, server=Server(optimizer="fedadam", tau=1e-9)),
        FederationSettings(deadline=600, aggregation=Aggregation(keep_masked_inputs=True)),
    ):
        assert FederationSettings.read(write(tmp_path, settings.to_toml())) == settings


@pytest.mark.parametrize("devices", [3, 8, 12, 15, 100, 128, 129, 143])
def test_the_default_offer_is_one_that_the_default_device_accepts(devices: int) -> None:
    spec = Aggregation().spec(devices, LAYOUT, BASE, 4)
    Policy(known_bases=frozenset({BASE}), minimum_cohort=3, minimum_survivors=2).check(spec, devices)
    assert spec.adversary is Adversary.ACTIVE
    assert spec.degree == devices - 1
    assert spec.minimum_survivors >= spec.threshold


@pytest.mark.parametrize("adversary", ["active", "honest-but-curious"])
@pytest.mark.parametrize("devices", [144, 150, 257, 1000])
def test_a_large_cohort_gets_a_sparse_graph_that_is_secure_for_every_roster(devices: int, adversary: Any) -> None:
    spec = Aggregation(adversary=adversary).spec(devices, LAYOUT, BASE, 4)
    policy = Policy(known_bases=frozenset({BASE}), adversaries=frozenset(Adversary))
    policy.check(spec, devices)
    for present in range(devices - math.ceil(0.1 * devices), devices + 1):
        policy.check_roster(spec, devices, present)
    assert spec.degree < devices / 2
    assert spec.degree % 2 == 0


def test_a_graph_for_the_cohort_would_not_be_secure_once_a_tenth_dropped_out() -> None:
    """Why the graph is chosen for the roster."""
    degree, threshold = graph.graph_parameters(1000, 0.1, 0.1)
    spec = replace(Aggregation().spec(1000, LAYOUT, BASE, 4), degree=degree, threshold=threshold)
    policy = Policy(known_bases=frozenset({BASE}))
    policy.check(spec, 1000)
    with refused(ProtocolError, "roster.graph", peer="coordinator"):
        policy.check_roster(spec, 1000, 900)


def test_two_groups_of_survivors_on_a_sparse_graph_share_an_honest_device() -> None:
    for devices in (150, 1000):
        spec = Aggregation(minimum_survivors=0.01).spec(devices, LAYOUT, BASE, 4)
        assert 2 * spec.minimum_survivors > devices + devices // 10
    short = Aggregation(minimum_survivors=0.01, adversary="honest-but-curious").spec(1000, LAYOUT, BASE, 4)
    assert short.threshold < 100
    graph_of, least = (1000, 100, short.degree, short.threshold), short.minimum_survivors
    assert graph.left_over(*graph_of, least) >= graph.MINIMUM_SURVIVORS > graph.left_over(*graph_of, least - 1)


def test_more_corrupt_devices_need_a_denser_graph_and_too_many_are_refused() -> None:
    assert Aggregation(corrupt_fraction=0.05).masking_graph(1000) < Aggregation().masking_graph(1000)
    assert Aggregation(corrupt_fraction=0.2).masking_graph(100) == (99, 61)
    with pytest.raises(ConfigError):
        Aggregation(corrupt_fraction=0.6, dropout_fraction=0.3).masking_graph(1000)


def test_the_minimum_of_survivors_is_a_share_of_the_cohort_but_never_below_the_threshold() -> None:
    for share, expected in ((0.01, 8), (0.5, 8), (0.75, 9), (1.0, 12)):
        assert Aggregation(minimum_survivors=share).spec(12, LAYOUT, BASE, 1).minimum_survivors == expected


RINGS = {(16, 12): 16, (16, 255): 16, (16, 400): 17, (16, 2**16): 25, (22, 12): 22, (22, 2**16): 25}


def test_a_ring_has_the_bits_that_are_set_or_as_many_as_its_sums_need() -> None:
    bits = {(least, n): Aggregation(ring_bits=least).spec(n, LAYOUT, BASE, 1).vector.ring_bits for least, n in RINGS}
    assert bits == RINGS
    with refused(ConfigError, "clip_norm", value=1e40):
        Aggregation(clip_norm=1e40).spec(12, LAYOUT, BASE, 1)


def noisy(epsilon: float = 0.0, **changes: Any) -> FederationSettings:
    privacy = PrivacySettings(mechanism="skellam", epsilon=epsilon, **changes)
    return FederationSettings(rounds=5, privacy=privacy, aggregation=Aggregation(clip_norm=1.0))


def session_of(settings: FederationSettings, devices: int = 20) -> SessionSpec:
    return settings.session_spec(devices, LORA, BASE, 2, TASK)


@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_noise_is_calibrated_to_the_epsilon_of_all_rounds_with_the_fewest_survivors(epsilon: float) -> None:
    spec = session_of(noisy(epsilon))
    found = spec.spent(spec.minimum_survivors).times(5).epsilon(1e-6)
    assert 0.99 * epsilon < found <= epsilon
    assert spec.weight_cap == 1
    assert spec.privacy == Privacy(Mechanism.SKELLAM, spec.minimum_survivors - graph.count_of(20, 0.1), 1e-6)


@pytest.mark.parametrize(
    "privacy",
    [
        {"mechanism": "skellam"},
        {"mechanism": "skellam", "epsilon": 1.0, "noise_multiplier": 1.0},
        {"epsilon": 1.0},
        {"noise_multiplier": 1.0},
    ],
)
def test_a_mechanism_and_its_strength_are_given_together_or_not_at_all(tmp_path: Path, privacy: dict[str, Any]) -> None:
    with refused(ConfigError, "privacy"):
        FederationSettings.read(write(tmp_path, {"privacy": privacy}))


def test_rounds_of_both_kinds_are_within_the_epsilon_together() -> None:
    settings = noisy(2.0).model_copy(update={"analytic": Analytic(rounds=2, dimensions=40, clip_norm=0.1)})
    layout = Layout((*LORA.tensors, TensorSpec("classifier.bias", (2,)), TensorSpec("classifier.weight", (2, 100))))
    head = AnalyticTask(TASK.peft_config, TASK.labels, 2e-4, 16.0, 40)
    training = replace(TASK, trained=PARTS, shared=PARTS)
    trains, fits = (settings.session_spec(20, layout, BASE, 2, task) for task in (training, head))
    assert [(s.vector.segments[0].size, s.clip_norm) for s in (trains, fits)] == [(layout.size, 1.0), (900, 0.1)]
    assert trains.noise_multiplier() == pytest.approx(fits.noise_multiplier(), rel=1e-12)
    spent = [spec.spent(spec.minimum_survivors) for spec in (trains, fits)]
    found = (spent[0].times(3) + spent[1].times(2)).epsilon(1e-6)
    assert 0.99 * 2.0 < found <= 2.0


def test_a_cohort_whose_smallest_sum_may_have_no_honest_device_is_refused() -> None:
    settings = noisy(1.0).model_copy(update={"aggregation": Aggregation(corrupt_fraction=0.95)})
    with refused(ConfigError, "aggregation.corrupt_fraction"):
        session_of(settings, devices=4)


def test_an_evaluation_comes_after_the_rounds_that_are_left_and_replaces_one_that_waits() -> None:
    before = FederationSettings.parse({"rounds": 5, "analytic": {"rounds": 1}}, "here")
    added = before.with_evaluation(2, "a" * 64, "b" * 64)
    assert (added.rounds, added.evaluation.rounds, added.training_rounds) == (6, 1, 4)
    assert [added.kind_of(number) for number in (4, 5, 6)] == [Task, AnalyticTask, EvaluationTask]
    other = added.with_evaluation(2, "c" * 64, "a" * 64)
    assert (other.rounds, other.evaluation.newest) == (6, "c" * 64)
    assert (added.with_evaluation(6, "c" * 64, "a" * 64).rounds, before.rounds) == (7, 5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 1, "evaluation": {"rounds": 1}},
        {"rounds": 1, "evaluation": {"rounds": 1, "newest": "a" * 64, "previous": "a" * 64}},
        {"rounds": 1, "evaluation": {"rounds": 2, "newest": "a" * 64, "previous": "b" * 64}},
        {"rounds": 1, "evaluation": {"rounds": 1, "newest": "a", "previous": "b" * 64}},
        {"rounds": 1, "evaluation": {"noise_multiplier": 0}},
        {"aggregation": {"groups": 2}, "evaluation": {"rounds": 1, "newest": "a" * 64, "previous": "b" * 64}},
    ],
)
def test_an_evaluation_without_two_releases_or_of_groups_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FederationSettings.parse(changes, "here")


def test_between_two_rounds_only_what_binds_no_device_and_no_record_may_change() -> None:
    old = FederationSettings()
    newer = FederationSettings(rounds=12, deadline=5.0, attempts=3, cohort=CohortSettings(grace=2.0))
    assert old.changes(newer) == ["rounds", "deadline", "attempts", "cohort"]
    with refused(ConfigError, "aggregation"):
        old.changes(newer.model_copy(update={"aggregation": Aggregation(session_rounds=5)}))
