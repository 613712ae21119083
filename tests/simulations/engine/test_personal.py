"""The arms of a client: what each is trained on, for how long, and how the client chooses what it keeps."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from adapters.layout import Tensors
from aggregation.errors import DataError
from client.training.examples import Score, Split, in_split, write_examples
from client.training.trainer import ClassifierTrainer
from simulations.engine.personal import OUTCOME, personalize_all
from simulations.engine.progress import RunProgress
from simulations.engine.provision import examples_of
from simulations.report.result import ClientResult
from simulations.scenario import Scenario
from tests.support import refused


@pytest.fixture
def scenario(tiny_base: Any) -> Scenario:
    """Four rounds of two epochs, and a personal step with a learning rate of its own."""
    settings = {
        "base": {"model": str(tiny_base.folder)},
        "adapter": {"rank": 2},
        "federation": {"rounds": 4, "training": {"epochs": 2, "learning_rate": 0.02}},
        "personal": {"epochs": 3, "learning_rate": 0.005},
    }
    return Scenario.parse(settings, "tiny")


@pytest.fixture
def outcomes(fleet_of: Callable[..., Any], scenario: Scenario) -> Callable[[], tuple[ClientResult, ...]]:
    """A function that computes the outcomes of three clients of which one is unseen."""
    fleet = fleet_of(2, unseen=1)
    quiet = RunProgress(quiet=True)
    return lambda: personalize_all(fleet.out, scenario, fleet.population, fleet.base, quiet, at_once=1)


def test_local_and_personal_get_the_same_epochs_at_the_same_two_learning_rates(
    outcomes: Callable[[], tuple[ClientResult, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings, train = [], ClassifierTrainer.train

    def recorded(
        self: ClassifierTrainer, start: Tensors, examples: Any, task: Any, *, epochs: int, rng: Any, **other: Any
    ) -> Tensors:
        assert {example.split for example in examples} == {Split.TRAIN}
        trainings.append((len(examples), epochs, task.learning_rate))
        return train(self, start, examples, task, epochs=epochs, rng=rng, **other)

    monkeypatch.setattr(ClassifierTrainer, "train", recorded)
    counts = [client.examples for client in outcomes()]
    assert len(set(counts)) == 3  # so that a count names its client
    # The rounds already gave the global adapter its eight epochs at 0.02: the personal step adds three at 0.005.
    personal, local = [(3, 0.005)], [(8, 0.02), (3, 0.005)]
    assert trainings == [(count, *training) for count in counts for training in personal + local]


def test_the_personal_steps_of_both_arms_rehearse_the_same_public_texts(
    fleet_of: Callable[..., Any], scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings, train = list[tuple[int, set[str]]](), ClassifierTrainer.train

    def recorded(
        self: ClassifierTrainer, start: Tensors, examples: Any, *given: Any, epochs: int, **other: Any
    ) -> Tensors:
        trainings.append((epochs, {example.text for example in examples}))
        return train(self, start, examples, *given, epochs=epochs, **other)

    monkeypatch.setattr(ClassifierTrainer, "train", recorded)
    fleet = fleet_of(2)
    chosen = scenario.model_copy(update={"personal": scenario.personal.model_copy(update={"public": 1})})
    kept = {
        client.name: [example for example in examples_of(client) if example.label]
        for client in fleet.population.clients
    }
    for client, examples in kept.items():
        write_examples(fleet.state_dir(client).examples, examples)
    personalize_all(fleet.out, chosen, fleet.population, fleet.base, RunProgress(quiet=True), at_once=1)
    public = {text.text: text.label for text in fleet.population.public}
    for examples in kept.values():
        (steps, own), (rounds, alone), (again, both) = trainings[:3]
        del trainings[:3]
        assert (steps, rounds, again) == (3, 8, 3)
        train = in_split(examples, Split.TRAIN)
        assert alone == {example.text for example in train}
        assert own == both > alone
        unlike = {text: label for text, label in public.items() if text not in {e.text for e in examples}}
        assert sorted(public[text] for text in own - alone) == sorted({*unlike.values()})


@pytest.mark.parametrize(("best", "kept"), [(0, "base"), (1, "global"), (2, "personal")])
def test_local_is_kept_by_validation_as_personal_is(
    outcomes: Callable[[], tuple[ClientResult, ...]], best: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation prefers candidate number ``best``; the test phrases then show which adapter each arm kept."""
    calls: list[tuple[Split, Tensors]] = []

    def scored(self: ClassifierTrainer, adapter: Tensors, examples: Any) -> Score:
        part = examples[0].split
        place = sum(called is Split.VALIDATION for called, _ in calls)
        calls.append((part, adapter))
        return Score(int(part is Split.VALIDATION and place % 3 == best), len(examples), 1.0)

    monkeypatch.setattr(ClassifierTrainer, "score", scored)
    assert {client.choice for client in outcomes()} == {kept}
    for first in range(0, len(calls), 10):  # a client: three candidates of personal, three of local, the four arms
        personal, local, arms = (
            [adapter for _, adapter in calls[first + i : first + j]] for i, j in ((0, 3), (3, 6), (6, 10))
        )
        assert [part for part, _ in calls[first : first + 10]] == [Split.VALIDATION] * 6 + [Split.TEST] * 4
        assert arms[1] is local[best]
        assert arms[3] is personal[best]
        assert arms[0] is personal[0] is local[0]
        assert arms[2] is personal[1] is not local[1]


def test_clients_that_train_at_the_same_time_get_the_same_adapters(
    fleet_of: Callable[..., Any], scenario: Scenario
) -> None:
    fleet, found = fleet_of(2, unseen=1), []
    for at_once in (1, 3):
        quiet = RunProgress(quiet=True)
        results = personalize_all(fleet.out, scenario, fleet.population, fleet.base, quiet, at_once=at_once)
        kept = {path: path.read_bytes() for path in sorted((fleet.out / "devices").glob("*/personal.safetensors"))}
        assert len(kept) == len(results) == 3
        found.append(([asdict(result) for result in results], kept))
        for path in (fleet.out / "devices").glob(f"*/{OUTCOME}"):
            path.unlink()
    assert found[0] == found[1]


def test_an_error_ends_the_training_of_the_other_clients(
    fleet_of: Callable[..., Any], scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = fleet_of(2, unseen=1)
    first, *_ = fleet.population.clients

    def trained(
        self: ClassifierTrainer, start: Tensors, examples: Any, task: Any, *, step: Any, **other: Any
    ) -> Tensors:
        if examples[0].text == first.train[0].text:
            raise DataError("the loss is not finite", about="loss")
        for _ in range(1000):
            step()
            time.sleep(0.01)
        raise AssertionError("nobody ended this training")

    monkeypatch.setattr(ClassifierTrainer, "train", trained)
    began = time.monotonic()
    with refused(DataError, "loss"):
        personalize_all(fleet.out, scenario, fleet.population, fleet.base, RunProgress(quiet=True), at_once=2)
    assert time.monotonic() - began < 5
