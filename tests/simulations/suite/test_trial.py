"""How a trial is computed: each arm is trained on what it should be, and tallied on the client's own texts."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest

from aggregation.errors import DataError
from aggregation.steps import Step
from client.training.examples import Score, Split
from client.training.logistic import with_constant
from client.training.torchengine import TorchEngine
from client.training.trainer import ClassifierTrainer
from edgeadapt.bases.pictures import picture
from edgeadapt.bases.sounds import sound
from edgeadapt.formats.layout import Tensors
from simulations.data import populate
from simulations.data.population import Client, LabelledText, Population
from simulations.engine.grid import DeliveryOutcome, FaultModel, round_of
from simulations.engine.progress import RunProgress
from simulations.engine.provision import BUCKETS, hashed_ngrams
from simulations.plan import Kind, Trial
from simulations.result import RoundTally, TrialResult
from simulations.scenario import Scenario
from simulations.suite import trial as module
from simulations.suite.execute import Worker, _material, compute, compute_rounds
from simulations.suite.store import Store
from simulations.suite.trial import ClassifierArms, TrialRun
from tests.support import refused
from tests.support.pictures import file_of
from tests.support.sounds import tone

pytestmark = pytest.mark.usefixtures("one_thread")


def ignored(note: str) -> None: ...


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
    return {kind: compute(Trial(kind, scenario), store, ignored) for kind in Kind}


@pytest.fixture(scope="module")
def population(scenario: Scenario) -> Population:
    return populate(scenario.data, scenario.population, scenario.seed).population


def run_of(scenario: Scenario, store: Store, kind: Kind = Kind.PERSONAL, **options: Any) -> TrialRun:
    trial = Trial(kind, scenario)
    return TrialRun(trial, _material(trial, store), store, **options)


def test_every_arm_trains_with_the_engine_of_its_scenario(
    computed: dict[Kind, TrialResult], scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = scenario.model_copy(update={"base": scenario.base.model_copy(update={"engine": "onnx"})})
    store = Store(tmp_path)
    compute_rounds(Trial(Kind.GLOBAL, onnx), store, ignored)
    monkeypatch.setattr(TorchEngine, "gradients", lambda *_, **__: pytest.fail("torch trained"))
    for kind in Kind:
        result, expected = compute(Trial(kind, onnx), store, ignored).clients, computed[kind].clients
        differences = [abs(one.test.loss - other.test.loss) for one, other in zip(result, expected, strict=True)]
        assert 0 < np.median(differences) < 0.1, kind  # of weights in eight bits, which torch does not have


def test_every_client_is_asked_its_own_texts_and_the_public_ones(
    computed: dict[Kind, TrialResult], population: Population
) -> None:
    for result in computed.values():
        for client, score in zip(population.clients, result.clients, strict=True):
            assert (score.name, score.unseen) == (client.name, client.unseen)
            counts = (len(client.validation), len(client.test), len(population.public))
            assert (score.validation.count, score.test.count, score.public.count) == counts
    assert all(client.public.accuracy == 1 for client in computed[Kind.BASE].clients)  # one text makes each prototype


def test_a_run_asks_test_texts_only_and_clients_at_the_same_time_get_the_same_adapters(
    computed: dict[Kind, TrialResult], store: Store, scenario: Scenario, tmp_path: Path
) -> None:
    adapters: dict[int, dict[str, Tensors]] = {1: {}, 3: {}}
    for count, kept in adapters.items():

        def keep(client: Client, adapter: Tensors, kept: dict[str, Tensors] = kept) -> None:
            kept[client.name] = adapter

        run = run_of(scenario, store, at_once=count, thorough=False, keep=keep)
        run.store = Store(tmp_path / str(count))
        result = run.compute(RunProgress(quiet=True), "personal")
        right = [[c.test.right for c in each.clients] for each in (result, computed[Kind.PERSONAL])]
        assert right[0] == right[1]
        assert {c.validation.count + c.public.count for c in result.clients} == {0}
    assert len(adapters[1]) == 5
    for name, adapter in adapters[1].items():
        assert all((adapters[3][name][key] == value).all() for key, value in adapter.items())


def test_the_cost_counts_epochs_steps_time_and_bytes(computed: dict[Kind, TrialResult], population: Population) -> None:
    cost = {kind: result.cost for kind, result in computed.items()}
    assert {kind: each.epochs for kind, each in cost.items()} == {
        Kind.BASE: 0,
        Kind.RIDGE: 0,
        Kind.LOGISTIC: 0,
        Kind.SUMMED: 0,
        Kind.GLOBAL: 2,
        Kind.ROUTED: 2,
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
    for kind, each in cost.items():
        assert (each.bytes_up > 0) is (each.bytes_down > 0) is kind.federated
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
    compute_rounds(trial, store, ignored)
    result = compute(trial, store, ignored)
    assert (result.cost.epochs, result.cost.steps, len(result.rounds)) == (0, 0, 1)
    assert result.cost.bytes_up > 0
    base = compute(Trial(Kind.BASE, trial.scenario), store, ignored)
    right = [sum(client.test.accuracy for client in each.clients) for each in (base, result)]
    assert right[1] > right[0]


def test_an_analytic_round_that_aborts_is_repeated_and_one_without_a_sum_is_told_and_can_be_retried(
    scenario: Scenario, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = scenario.model_dump(mode="json")
    table["federation"] |= {"rounds": 1, "analytic": {"rounds": 1}, "attempts": 1}
    trial, outcomes, lost = Trial(Kind.GLOBAL, Scenario.parse(table, "test")), FaultModel.outcomes, range(1, 2)

    def faulty(self: FaultModel, group: str, step: Step | None, nodes: Sequence[int]) -> dict[int, DeliveryOutcome]:
        gone = step is Step.PLAN and round_of(group) in lost and self.seed < 2**32
        drawn = outcomes(self, group, step, nodes)
        return {node: replace(each, reply_lost=True) for node, each in drawn.items()} if gone else drawn

    monkeypatch.setattr(FaultModel, "outcomes", faulty)
    store = Store(tmp_path / "once")
    compute_rounds(trial, store, ignored)
    once = compute(trial, store, ignored)
    assert once.round_tally == RoundTally(rounds=2, aborted=1, repeated=1)
    assert not once.round_tally.is_short
    lost, store = range(1, 100), Store(tmp_path / "never")
    compute_rounds(trial, store, ignored)
    never = compute(trial, store, ignored)
    assert never.round_tally == RoundTally(rounds=6, aborted=6, unfitted=True)
    assert never.clients != once.clients
    store.retry([trial])
    assert store.get(trial) is None
    compute_rounds(trial, store, ignored)
    again = compute(trial, store, ignored)
    assert again.round_tally == RoundTally(rounds=1, retries=1)
    assert once.cost.bytes_up > 1.5 * again.cost.bytes_up  # those of two rounds, though all answers of one were lost
    store.retry([trial])
    assert store.get(trial) == again  # it lacks nothing


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
        compute(Trial(kind, scenario), store, ignored)
        assert trained == expected, kind


def test_the_personal_steps_of_both_arms_rehearse_the_same_public_texts(
    store: Store, scenario: Scenario, population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[Kind, list[set[str]]] = {Kind.PERSONAL: [], Kind.LOCAL: []}
    train, own = ClassifierTrainer.train, scenario.personal.model_copy(update={"public": 1})
    for kind, texts in steps.items():

        def recorded(
            self: ClassifierTrainer, *rest: Any, epochs: int, texts: list[set[str]] = texts, **other: Any
        ) -> Any:
            if epochs == 1:
                texts.append({example.text for example in rest[1]})
            return train(self, *rest, epochs=epochs, **other)

        monkeypatch.setattr(ClassifierTrainer, "train", recorded)
        compute(Trial(kind, scenario.model_copy(update={"personal": own})), store, ignored)
    assert steps[Kind.PERSONAL] == steps[Kind.LOCAL]
    for client, read in zip(population.clients, steps[Kind.LOCAL], strict=True):
        assert read > {text.text for text in client.train}


@pytest.mark.parametrize(("best", "kept"), [(0, "base"), (2, "personal")])
def test_local_is_kept_by_validation_as_personal_is(
    store: Store, scenario: Scenario, best: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation prefers candidate number ``best``: each arm must keep that one."""
    personal = scenario.personal.model_copy(update={"choice": "best"})
    scenario = scenario.model_copy(update={"personal": personal})
    scored: list[Tensors] = []

    def score(self: ClassifierTrainer, adapter: Tensors, examples: Any) -> Score:
        assert {example.split for example in examples} == {Split.VALIDATION}
        scored.append(adapter)
        return Score(int((len(scored) - 1) % 3 == best), len(examples), 1.0)

    monkeypatch.setattr(ClassifierTrainer, "score", score)
    asked: list[Tensors] = []
    model = ClassifierArms.model
    monkeypatch.setattr(ClassifierArms, "model", lambda self, adapter: (asked.append(adapter), model(self, adapter))[1])
    for kind in (Kind.PERSONAL, Kind.LOCAL):
        scored.clear()
        asked.clear()
        assert {client.choice for client in compute(Trial(kind, scenario), store, ignored).clients} == {kept}
        assert len(scored) == 15
        assert all(adapter is scored[3 * place + best] for place, adapter in enumerate(asked))


