"""A run of a language model: texts without labels become authors, and each arm is scored in bits per byte."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.errors import ConfigError
from client.training.examples import NO_LABEL
from edgeadapt.bases.base import Base
from simulations.cli.simulate import simulate
from simulations.data import populate
from simulations.engine import provision
from simulations.result import BITS, ClientResult, RunResult
from simulations.scenario import Scenario
from tests.support import refused
from tests.support.exhaustive import few
from tests.support.models import llama, make_lm

__all__ = ["llama", "make_lm"]  # fixtures
pytestmark = pytest.mark.usefixtures("one_thread")


VIRTUAL = ("--set", "adapter.virtual_tokens=3", "--set", "adapter.targets=[]")
METHODS = {
    "lora": (),
    "prompt_tuning": ("--set", "adapter.method=prompt_tuning", *VIRTUAL),
    "prefix_tuning": ("--set", "adapter.method=prefix_tuning", *VIRTUAL),
}


@pytest.fixture
def run(texts: Path, llama: Base, tmp_path: Path) -> Callable[..., Any]:
    def made(*more: str) -> Any:
        settings = {
            "data.files": json.dumps([str(texts)]),
            "data.text": '"words"',
            "data.near_duplicates": "1",
            "base.model": json.dumps(str(llama.folder)),
            "federation.rounds": "2",
            "federation.training.learning_rate": "0.02",
            "personal.learning_rate": "0.01",
            "network.message_loss": "0",
            "network.forced_dropouts": "0",
        }
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        arguments = ["authors.toml", "--out", str(tmp_path / "run"), *options, *more]
        return CliRunner().invoke(simulate, arguments, catch_exceptions=False)

    return made


def test_a_run_scores_every_author_and_goes_on_from_its_folder(run: Callable[..., Any], tmp_path: Path) -> None:
    done = json.loads(run("--json").stdout)
    assert {client["name"] for client in done["clients"]} == {"ann", "bob", "cid", "dee", "eve"}
    assert sum(client["unseen"] for client in done["clients"]) == 1
    assert done["adapter"]["version"] == 2
    for client in done["clients"]:
        assert client["loss"]["personal"] < client["loss"]["base"]
        assert all(0 < loss < 20 for loss in client["loss"].values())
    assert done["loss"]["global"]["mean"] < done["loss"]["base"]["mean"]
    assert json.loads((tmp_path / "run" / "result.json").read_text()) == done
    shown = run("--resume").output
    assert json.loads((tmp_path / "run" / "result.json").read_text())["clients"] == done["clients"]
    assert "bits per byte" in shown
    assert "a pretrained language model" in shown
    assert "head" not in shown


@pytest.mark.parametrize("method", few(METHODS, "prefix_tuning"))
def test_a_run_trains_with_the_graph_of_a_bundle_to_the_same_losses(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    # After a second round, a bit of the first sum that rounding turned has changed the order of all examples.
    once = (*METHODS[method], "--set", "federation.rounds=1")
    theirs = json.loads(run("--json", *once).stdout)
    (tmp_path / "run").rename(tmp_path / "torch")
    monkeypatch.setattr("client.training.torchengine.TorchEngine.__init__", lambda *_: pytest.fail("torch trained"))
    graph = ("--set", "base.engine=onnx", "--set", "export.profile=fp32")
    ours = json.loads(run("--json", *once, *graph).stdout)
    for one, other in zip(ours["clients"], theirs["clients"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.002)


def test_a_run_whose_method_needs_torch_is_refused_before_an_export(run: Callable[..., Any], tmp_path: Path) -> None:
    with refused(ConfigError, "task.peft_config"):
        run("--set", "base.engine=onnx", "--set", "adapter.bias=lora_only")
    assert not provision.bundle_of(tmp_path / "run").exists()


def test_a_run_without_texts_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "data.files"):
        CliRunner().invoke(simulate, ["authors.toml", "--out", str(tmp_path / "run")], catch_exceptions=False)


def test_texts_without_labels_have_prompts_if_a_column_is_named(texts: Path) -> None:
    table = {"files": [str(texts)], "text": "words", "label": "", "client": "author", "prompt": "asked"}
    scenario = Scenario.parse({"name": "t", "data": {**table, "near_duplicates": 1}}, "test")
    population = populate(scenario.data, scenario.population, 0).population
    assert population.labels == ()
    found = [example for client in population.clients for example in provision.examples_of(client)]
    assert {(example.label, example.prompt) for example in found} == {(NO_LABEL, "ab")}


def test_a_prompt_with_a_label_is_refused() -> None:
    with refused(ConfigError, "data"):
        Scenario.parse({"name": "t", "data": {"files": ["x.csv"], "prompt": "asked"}}, "test")


def test_a_summary_is_of_the_authors_that_took_part(make_result: Callable[..., RunResult]) -> None:
    def summary(*authors: tuple[float, bool]) -> dict[str, float]:
        clients = (ClientResult("a", "", unseen, 1, 1, {"base": loss}, "base") for loss, unseen in authors)
        return replace(make_result(), metric=BITS.name, clients=tuple(clients)).summary("base")

    assert summary((1.0, False), (2.0, False), (9.0, True)) == {
        "mean": 1.5,
        "p10": pytest.approx(1.9),
        "worst": 2.0,
        "unseen": 9.0,
    }
    assert math.isnan(summary((1.0, False))["unseen"])
