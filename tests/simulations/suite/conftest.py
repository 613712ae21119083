"""A tiny suite: five households on a tiny base, in seconds; and outcomes that are invented."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simulations.plan import Suite, SuiteSettings
from simulations.result import ClientScore, Cost, Tally, TrialResult
from simulations.scenario import Scenario
from tests.support.trial import SCENARIO

ROUNDS = "rounds = 2\naggregation.session_rounds = 2\ntraining.learning_rate = 0.02\n"


@pytest.fixture(scope="session")
def scenario_file(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    path = tmp_path_factory.mktemp("suite") / "tiny.toml"
    path.write_text(SCENARIO.format(base=minilm) + ROUNDS)
    return path


@pytest.fixture(scope="session")
def scenario(scenario_file: Path) -> Scenario:
    return Scenario.read(scenario_file)


@pytest.fixture
def suite_of() -> Callable[..., Suite]:
    """A suite of some arms on the default scenario; keywords are keys of the suite."""

    def make(arms: dict[str, dict[str, Any]], **settings: Any) -> Suite:
        table = {"scenario": "x", "arms": arms, "seeds": [0, 1], "search": {"seeds": [7]}, **settings}
        return Suite(SuiteSettings.parse(table, "test"), Scenario().model_dump(mode="json"), Path())

    return make


def tally(right: int, count: int, loss: float = 1.0) -> Tally:
    return Tally("1" * right + "0" * (count - right), loss)


@pytest.fixture
def result_of() -> Callable[..., TrialResult]:
    """A result of clients with so many right answers of ten to their test texts; the last ones are unseen."""

    def make(*right: int, unseen: int = 0, validation: int = 5, loss: float = 1.0, **cost: Any) -> TrialResult:
        clients = tuple(
            ClientScore(
                f"c{i}", i >= len(right) - unseen, tally(validation, 10, loss), tally(count, 10), tally(count, 10)
            )
            for i, count in enumerate(right)
        )
        return TrialResult(clients, Cost(**{"epochs": 1, "steps": 10, "cpu_seconds": 2.0, **cost}))

    return make