def test_a_head_is_fitted_to_own_and_public_texts_and_for_validation_not_to_the_validation_texts(
    store: Store, scenario: Scenario, population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[tuple[int, list[int], float, float]] = []
    answers = iter(range(10**6))  # heads that answer always this label, modulo the number of labels

    def fit(x: Any, labels: Any, weights: Any, count: int, penalty: float) -> Any:
        fitted.append((len(x), labels.tolist(), float(weights.sum()), penalty))
        head = np.zeros((x.shape[1], count))
        head[-1, next(answers) % 2] = 1.0  # of the constant
        return head

    monkeypatch.setitem(module.HEADS, Kind.RIDGE, (fit, "ridge"))
    head = scenario.head.model_copy(update={"ridge": 0.3, "own_weight": 4.0})
    found = compute(Trial(Kind.RIDGE, scenario.model_copy(update={"head": head})), store, ignored)
    public = [text.label for text in population.public]
    for client, score, *pair in zip(population.clients, found.clients, fitted[::2], fitted[1::2], strict=True):
        for own, each in zip((client.train, (*client.train, *client.validation)), pair, strict=True):
            labels = [text.label for text in own]
            assert each == (len(labels) + len(public), labels + public, 4.0 * len(labels) + len(public), 0.3)
        for answer, texts, tally in ((0, client.validation, score.validation), (1, client.test, score.test)):
            assert tally.right == "".join("1" if text.label == answer else "0" for text in texts)


def test_a_summed_head_is_that_of_everybodys_texts_fitted_to_the_clients_own(
    store: Store, scenario: Scenario, population: Population
) -> None:
    head = scenario.head.model_copy(update={"features": "ngrams", "ridge": 0.5, "own_weight": 2.0})
    result = compute(Trial(Kind.SUMMED, scenario.model_copy(update={"head": head})), store, ignored)

    def rows(texts: Sequence[LabelledText]) -> Any:
        return with_constant(hashed_ngrams([text.text for text in texts]))

    def fitted(texts: Sequence[LabelledText], prior: Any, penalty: float) -> Any:
        """Least squares over the texts, and over rows that hold the prior: another way to the same head."""
        root, targets = math.sqrt(penalty), np.eye(len(population.labels))[[text.label for text in texts]]
        x = np.vstack([rows(texts), root * np.eye(len(prior))])
        return np.linalg.lstsq(x, np.vstack([targets, root * prior]), rcond=None)[0]

    seen = [text for client in population.clients if not client.unseen for text in client.train]
    shared = fitted([*seen, *population.public], np.zeros((BUCKETS + 1, len(population.labels))), 0.5)
    for client, score in zip(population.clients, result.clients, strict=True):
        answers = (rows(client.test) @ fitted([*client.train, *client.validation], shared, 0.5)).argmax(1)
        assert score.test.right == "".join(
            str(int(answer == text.label)) for answer, text in zip(answers, client.test, strict=True)
        )


def test_texts_without_a_common_run_of_characters_have_orthogonal_ngrams() -> None:
    one, again, other, empty = hashed_ngrams(["Turn  on the light", "turn on the light ", "bzzzz", ""])
    assert one @ again == pytest.approx(1)
    assert abs(one @ other) < 0.2  # hashed runs may fall together
    assert abs(empty @ other) < 0.5


def test_a_classifier_without_a_model_reads_grey_pixels_and_spectra() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (32, 32))
    low, high = hashed_ngrams([sound(tone(0, 1)), sound(tone(1, 1))]).reshape(2, 32, 32)
    assert [one.mean(0).argmax() for one in (low, high)] == [1, 8]  # in bands of 250 Hz
    (row,) = hashed_ngrams([picture(file_of(pixels))])
    assert row == pytest.approx(pixels.reshape(-1) / np.linalg.norm(pixels))


