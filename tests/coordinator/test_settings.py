"""The settings of a federation: each key has a description and bounds, and a wrong value is refused before a round."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from aggregation import graph
from aggregation.errors import ConfigError, DataError, ProtocolError
from aggregation.policy import Policy
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import Adversary, Privacy, SessionSpec
from aggregation.steps import Step
from coordinator.migration import with_rounds
from coordinator.seed import seed_version
from coordinator.session import choose
from coordinator.settings import Aggregation, Analytic, CohortSettings, FederationSettings, PrivacySettings, Server
from coordinator.transport import Enough, Transport
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors, TensorSpec
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS, Part
from edgeadapt.rounds.analytic import AnalyticTask
from edgeadapt.rounds.evaluation import EvaluationTask
from edgeadapt.rounds.observation import ObservationTask
from edgeadapt.rounds.task import Task
from simulations.engine.grid import FaultModel, InProcessGrid
from tests.coordinator.test_transport import answer
from tests.support import FleetOf, refused

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
    settings = noisy(2.0).model_copy(update={"analytic": Analytic(rounds=2, clip_norm=0.1)})
    layout = Layout((*LORA.tensors, TensorSpec("classifier.bias", (2,)), TensorSpec("classifier.weight", (2, 100))))
    head = AnalyticTask(TASK.peft_config, TASK.labels, 2e-4, 16.0)
    training = replace(TASK, trained=PARTS, shared=PARTS)
    trains, fits = (settings.session_spec(20, layout, BASE, 2, task) for task in (training, head))
    assert [(s.vector.segments[0].size, s.clip_norm) for s in (trains, fits)] == [(layout.size, 1.0), (200, 0.1)]
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
    added = before.with_counting("evaluation", 2, {"newest": "a" * 64, "previous": "b" * 64})
    assert (added.rounds, added.evaluation.rounds, added.training_rounds) == (6, 1, 4)
    assert [added.kind_of(number) for number in (4, 5, 6)] == [Task, AnalyticTask, EvaluationTask]
    other = added.with_counting("evaluation", 2, {"newest": "c" * 64, "previous": "a" * 64})
    assert (other.rounds, other.evaluation.newest) == (6, "c" * 64)
    later = added.with_counting("evaluation", 6, {"newest": "c" * 64, "previous": "a" * 64})
    assert (later.rounds, before.rounds) == (7, 5)


SCHEDULE = {"every": 24, "releases": "../releases", "channel": "stable"}


@pytest.mark.parametrize("done", [0, 2, 4, 9])
def test_by_schedule_the_next_round_evaluates_and_the_others_come_all_the_same(done: int) -> None:
    before = FederationSettings.parse({"rounds": 5, "analytic": {"rounds": 1}, "evaluation": SCHEDULE}, "here")
    now = before.evaluating(done, "a" * 64, "b" * 64)
    assert (now.kind_of(done + 1), now.rounds, now.evaluation.newest) == (EvaluationTask, done + 1, "a" * 64)
    assert (now.has_noise, before.has_noise, now.evaluation.noise_multiplier) == (True, True, 1.1)
    assert with_rounds(before, done, 2, analytic=False).evaluation.every == 0  # a migration ends


@given(st.lists(st.sampled_from(["evaluation", "observation", "round"]), max_size=12))
def test_each_round_that_counts_comes_once_after_it_was_asked_for_whatever_came_before(words: list[str]) -> None:
    settings = FederationSettings.parse({"rounds": 3, "analytic": {"rounds": 1}}, "here")
    done, asked, ran = 0, set[type](), list[type]()
    for word in (*words, *["round"] * 20):
        if word == "evaluation":
            settings = settings.with_counting("evaluation", done, {"newest": "a" * 64, "previous": f"{len(ran):064x}"})
            asked.add(EvaluationTask)
        elif word == "observation":
            settings = settings.with_counting("observation", done, {"since": len(ran)})
            asked.add(ObservationTask)
        elif done < settings.rounds:
            done += 1
            ran.append(kind := settings.kind_of(done))
            assert kind in (Task, AnalyticTask) or kind in asked
            asked.discard(kind)
    assert not asked
    assert (ran[:3], done) == ([Task, Task, AnalyticTask], settings.rounds)


@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 1, "observation": {"rounds": 1, "histograms": ["adapter"]}},
        {"rounds": 1, "observation": {"rounds": 1, "histograms": ["doubt", "doubt"]}},
        {"rounds": 1, "evaluation": {"rounds": 1}},
        {"rounds": 1, "evaluation": {"rounds": 1, "newest": "a" * 64, "previous": "a" * 64}},
        {"rounds": 1, "evaluation": {"rounds": 2, "newest": "a" * 64, "previous": "b" * 64}},
        {"rounds": 1, "evaluation": {"rounds": 1, "newest": "a", "previous": "b" * 64}},
        {"rounds": 1, "evaluation": {"noise_multiplier": 0}},
        {"aggregation": {"groups": 2}, "evaluation": {"rounds": 1, "newest": "a" * 64, "previous": "b" * 64}},
        {"evaluation": {"every": 24}},
        {"evaluation": SCHEDULE | {"rounds": 1, "newest": "a" * 64, "previous": "b" * 64}},
        {"evaluation": SCHEDULE, "aggregation": {"groups": 2}},
        {"evaluation": SCHEDULE, "privacy": {"mechanism": "skellam", "epsilon": 8}},
    ],
)
def test_a_count_without_what_it_compares_or_of_groups_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FederationSettings.parse(changes, "here")


def test_between_two_rounds_only_what_binds_no_device_and_no_record_may_change() -> None:
    old = FederationSettings()
    newer = FederationSettings(rounds=12, deadline=5.0, attempts=3, stuck_after=9.0, cohort=CohortSettings(grace=2.0))
    assert old.changes(newer) == ["rounds", "deadline", "attempts", "stuck_after", "cohort"]
    with refused(ConfigError, "aggregation"):
        old.changes(newer.model_copy(update={"aggregation": Aggregation(session_rounds=5)}))


# Cohorts of a population: chosen at random, of one size, and closed when enough devices have answered.
NODES = tuple(range(2, 202))


def test_every_node_is_as_likely_to_be_chosen_as_any_other() -> None:
    cohort = CohortSettings(size=20, over_selection=1.5, seed=1)
    chosen = [choose(NODES, cohort, f"session-{n}-1") for n in range(1, 401)]
    assert {len(nodes) for nodes in chosen} == {30}
    assert all(sorted(set(nodes)) == list(nodes) for nodes in chosen)
    times = Counter(node for nodes in chosen for node in nodes)
    expected, sd = 400 * 30 / 200, math.sqrt(400 * 0.15 * 0.85)
    assert all(abs(times[node] - expected) < 5 * sd for node in NODES)


def test_the_seed_and_the_session_determine_the_choice_and_without_a_seed_nothing_does() -> None:
    seeded, free = CohortSettings(size=20, seed=1), CohortSettings(size=20)
    assert choose(NODES, seeded, "session-1-1") == choose(NODES, seeded, "session-1-1")
    others = {
        choose(NODES, CohortSettings(size=20, seed=seed), group) for seed in (1, 2) for group in ("session-1-1", "b")
    }
    assert len(others) == 4
    assert choose(NODES, free, "session-1-1") != choose(NODES, free, "session-1-1")
    assert choose(NODES[:5], seeded, "session-1-1") == NODES[:5]
    orders = [choose(NODES, seeded, group, all_of_them=True) for group in ("session-1-1", "b")]
    assert sorted(orders[0]) == sorted(orders[1]) == [*NODES]
    assert len({orders[0], orders[1], NODES}) == 3


def test_an_exchange_ends_a_grace_time_after_enough_answers() -> None:
    delays = FaultModel(0, 0.0, 1.0).outcomes("1", Step.PLAN, NODES)
    arrivals = sorted(outcome.delay for outcome in delays.values())
    for answers, grace in ((100, 0.0), (100, 0.5), (200, 0.0)):
        grid = InProcessGrid(answer, dict.fromkeys(NODES, ""), FaultModel(0, 0.0, 1.0))
        transport = Transport(grid, grid.clock, 60.0)
        replies = list(transport.ask(Step.PLAN, dict.fromkeys(NODES, b"x"), "1", enough=Enough(answers, grace)))
        found = [reply for reply in replies if reply.body is not None]
        assert len(replies) == len(NODES)
        assert answers <= len(found) <= sum(delay < arrivals[answers - 1] + grace + 0.6 for delay in arrivals)
        assert {reply.silent for reply in replies if reply.body is None} <= {True}
        assert grid.clock.now() < arrivals[answers - 1] + grace + 0.6


def test_a_session_has_a_cohort_of_the_size_and_the_next_one_another(fleet_of: FleetOf) -> None:
    fleet = fleet_of(12, rounds=3, aggregation__session_rounds=2, cohort__size=8, cohort__seed=5)
    sets = [set(record.survivors) for record in fleet.federate(fleet.grid())]
    assert [len(devices) for devices in sets] == [8, 8, 8]
    assert sets[0] == sets[1] != sets[2]


def test_slow_devices_are_left_out(fleet_of: FleetOf) -> None:
    clocks = []
    for changes in ({"cohort__quorum": 0.75, "cohort__grace": 0.2}, {}):
        fleet = fleet_of(12, rounds=1, **changes)
        grid = fleet.grid(mean_delay=60.0)
        (record,) = fleet.federate(grid)
        assert record.version == 1
        assert 6 <= len(record.survivors) < 12 if changes else len(record.survivors) == 12
        clocks.append(grid.clock.now())
    assert clocks[0] < clocks[1]


def test_a_quorum_below_what_the_protocol_needs_is_raised_to_it(fleet_of: FleetOf) -> None:
    fleet = fleet_of(9, rounds=3, cohort__quorum=0.01)
    records = fleet.federate(fleet.grid())
    assert [record.version for record in records] == [1, 2, 3]


def test_after_a_sum_without_a_result_the_next_cohort_has_all_of_its_survivors(fleet_of: FleetOf) -> None:
    """The rule of one survivor set for each adapter holds although cohorts are chosen at random."""
    from client.node.app import app

    fleet = fleet_of(16, rounds=2, aggregation__session_rounds=1, cohort__size=8, cohort__seed=5, attempts=1)

    def deaf(message: Any, context: Any) -> Any:
        if (message.metadata.message_type, message.metadata.group_id) == (Step.UNMASK.message_type, "1"):
            raise ConnectionError
        return app(message, context)

    first, second = fleet.federate(fleet.grid(app=deaf))
    assert first.version is None
    assert second.version == 1
    asked = fleet_of(16, rounds=1, aggregation__session_rounds=1, cohort__size=8, cohort__seed=5)
    (undisturbed,) = asked.federate(asked.grid())
    assert set(second.survivors) == set(undisturbed.survivors)


# Version 0: what devices can train is published, anything else is refused before it is signed.
LABELS = ("on", "off", "dim")
CONFIG = PeftConfig("LORA", 2, 4, ("query",))
PATH = "base_model.model.encoder.layer.0.query"


def tensors(rows: int = 3, head: str = "classifier", path: str = PATH) -> Tensors:
    rng = np.random.default_rng(0)
    shapes = {
        f"{path}.lora_A.weight": (2, 5),
        f"{path}.lora_B.weight": (5, 2),
        f"base_model.model.{head}.weight": (rows, 5),
        f"base_model.model.{head}.bias": (rows,),
    }
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_manifest_describes_the_file_and_the_base() -> None:
    manifest, blob = seed_version(tensors(), CONFIG, LABELS, "b" * 64)
    assert (manifest.version, manifest.round, manifest.parent, manifest.survivors) == (0, 0, None, ())
    assert (manifest.sha256, manifest.size) == (files.sha256(blob), len(blob))
    assert (manifest.base_digest, manifest.labels, manifest.peft_config) == ("b" * 64, LABELS, CONFIG)
    assert manifest.layout_digest == Layout.of(files.decode(blob)).digest
    assert all(np.array_equal(files.decode(blob)[name], value) for name, value in tensors().items())


@pytest.mark.parametrize(
    "labels",
    [("on", "off"), ("on", "off", "dim", "blink"), ("on", "off", "on"), ()],
    ids=["few", "many", "twice", "none"],
)
def test_labels_that_are_not_the_heads_are_refused(labels: tuple[str, ...]) -> None:
    with refused(ConfigError, "labels"):
        seed_version(tensors(), CONFIG, labels, "b" * 64)


def test_an_adapter_that_devices_cannot_train_is_refused() -> None:
    headless = {name: value for name, value in tensors().items() if "classifier" not in name}
    unbiased = {name: value for name, value in tensors().items() if not name.endswith("bias")}
    for found in (tensors(head="score"), headless, unbiased, tensors(path="base_model.model.layer.0.query")):
        with refused(ConfigError, "classifier"):
            seed_version(found, CONFIG, LABELS, "b" * 64)


def test_the_version_of_another_method_has_the_names_of_peft() -> None:
    layer = PATH.replace("query", "output.dense")
    found = {name: value for name, value in tensors().items() if "lora" not in name}
    found |= {f"{PATH}.ia3_l": np.ones((5, 1), np.float32), f"{layer}.ia3_l": np.ones((1, 5), np.float32)}
    config = PeftConfig("IA3", 0, 0, ("query", "output.dense"), feedforward_modules=("output.dense",))
    manifest, blob = seed_version(found, config, LABELS, "b" * 64)
    assert files.decode(blob).keys() == found.keys()
    assert manifest.peft_config == config
    elsewhere = {name.replace(".encoder.", "."): value for name, value in found.items()}
    with refused(ConfigError, "classifier"):
        seed_version(elsewhere, config, LABELS, "b" * 64)


def adalora(*ranks: int) -> Tensors:
    """An adapter of AdaLoRA whose layers have these ranks."""
    found = {name: value for name, value in tensors().items() if "lora" not in name}
    for layer, rank in enumerate(ranks):
        path = PATH.replace("layer.0", f"layer.{layer}")
        shapes = {"A": (rank, 5), "B": (5, rank), "E": (rank, 1)}
        found |= {f"{path}.lora_{part}": np.ones(shape, np.float32) for part, shape in shapes.items()}
    return found


def test_adalora_is_published_with_its_first_rank_in_each_layer() -> None:
    config = PeftConfig("ADALORA", 3, 4, ("query",))
    manifest, blob = seed_version(adalora(3, 3), config, LABELS, "b" * 64)
    assert manifest.peft_config == config
    assert files.decode(blob).keys() == adalora(3, 3).keys()
    with refused(DataError, "encoder.layer.1.query", value=2):
        seed_version(adalora(3, 2), config, LABELS, "b" * 64)


def test_virtual_tokens_are_for_a_language_model() -> None:
    config = PeftConfig("PROMPT_TUNING", 0, 0, (), num_virtual_tokens=2)
    found = {"prompt_embeddings": np.ones((2, 5), np.float32)}
    assert seed_version(found, config, (), "b" * 64)[0].labels == ()
    with refused(ConfigError, "classifier"):
        seed_version(found, config, LABELS, "b" * 64)


@pytest.mark.parametrize("changes", [{"rank_pattern": (("query", 3),)}, {"lora_alpha": 0.5}], ids=str)
def test_an_adapter_that_devices_could_build_in_several_ways_is_refused(changes: dict[str, Any]) -> None:
    plain: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ("query",)}
    with pytest.raises(ConfigError):
        seed_version(tensors(), PeftConfig(**{**plain, **changes}), LABELS, "b" * 64)


def test_an_observation_spends_an_epsilon_of_at_most_one_by_default() -> None:
    settings = FederationSettings(rounds=1).with_counting("observation", 1, {})
    table = settings.observation
    task = ObservationTask(PeftConfig.lora(), ("on", "off"), table.histograms, table.since, table.days)
    shapes = (TensorSpec("m.classifier.bias", (2,)), TensorSpec("m.classifier.weight", (2, 5)))
    for devices in (20, 200):
        spec = settings.session_spec(devices, Layout(shapes), "a" * 64, 1, task)
        assert 0.9 < spec.spent(spec.minimum_survivors).epsilon(1e-6) <= 1.0
