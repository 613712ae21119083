"""A suite of a language model: arms in bits per byte, where less is better."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from simulations.plan import Kind, SearchOutcome, Suite, Trial
from simulations.report.pages import headline, markdown, suite_page
from simulations.report.summary import SuiteSummary, summarize
from simulations.result import RoundPoint, Tally, TrialResult
from simulations.scenario import Scenario
from simulations.suite.execute import compute, compute_rounds
from simulations.suite.store import Store
from tests.support import refused
from tests.support.models import llama, make_lm

__all__ = ["llama", "make_lm"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")
NONE = SearchOutcome({}, (), 0.0)


@pytest.fixture
def scenario(llama: Base, texts: Path) -> Scenario:
    table = {
        "name": "authors",
        "data": {
            "files": [str(texts)],
            "text": "words",
            "label": "",
            "client": "author",
            "public_texts": 1,
            "near_duplicates": 1,
        },
        "base": {"model": str(llama.folder)},
        "adapter": {"targets": ["q_proj", "v_proj"]},
        "federation": {"rounds": 2, "training": {"learning_rate": 0.02}},
        "personal": {"learning_rate": 0.01, "epochs": 1},
        "network": {"message_loss": 0, "forced_dropouts": 0},
    }
    return Scenario.parse(table, "test")


def test_every_arm_of_a_language_model_is_measured_in_bits(scenario: Scenario, tmp_path: Path) -> None:
    store = Store(tmp_path / "suite")
    compute_rounds(Trial(Kind.GLOBAL, scenario), store, lambda _: None)
    results = {
        kind: compute(Trial(kind, scenario), store, lambda _: None)
        for kind in Kind
        if not kind.of_embeddings and kind is not Kind.ROUTED
    }
    assert all(math.isnan(client.test.accuracy) for result in results.values() for client in result.clients)
    means = {kind: sum(client.test.bits for client in result.clients) / 5 for kind, result in results.items()}
    assert all(mean < means[Kind.BASE] for kind, mean in means.items() if kind is not Kind.BASE)
    assert [point.value for point in results[Kind.GLOBAL].rounds] == [None, None]  # of too few texts to be published
    assert Store(store.path).get(Trial(Kind.BASE, scenario)) == results[Kind.BASE]
    choices = {client.choice for client in results[Kind.PERSONAL].clients}
    assert choices <= {"base", "global", "personal"}


def test_a_head_on_embeddings_is_no_arm_of_a_language_model(scenario: Scenario, suite_of: Callable[..., Suite]) -> None:
    made = suite_of({"ridge": {"kind": "ridge-head"}, "local": {"kind": "local"}})
    suite = Suite(made.settings, scenario.model_dump(mode="json"), Path())
    with refused(ConfigError, "data.label"):
        suite.check()
    Suite(made.settings.with_arms(["local"]), suite.scenario, Path()).check()


@pytest.fixture
def found(result_of: Callable[..., TrialResult]) -> dict[str, Any]:
    """Eight clients on one seed, two unseen: local loses 2 to 2.7 bits per byte, personal half a bit less."""

    def result(bits: float) -> TrialResult:
        made = result_of(*range(8), unseen=2)
        losses = [(bits + number / 10) * math.log(2) for number in range(8)]
        clients = (
            replace(client, validation=Tally("", 1.0, 3), test=Tally("", loss, 5), public=Tally("", 1.0, 2))
            for client, loss in zip(made.clients, losses, strict=True)
        )
        return replace(made, clients=tuple(clients))

    rounds = (RoundPoint(1, 2.5, 10.0), RoundPoint(2, 1.9, 20.0))
    return {"local": (NONE, {0: result(2.0)}), "personal": (NONE, {0: replace(result(1.5), rounds=rounds)})}


@pytest.fixture
def suite(suite_of: Callable[..., Suite]) -> Suite:
    arms = {"local": {"kind": "local"}, "personal": {"kind": "personal"}}
    return suite_of(arms, baseline="local", seeds=[0], target=2.0)


@pytest.fixture
def summary(suite: Suite, found: dict[str, Any]) -> SuiteSummary:
    return summarize(suite.settings, found)


def test_the_worst_client_has_the_most_bits(summary: SuiteSummary) -> None:
    local = summary.arms["local"].figures
    assert local["mean"].value == pytest.approx(2.25)
    assert local["worst"].value == pytest.approx(2.5)
    assert local["p10"].value == pytest.approx(2.45)  # the tenth from the bad end
    assert local["unseen"].value == pytest.approx(2.65)
    assert all(each.low <= each.value <= each.high for each in (local["mean"], local["p10"]))
    assert math.isnan(summary.arms["personal"].forgotten)
    assert summary.to_json()["metric"] == "bits per byte"


def test_fewer_bits_are_better(summary: SuiteSummary) -> None:
    (pair,) = summary.pairs
    assert pair.figures["mean"].value == pytest.approx(-0.5)
    assert summary.standing.best == summary.standing.cheapest == "personal"
    said = "personal has the least mean loss in bits per byte, 1.750 at 0.2 s of CPU a device; no other arm is within"
    assert headline(summary).startswith(said)
    assert "## Bits per byte\n\n| arm | mean | 90th pct. |" in markdown(summary)
    assert '<td data-title="90th pct.">-0.500 <small>(-0.500 to -0.500)</small></td>' in suite_page(summary)
    assert "Accuracy" not in suite_page(summary)


def test_a_target_in_bits_is_reached_from_above(summary: SuiteSummary) -> None:
    reached = summary.arms["personal"].reached
    assert reached is not None
    assert (reached.seeds, reached.rounds, reached.bytes) == (1, 1.0, 10.0)