def test_interrupted_rounds_continue(tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    store, trial = Store(tmp_path), Trial(Kind.GLOBAL, scenario)
    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTrainer, "train", interrupted_after(6))  # four devices a round, one of which drops out
        with pytest.raises(KeyboardInterrupt):
            compute_rounds(trial, store, ignored)
    assert not store.has_rounds(trial)
    notes: list[str] = []
    compute_rounds(trial, store, notes.append)
    assert store.has_rounds(trial)
    assert "round 1 of 2" not in notes
    assert compute(trial, store, ignored).round_tally.resumed == (2,)  # both rounds would have one session


def interrupted_after(trainings: int) -> Callable[..., Any]:
    left, train = iter(range(trainings)), ClassifierTrainer.train

    def interrupted(self: ClassifierTrainer, *rest: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return train(self, *rest, **named)

    return interrupted


def test_an_interrupted_trial_keeps_the_clients_that_are_done(
    store: Store, scenario: Scenario, computed: dict[Kind, TrialResult], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run, trained, personal = run_of(scenario, store), list[str](), ClassifierArms.personal
    run.store = Store(tmp_path)

    def recorded(self: ClassifierArms, client: Client, *rest: Any) -> Any:
        trained.append(client.name)
        return personal(self, client, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(ClassifierTrainer, "train", interrupted_after(3))
        with pytest.raises(KeyboardInterrupt):
            run.compute(RunProgress(quiet=True), "client")
    monkeypatch.setattr(ClassifierArms, "personal", recorded)
    result = replace(run, _stop=Event()).compute(RunProgress(quiet=True), "client")
    assert len(trained) == 2
    assert result.clients == computed[Kind.PERSONAL].clients
    assert list((tmp_path / "parts").iterdir()) == []


def test_an_error_ends_the_training_of_the_other_clients(
    store: Store, scenario: Scenario, population: Population, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(
        self: ClassifierTrainer, start: Tensors, examples: Any, task: Any, *, control: Any, **other: Any
    ) -> Tensors:
        if examples[0].text == population.clients[0].train[0].text:
            raise DataError("the loss is not finite", about="loss")
        while True:  # until the error of the first client ends this training
            control.step()
            time.sleep(0.01)

    monkeypatch.setattr(ClassifierTrainer, "train", trained)
    with refused(DataError, "loss"):
        run_of(scenario, store, at_once=2).compute(RunProgress(quiet=True), "client")


def test_the_personal_arm_begins_with_the_parts_that_its_device_has_kept(
    tmp_path: Path, scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, federation = Store(tmp_path), scenario.federation.model_copy(update={"method": "fedper"})
    trial = Trial(Kind.PERSONAL, scenario.model_copy(update={"federation": federation}))
    compute_rounds(trial, store, ignored)
    heads, personal = [], ClassifierArms.personal

    def recorded(self: ClassifierArms, client: Client, start: Tensors, *rest: Any) -> Any:
        heads.append(next(value.tobytes() for name, value in start.items() if name.endswith("classifier.weight")))
        return personal(self, client, start, *rest)

    monkeypatch.setattr(ClassifierArms, "personal", recorded)
    scores = compute(trial, store, ignored).clients
    assert len(scores) == len(heads) == 5
    assert len({head for head, score in zip(heads, scores, strict=True) if not score.unseen}) == 4


def test_an_error_of_a_scenario_is_the_outcome_of_its_trial(store: Store, scenario: Scenario) -> None:
    adapter = scenario.adapter.model_copy(update={"targets": ("nothing",)})
    trial = Trial(Kind.LOCAL, scenario.model_copy(update={"adapter": adapter}))
    Worker(store.path, ignored).work(trial, rounds=False)
    outcome = store.get(trial)
    assert isinstance(outcome, str)
    assert "nothing" in outcome


@pytest.mark.parametrize("count", [200, 201])
def test_no_more_public_texts_are_asked_than_the_limit(count: int, population: Population) -> None:
    asked = module.asked([population.public[i % len(population.public)] for i in range(count)])
    assert 100 < len(asked) <= module.MOST_PUBLIC or len(asked) == count
