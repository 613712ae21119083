"""A task of others: what it returns is checked, an error quotes no label, and the base's digest names it."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError
from client.node import training
from client.node.statedir import DeviceSettings, DeviceStateDir
from client.training.engine import OwnTrainer
from client.training.examples import Example
from edgeadapt.bases.base import OwnModel, with_task
from edgeadapt.bases.tasks import TASKS, MultiLabel, OwnTask, check_task, find_task
from edgeadapt.rounds.analytic import AnalyticTask
from tests.support import refused


class Even:
    """Whether a number of words is even."""

    version = 1
    metric = "share of right parities"

    def outputs(self, labels: Any) -> Any:
        return ["even"]

    def target(self, label: str, outputs: Any) -> Any:
        return [float(int(label) % 2 == 0)]

    def loss(self, outputs: Any, targets: Any) -> Any:
        return (outputs - targets).square().mean(1)

    def score(self, outputs: Any, targets: Any) -> Any:
        return ((outputs > 0.5) == targets).all(1)

    def answer(self, outputs: Any, names: Any) -> Any:
        return bool(outputs[0] > 0.5)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TASKS, "_known", {**TASKS._known, "even": Even})


ODD: dict[str, dict[str, Callable[..., Any]]] = {
    "outputs": {"none": lambda self, labels: [], "twice": lambda self, labels: ["a", "a"], "empty": lambda *_: [""]},
    "target": {"text": lambda *_: ["a"], "nan": lambda *_: [np.nan], "number": lambda *_: 1.0, "none": lambda *_: []},
    "loss": {"mean": lambda self, outputs, targets: (outputs - targets).square().mean(), "number": lambda *_: 1.0},
    "score": {"two": lambda self, outputs, targets: outputs * 2, "over": lambda *_: np.array([2.0, 0.0])},
}


@pytest.mark.parametrize(("method", "name"), [(method, name) for method, odd in ODD.items() for name in odd])
def test_what_a_task_returns_is_checked(method: str, name: str) -> None:
    task = OwnTask("odd", type("Odd", (Even,), {method: ODD[method][name]}))
    ones = np.ones((2, 1))
    given = {"outputs": (["1"],), "target": ("1", ["even"]), "loss": (ones, ones), "score": (ones, ones)}[method]
    with refused(DataError, "data.task", value=method):
        getattr(task, "losses" if method == "loss" else method)(*given)


def test_a_failure_names_its_place_and_not_the_label_and_a_wrong_label_is_the_tasks_own_error() -> None:
    def failing(self: Even, label: str, outputs: Any) -> Any:
        raise KeyError(label)

    with refused(DataError, "data.task") as caught:
        OwnTask("odd", type("Odd", (Even,), {"target": failing})).target("4711", ["even"])
    assert "4711" not in str(caught.value)
    assert f"KeyError in line {failing.__code__.co_firstlineno + 1} of {__file__}" in str(caught.value)
    with pytest.raises(ValueError, match="4711x"):
        OwnTask("even", Even).target("4711x", ["even"])


@pytest.mark.parametrize("missing", ["outputs", "target", "loss", "score", "answer", "metric"])
def test_a_task_that_lacks_something_is_refused(missing: str) -> None:
    with refused(ConfigError, "data.task"):
        check_task("odd", type("Odd", (Even,), {missing: None}))


def test_the_digest_of_a_base_names_the_task_and_its_version(
    tiny_base: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    assert with_task(tiny_base, "classification") is tiny_base
    first = with_task(tiny_base, "even")
    device = DeviceStateDir(tmp_path, DeviceSettings(base=str(tiny_base.folder), task="even"))
    assert device.base() == first != tiny_base
    with refused(ConfigError, "data.task", value="odd"):
        with_task(tiny_base, "odd")
    monkeypatch.setattr(Even, "version", 2)
    assert len({tiny_base.digest, first.digest, with_task(tiny_base, "even").digest}) == 3


def test_a_device_reads_labels_by_its_task_and_refuses_rounds_that_count_classes(tiny_base: Any) -> None:
    base, training_round = with_task(tiny_base, "even"), SimpleNamespace(labels=("even",), NEEDS_LABELS=False)
    target: Any = training._target_of(base, training_round)  # type: ignore[arg-type]
    assert target("3") == (0.0,)
    assert training._target_of(tiny_base, training_round) is None  # type: ignore[arg-type]
    analytic = SimpleNamespace(labels=("even",), NEEDS_LABELS=AnalyticTask.NEEDS_LABELS)
    with refused(ConfigError, "task.labels"):
        training._target_of(base, analytic)  # type: ignore[arg-type]


def test_a_model_of_others_is_scored_by_a_task_of_others(tiny_base: Any) -> None:
    model = SimpleNamespace(
        parameters=lambda: {"w": np.zeros(1, np.float32)},
        logits=lambda parameters, texts: np.array([[len(text) % 2 == 0] for text in texts], np.float32),
    )
    own = OwnModel(tiny_base.folder, "0" * 64, lambda labels: model)  # type: ignore[arg-type,return-value]
    trainer = OwnTrainer(with_task(own, "even"), 1)  # type: ignore[arg-type]
    examples = [Example("ab", target=(1.0,)), Example("abc", target=(0.0,)), Example("a", target=(1.0,))]
    score = trainer.score({}, examples)
    assert (score.correct, score.count, score.loss) == (2, 3, 1.0)


def test_a_text_may_have_any_number_of_labels() -> None:
    task = find_task("multilabel")
    names = task.outputs(["wifi+bill", '["bill", "phone line"]', "[]", "[broken"])
    assert names == ("bill", "phone line", "wifi")
    targets = np.array([task.target(label, names) for label in ("wifi + bill", '["phone line"]', "[]", "[]")])
    assert targets.tolist() == [[1, 0, 1], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    outputs = np.array([[2.0, -1, -1], [-1, 3, -1], [-1, -1, -1], [1, -1, -1]])
    assert task.score(outputs, targets).tolist() == [0.5, 1, 1, 0]
    assert task.answer(outputs[0], names) == ["bill"]
    assert task.losses(outputs[:1], targets[:1])[0] == pytest.approx((np.log1p(np.exp([-2, -1, 1]))).mean())


@pytest.mark.parametrize("label", ["wifi+tv", '["tv"]', "[broken", "[5]", '[""]', "[" * 100_000])
def test_a_label_that_is_none_of_several_is_refused(label: str) -> None:
    with pytest.raises(ValueError, match="label"):
        MultiLabel().target(label, ["bill", "wifi"])
