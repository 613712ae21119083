"""The arms of a client: what each is trained on, for how long, and how the client chooses what it keeps."""

from collections.abc import Callable
from typing import Any

import pytest

from adapters.layout import Tensors
from client.training.examples import Split
from client.training.trainer import Score, Trainer
from simulations.engine.personal import personalize_all
from simulations.engine.progress import RunProgress
from simulations.report.result import ClientResult
from simulations.scenario import Scenario


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
    return lambda: personalize_all(fleet.out, scenario, fleet.population, fleet.base, RunProgress(quiet=True))


def test_local_and_personal_get_the_same_epochs_at_the_same_two_learning_rates(
    outcomes: Callable[[], tuple[ClientResult, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainings, train = [], Trainer.train

    def recorded(self: Trainer, start: Tensors, examples: Any, task: Any, *, epochs: int, rng: Any) -> Tensors:
        assert {example.split for example in examples} == {Split.TRAIN}
        trainings.append((len(examples), epochs, task.learning_rate))
        return train(self, start, examples, task, epochs=epochs, rng=rng)

    monkeypatch.setattr(Trainer, "train", recorded)
    counts = [client.examples for client in outcomes()]
    assert len(set(counts)) == 3  # so that a count names its client
    # The rounds already gave the global adapter its eight epochs at 0.02: the personal step adds three at 0.005.
    personal, local = [(3, 0.005)], [(8, 0.02), (3, 0.005)]
    assert trainings == [(count, *training) for count in counts for training in personal + local]


@pytest.mark.parametrize(("best", "kept"), [(0, "base"), (1, "global"), (2, "personal")])
def test_local_is_kept_by_validation_as_personal_is(
    outcomes: Callable[[], tuple[ClientResult, ...]], best: int, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation prefers candidate number ``best``; the test phrases then show which adapter each arm kept."""
    calls: list[tuple[Split, Tensors]] = []

    def scored(self: Trainer, adapter: Tensors, examples: Any) -> Score:
        part = examples[0].split
        place = sum(called is Split.VALIDATION for called, _ in calls)
        calls.append((part, adapter))
        return Score(int(part is Split.VALIDATION and place % 3 == best), len(examples), 1.0)

    monkeypatch.setattr(Trainer, "score", scored)
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
