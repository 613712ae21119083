"""A trial measures what a run measures, by the same code; and each arm is trained on what it should be."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.base import find_base
from client.training.trainer import ClassifierTrainer
from simulations.data import populate
from simulations.data.population import Population
from simulations.engine.personal import personalize_all
from simulations.engine.progress import RunProgress
from simulations.engine.provision import Enrolment
from simulations.scenario import Scenario
from simulations.suite import measure
from simulations.suite.measure import compute, compute_rounds
from simulations.suite.outcome import TrialResult
from simulations.suite.plan import Trial
from simulations.suite.settings import Kind
from simulations.suite.store import Store
from simulations.suite.worker import work

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, scenario: Scenario) -> Store:
    """The folder of a suite with finished rounds."""
    store = Store(tmp_path_factory.mktemp("store"))
    notes: list[str] = []
    compute_rounds(Trial(Kind.GLOBAL, scenario), store, notes.append)
    assert notes[0] == "round 1 of 2"
    assert "round 2 of 2" in notes
    return store


@pytest.fixture(scope="module")
def computed(store: Store, scenario: Scenario) -> dict[Kind, TrialResult]:
    return {kind: compute(Trial(kind, scenario), store, lambda _: None) for kind in Kind}


@pytest.fixture(scope="module")
def population(scenario: Scenario) -> Population:
    return populate(scenario.data, scenario.population, scenario.seed).population


def test_every_arm_trains_with_the_engine_of_its_scenario(
    computed: dict[Kind, TrialResult], scenario: Scenario, tmp_path: Path
) -> None:
    onnx = scenario.model_copy(update={"base": scenario.base.model_copy(update={"engine": "onnx"})})
    store = Store(tmp_path)
    compute_rounds(Trial(Kind.GLOBAL, onnx), store, lambda _: None)
    for kind in Kind:
        found, expected = compute(Trial(kind, onnx), store, lambda _: None).clients, computed[kind].clients
        differences = [abs(one.test.loss - other.test.loss) for one, other in zip(found, expected, strict=True)]
        assert 0 < np.median(differences) < 0.1, kind  # of weights in eight bits, which torch does not have


def test_a_trial_gives_the_accuracies_of_a_run(
    computed: dict[Kind, TrialResult], store: Store, scenario: Scenario, population: Population, tmp_path: Path
) -> None:
    rounds, base = store.federation(Trial(Kind.GLOBAL, scenario)), find_base(scenario.base.model)
    copy = shutil.copytree(rounds, tmp_path / "run")
    Enrolment.of(copy, scenario, population, base).enrol(client.name for client in population.clients)
    clients = personalize_all(copy, scenario, population, base, RunProgress(quiet=True), at_once=1)
    for kind in (Kind.BASE, Kind.LOCAL, Kind.GLOBAL, Kind.PERSONAL):
        found = [(client.name, client.unseen, client.test.accuracy) for client in computed[kind].clients]
        assert found == [(client.name, client.unseen, client.accuracy[kind.value]) for client in clients], kind


def test_every_client_is_asked_its_own_texts_and_the_public_ones(
    computed: dict[Kind, TrialResult], population: Population
) -> None:
    for result in computed.values():
        for client, score in zip(population.clients, result.clients, strict=True):
            assert (score.name, score.unseen) == (client.name, client.unseen)
            counts = (len(client.validation), len(client.test), len(population.public))
            assert (score.validation.count, score.test.count, score.public.count) == counts
    assert all(client.public.accuracy == 1 for client in computed[Kind.BASE].clients)  # one text makes each prototype


def test_the_cost_counts_epochs_steps_time_and_bytes(
    computed: dict[Kind, TrialResult], population: Population, scenario: Scenario
) -> None:
    cost = {kind: result.cost for kind, result in computed.items()}
    epochs = {kind: found.epochs for kind, found in cost.items()}
    assert epochs == {
        Kind.BASE: 0,
        Kind.RIDGE: 0,
        Kind.LOGISTIC: 0,
        Kind.GLOBAL: 2,
        Kind.CENTRAL: 2,
        Kind.LOCAL: 3,
        Kind.PERSONAL: 3,
        Kind.CENTRAL_PERSONAL: 3,
    }
    steps = [-(-len(client.train) // 16) for client in population.clients]
    seen = sum(number for number, client in zip(steps, population.clients, strict=True) if not client.unseen)
    assert cost[Kind.GLOBAL].steps == 2 * seen
    assert cost[Kind.PERSONAL].steps == 2 * seen + sum(steps)
    assert cost[Kind.LOCAL].steps == 3 * sum(steps)
    for kind, found in cost.items():
        assert (found.bytes_up > 0) is (found.bytes_down > 0) is kind.federated
        assert (len(computed[kind].rounds) == 2) is kind.federated
    assert cost[Kind.PERSONAL].cpu_seconds > cost[Kind.GLOBAL].cpu_seconds > 0
    assert cost[Kind.LOCAL].cpu_seconds > cost[Kind.BASE].cpu_seconds
    last = computed[Kind.GLOBAL].rounds[-1]
    assert last.bytes == pytest.approx(cost[Kind.GLOBAL].bytes_up + cost[Kind.GLOBAL].bytes_down)


def test_rounds_of_an_analytic_head_are_no_training(scenario: Scenario, tmp_path: Path) -> None:
    table = scenario.model_dump(mode="json")
    table["federation"] |= {"rounds": 1, "analytic": {"rounds": 1}}
    table["personal"] |= {"method": "ridge", "choice": "never"}
    store, trial = Store(tmp_path), Trial(Kind.PERSONAL, Scenario.parse(table, "test"))
    compute_rounds(trial, store, lambda _: None)
    found = compute(trial, store, lambda _: None)
    assert (found.cost.epochs, found.cost.steps) == (0, 0)
    assert len(found.rounds) == 1
    assert found.cost.bytes_up > 0
    base = compute(Trial(Kind.BASE, trial.scenario), store, lambda _: None)
    right = [sum(client.test.accuracy for client in result.clients) for result in (base, found)]
    assert right[1] > right[0]


def test_only_the_training_texts_of_the_right_clients_are_trained_on(
    store: Store, scenario: Scenario, population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[list[str], int, float]] = []
    train = ClassifierTrainer.train

    def recorded(self: ClassifierTrainer, start: Any, examples: Any, task: Any, *, epochs: int, **other: Any) -> Any:
        trained.append(([example.text for example in examples], epochs, task.learning_rate))
        return train(self, start, examples, task, epochs=epochs, **other)

    monkeypatch.setattr(ClassifierTrainer, "train", recorded)
    own = [[text.text for text in client.train] for client in population.clients]
    seen = [texts for texts, client in zip(own, population.clients, strict=True) if not client.unseen]
    pooled = [text for texts in seen for text in texts]
    for kind, expected in {
        Kind.BASE: [],
        Kind.RIDGE: [],
        Kind.GLOBAL: [(texts, 1, 0.02) for texts in seen],  # for the aggregation error
        Kind.PERSONAL: [(texts, 1, 1e-3) for texts in own],
        Kind.LOCAL: [part for texts in own for part in ((texts, 2, 0.02), (texts, 1, 1e-3))],
        Kind.CENTRAL: [(pooled, 2, 0.02)],
        Kind.CENTRAL_PERSONAL: [(pooled, 2, 0.02), *((texts, 1, 1e-3) for texts in own)],
    }.items():
        trained.clear()
        compute(Trial(kind, scenario), store, lambda _: None)
        assert trained == expected, kind


def test_a_head_is_fitted_to_own_training_texts_and_public_texts_with_their_weights(
    store: Store, scenario: Scenario, population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[tuple[int, list[int], float, float]] = []

    def fit(x: Any, labels: Any, weights: Any, count: int, penalty: float) -> Any:
        fitted.append((len(x), labels.tolist(), float(weights.sum()), penalty))
        return np.zeros((x.shape[1], count))

    monkeypatch.setattr(measure, "ridge_head", fit)
    head = scenario.head.model_copy(update={"ridge": 0.3, "own_weight": 4.0})
    compute(Trial(Kind.RIDGE, scenario.model_copy(update={"head": head})), store, lambda _: None)
    public = [text.label for text in population.public]
    for client, found in zip(population.clients, fitted, strict=True):
        labels = [text.label for text in client.train]
        assert found == (len(labels) + len(public), labels + public, 4.0 * len(labels) + len(public), 0.3)


def test_interrupted_rounds_continue_and_the_time_of_both_attempts_counts(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, trial = Store(tmp_path), Trial(Kind.GLOBAL, scenario)
    calls, train = iter(range(6)), ClassifierTrainer.train  # four devices a round, one of which drops out

    def interrupted(self: ClassifierTrainer, *rest: Any, **named: Any) -> Any:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return train(self, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTrainer, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compute_rounds(trial, store, lambda _: None)
    assert not store.has_rounds(trial)
    notes: list[str] = []
    compute_rounds(trial, store, notes.append)
    assert store.has_rounds(trial)
    assert "round 1 of 2" not in notes


def test_the_personal_arm_begins_with_the_parts_that_its_device_has_kept(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, federation = Store(tmp_path), scenario.federation.model_copy(update={"method": "fedper"})
    trial = Trial(Kind.PERSONAL, scenario.model_copy(update={"federation": federation}))
    compute_rounds(trial, store, lambda _: None)
    heads, step = [], measure.personal_step

    def recorded(mine: Any, client: str, examples: Any, start: Any, inputs: Any, **other: Any) -> Any:
        heads.append(next(value.tobytes() for name, value in start.items() if name.endswith("classifier.weight")))
        return step(mine, client, examples, start, inputs, **other)

    monkeypatch.setattr(measure, "personal_step", recorded)
    scores = compute(trial, store, lambda _: None).clients
    assert len(scores) == len(heads) == 5
    assert len({head for head, score in zip(heads, scores, strict=True) if not score.unseen}) == 4


def test_kept_embeddings_change_neither_answers_nor_the_time_that_is_counted(store: Store, scenario: Scenario) -> None:
    trial = Trial(Kind.RIDGE, scenario)
    measure._embeddings.cache_clear()
    first, second = (compute(trial, store, lambda _: None) for _ in range(2))
    assert first.clients == second.clients
    assert second.cost.cpu_seconds > first.cost.cpu_seconds / 3 > 0


def test_an_error_of_a_scenario_is_the_outcome_of_its_trial(store: Store, scenario: Scenario) -> None:
    adapter = scenario.adapter.model_copy(update={"targets": ("nothing",)})
    trial = Trial(Kind.LOCAL, scenario.model_copy(update={"adapter": adapter}))
    job = {"kind": "local", "scenario": trial.scenario.model_dump(mode="json"), "rounds": False}
    work(job, store, lambda _: None)
    outcome = store.get(trial)
    assert isinstance(outcome, str)
    assert "nothing" in outcome


@pytest.mark.parametrize("count", [1, 200, 201, 1000])
def test_no_more_public_texts_are_asked_than_the_limit(count: int, population: Population) -> None:
    asked = measure._asked([population.public[i % len(population.public)] for i in range(count)])
    assert 100 < len(asked) <= measure.MOST_PUBLIC or len(asked) == count
