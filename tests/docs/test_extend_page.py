"""The page on extensions: its package is installed, and its rule and its step are used as a reader would."""

import json
import re
import runpy
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError
from client.training.engine import OwnTrainer, classifier_trainer, open_trainer
from client.training.examples import Example, read_examples
from client.training.personal import METHODS, Candidate, Choice, PersonalStep, personalize
from edgeadapt.auditing.findings import Check, Status
from edgeadapt.auditing.transcripts import AuditInput, AuditOptions
from edgeadapt.bases.base import MODELS, OwnModel, find_base, with_task
from edgeadapt.bases.tasks import TASKS
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import ServerRule
from edgeadapt.formats.peftconfig import OWN, PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.optimizer import OPTIMIZERS
from edgeadapt.rounds.task import Task
from simulations.engine import provision
from simulations.scenario import Scenario
from tests.support import FleetOf, Run, refused

PAGE = (Path(__file__).parents[2] / "docs/how-to/extend.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, groups: Mapping[str, Mapping[str, str]], code: str) -> None:
    """Install a package of one module, ``mine``, as pip does."""
    info = folder / "mine-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    rows = (
        (f"[{group}]", *(f"{name} = {value}" for name, value in points.items())) for group, points in groups.items()
    )
    (info / "entry_points.txt").write_text("\n".join(line for lines in rows for line in lines))
    (folder / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "mine", raising=False)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    for table in (OPTIMIZERS, METHODS, MODELS, TASKS):
        monkeypatch.setattr(table, "_known", dict(table._known))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package of the page is installed."""
    groups = tomllib.loads(blocks("toml")[0])["project"]["entry-points"]
    code = "\n\n".join(block for block in blocks("python") if block.startswith("# mine.py"))
    install(tmp_path / "site", monkeypatch, groups, code)


def audited(fleet: Any) -> list[tuple[Status, str]]:
    """What an auditor finds of the adapters of each session."""
    reports = AuditInput.open(fleet.out / "coordinator", AuditOptions()).audit(unfinished=False)
    findings = (finding for report in reports.values() for finding in report.findings)
    return [(finding.status, finding.text) for finding in findings if finding.check is Check.ADAPTERS]


def test_the_rule_moves_the_adapter_and_is_audited_and_the_step_makes_it_personal(
    mine: None, fleet_of: FleetOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"server__optimizer": "nesterov", "server__numbers": {"momentum": 0.5}}
    fleet = fleet_of(4, rounds=2, aggregation__keep_masked_inputs=True, **rule)
    fleet.federate(fleet.grid())
    registry = fleet.registry()
    first, second = (registry.version(number).manifest for number in (1, 2))
    assert first.rule == second.rule == ServerRule("Nesterov", {"learning_rate": 1.0, "momentum": 0.5})
    assert registry.optimizer_state().keys() == {"velocity"}
    ((status, text),) = audited(fleet)
    assert status is Status.PASS
    assert "2 of 2 recomputed from the sums, equal bit for bit (Nesterov(learning_rate=1.0, momentum=0.5))" in text

    trainer = classifier_trainer(fleet.base, len(second.labels), second.peft_config)
    shared, task = registry.tensors(2), Scenario().federation.task(second)
    examples = read_examples(fleet.state_dir("device-00").examples, len(second.labels))
    how = PersonalStep(5, 16.0, "careful", choice=Choice.NEVER)
    own = personalize(trainer, {Candidate.GLOBAL: shared}, examples, task, how, rng=np.random.default_rng(1)).adapter
    far = max(float(np.abs(own[name] - shared[name]).max()) for name in shared)
    assert 0 < far <= np.float32(0.05) * 1.001

    monkeypatch.undo()  # the package is not installed any more
    OPTIMIZERS._known.pop("nesterov", None)
    ((status, text),) = audited(fleet)
    assert status is Status.FAIL
    assert (
        "there is no server optimizer 'nesterov': take one of fedavg, fedavgm, fedadam, fedyogi, or install it" in text
    )


def test_the_model_with_its_loop_learns_in_rounds_of_masked_updates_with_the_own_rule_and_step(
    mine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    said = {
        "bill": ("pay my bill", "invoice is wrong"),
        "line": ("no network", "line is dead"),
        "app": ("app stops", "cannot log in"),
    }
    ends = ("please", "again", "today", "since monday", "help")
    rows = [
        f"{text} {end} {name},{label},{name}"
        for name in ("ann", "bob", "cid", "dee", "eve")
        for label, texts in said.items()
        for text in texts
        for end in ends
    ]
    (tmp_path / "tickets.csv").write_text("\n".join(["text,label,customer", *rows]))
    monkeypatch.chdir(tmp_path)
    program = next(block for block in blocks("python") if "edgeadapt.simulate(" in block)
    quick = '"tickets.csv", quiet=True, federation__rounds=2, network__forced_dropouts=0, network__message_loss=0.0,'
    Path("program.py").write_text(program.replace('"tickets.csv",', quick))
    run = runpy.run_path("program.py")["run"]
    assert run.accuracy["global"]["unseen"] > run.accuracy["base"]["unseen"] + 0.3
    registry = provision.registry(run.path)
    second = registry.version(2).manifest
    assert second.rule == ServerRule("Nesterov", {"learning_rate": 1.0, "momentum": 0.2})
    assert len(second.survivors) >= 3
    assert registry.tensors(2)["weight"].shape == (3, 4096)


def test_its_parameters_are_published_and_a_machine_without_it_refuses(
    mine: None,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tiny_base: Any,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("labels.txt").write_text("off\non\n")
    for line in ("authority init trust --unencrypted", "coordinator init fleet --authority trust/authority.pem"):
        assert run(*line.split())[0] == 0
    code, out, _ = run("coordinator", "publish", "fleet", "--base", "words", "--labels", "labels.txt", "--json")
    assert code == 0
    base = find_base("words")
    assert json.loads(out)["base_digest"] == base.digest

    task = ("--base", "words", "--labels", "labels.txt", "--task", "multilabel", "--json")
    settings = ("--authority", "trust/authority.pem", "--set", "analytic.rounds=1")
    assert run("coordinator", "init", "other", *settings)[0] == 0
    code, _, err = run("coordinator", "publish", "other", *task)
    assert (code, "set analytic.rounds to 0" in err) == (2, True)
    assert run("coordinator", "init", "third", *settings[:2])[0] == 0
    code, out, _ = run("coordinator", "publish", "third", *task)
    assert json.loads(out)["base_digest"] == with_task(base, "multilabel").digest
    monkeypatch.setattr(MODELS.find("words"), "version", 2)
    assert find_base("words").digest != base.digest

    for other, config in ((base, PeftConfig.lora()), (tiny_base, PeftConfig(OWN, 0, 0, ()))):
        with refused(ConfigError, "task.peft_config"):
            open_trainer(other, 2, config)
    monkeypatch.undo()
    MODELS._known.pop("words", None)
    with refused(ConfigError, "base", value="words"):
        find_base("words")


SAID = {"light": "turn the lamp on", "music": "play a song", "timer": "wake me in ten minutes"}
ENDS = ("kitchen", "next", "start", "stop", "bright", "switch", "off")
STARS = {"light": "1", "music": "3", "timer": "4.5"}
QUICK = """{file!r}, quiet=True, base__model={base!r}, federation__rounds=2, evaluation__clients=2,
    federation__training__learning_rate=0.02, personal__learning_rate=0.02, personal__epochs=10,
    federation__aggregation__keep_masked_inputs=True, network__forced_dropouts=0, network__message_loss=0.0,
    data__near_duplicates=1.0,"""


def rows_of(label: Callable[[str, str], str]) -> str:
    """A table of five customers: texts of one topic and of two, with what ``label`` makes of these."""
    pairs = [(one, other) for one in SAID for other in SAID if one <= other]
    texts = {pair: " and ".join(SAID[topic] for topic in sorted({*pair})) for pair in pairs}
    rows = [
        f"{texts[pair]} {end} {name},{label(*pair)},{name}"
        for name in ("ann", "bob", "cid", "dee", "eve")
        for pair in pairs
        for end in ENDS
    ]
    return "\n".join(["text,label,customer", *rows])


@pytest.mark.parametrize("task", ["multilabel", "stars"])
def test_a_task_is_learned_in_audited_sums_and_scored_by_its_metric(
    mine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Any, one_thread: None, task: str
) -> None:
    labels: dict[str, Callable[[str, str], str]] = {
        "multilabel": lambda one, other: "+".join(sorted({one, other})),
        "stars": lambda one, other: STARS[max(one, other)],
    }
    (tmp_path / "stars.csv").write_text(rows_of(labels[task]))
    monkeypatch.chdir(tmp_path)
    program = next(block for block in blocks("python") if "edgeadapt.simulate(" in block and "data__task" in block)
    program = program.replace('"stars.csv",', QUICK.format(file="stars.csv", base=str(tiny_base.folder)))
    program = program.replace("data__task=Stars", f"data__task={task!r}").replace(
        "client=", 'engine="protocol", client=', 1
    )
    Path("program.py").write_text(program)
    run = runpy.run_path("program.py")["run"]
    assert run.result.metric == {"multilabel": "overlap of labels", "stars": "within half a star"}[task]
    assert run.accuracy["personal"]["mean"] > run.accuracy["base"]["mean"] + 0.15
    assert run.result.to_json()["score"].keys() == {"base", "local", "global", "personal"}
    assert str(run).startswith(run.result.metric)
    ((status, text),) = audited(SimpleNamespace(out=run.path))
    assert (status, "2 of 2 recomputed from the sums" in text) == (Status.PASS, True), text
    (answer,) = run.answer(["play a song kitchen"], client=run.clients[0].name)
    assert answer == ["music"] if task == "multilabel" else abs(answer - 3) <= 0.5


CLASSES: dict[str, dict[str, Any]] = {
    "base.engine=torch": {"base": {"engine": "onnx"}},
    "federation.analytic.rounds=0": {"federation": {"analytic": {"rounds": 1}}},
    "personal.method=fine-tune": {"personal": {"method": "ridge"}},
    "attack.kind=none": {"attack": {"kind": "boost"}},
}


@pytest.mark.parametrize("key", CLASSES)
def test_what_counts_classes_is_refused_in_a_task_with_the_key_to_set(mine: None, tiny_base: Any, key: str) -> None:
    known: dict[str, dict[str, Any]] = {
        "data": {"files": ["stars.csv"], "task": "stars"},
        "base": {"model": str(tiny_base.folder)},
        "federation": {"analytic": {"rounds": 0}},
        "personal": {"method": "fine-tune"},
    }
    provision.uncentered_base(Scenario.parse(known, "mine"))
    odd = known | {table: known.get(table, {}) | keys for table, keys in CLASSES[key].items()}
    with refused(ConfigError, key.partition("=")[0]) as caught:
        provision.uncentered_base(Scenario.parse(odd, "mine"))
    assert str(caught.value).endswith(f": set {key}")


@pytest.mark.parametrize(
    ("after", "about"),
    [({"w": np.ones(2, np.float32)}, "w"), ({"w": np.full(3, np.inf, np.float32)}, "w"), ({}, "w")],
    ids=["shape", "number", "name"],
)
def test_a_loop_that_returns_other_arrays_than_it_got_is_refused(after: Tensors, about: str) -> None:
    model = SimpleNamespace(parameters=lambda: {"w": np.zeros(3, np.float32)}, train=lambda *given: after)
    trainer = OwnTrainer(OwnModel(Path("odd"), "0" * 64, lambda labels: model), 2)  # type: ignore[arg-type,return-value]
    task = Task(PeftConfig(OWN, 0, 0, ()), ("off", "on"), 1, 4, 0.01, 0.0, 0.0, PARTS, PARTS)
    with refused(DataError, about):
        trainer.train(trainer.base.first(2), [Example("on", 1)], task, epochs=1, rng=np.random.default_rng(1))


def test_a_name_of_a_package_is_valid_in_a_scenario_and_an_unknown_one_lists_the_known(mine: None) -> None:
    own = {"personal": {"method": "careful"}, "federation": {"server": {"optimizer": "nesterov"}}}
    assert Scenario.parse(own, "mine").federation.server.rule() == OPTIMIZERS.find("nesterov")()
    odd = {"federation": {"server": {"optimizer": "nesterov", "numbers": {"speed": 1.0}}}}
    with refused(ConfigError, "federation.server") as caught:
        Scenario.parse(odd, "mine")
    assert "server optimizer 'nesterov' has the numbers learning_rate, momentum" in str(caught.value)
    with refused(ConfigError, "personal.method") as caught:
        Scenario.parse({"personal": {"method": "careless"}}, "mine")
    assert "take one of fine-tune, ridge, logistic, ensemble, interpolate, careful, or install it" in str(caught.value)


RULE = "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass Rule:\n    rate: float = 1.0\n"
START = "    def start(self, size): return {}\n"


@pytest.mark.parametrize(
    ("name", "code", "kind", "about"),
    [
        ("rule", "import nothing_of_this_name", ConfigError, "rule"),
        ("rule", RULE, ConfigError, "rule"),  # has no step
        ("other", f"{RULE}{START}    def step(self, state, x, mean): return state, x", ConfigError, "rule"),
        ("rule", f"{RULE}{START}    def step(self, state, x, mean): return state, x / 0", DataError, "update"),
        ("rule", f"{RULE}{START}    def step(self, state, x, mean): return state, x[1:]", DataError, "shape"),
        ("rule", f"{RULE}{START}    def step(self, state, x, mean): return {{'v': x}}, x", ConfigError, "state"),
    ],
    ids=["import", "method", "name", "number", "shape", "state"],
)
def test_a_rule_that_cannot_be_used_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, kind: type[Any], about: str
) -> None:
    install(tmp_path / "site", monkeypatch, {OPTIMIZERS.group: {name: "mine:Rule"}}, code)
    ones = np.ones(3, np.float32)
    with refused(kind, about):
        rule = OPTIMIZERS.find(name)()
        optimizer.step(rule, optimizer.start(rule, 3), ones, ones)


def test_two_packages_with_one_name_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mine: None) -> None:
    install(tmp_path / "second", monkeypatch, {METHODS.group: {"careful": "other:careful"}}, "")
    with refused(ConfigError, "method"):
        METHODS.find("careful")


@pytest.mark.parametrize("bad", ["nan", "short", "fails"])
def test_what_a_step_returns_must_fit_the_adapter(bad: str) -> None:
    start = {"classifier.weight": np.ones((2, 3), np.float32)}
    made: dict[str, Callable[[Any], Tensors]] = {
        "nan": lambda inputs: {"classifier.weight": np.full((2, 3), np.nan, np.float32)},
        "short": lambda inputs: {},
        "fails": lambda inputs: inputs.nothing,
    }
    how = PersonalStep(1, 16.0, METHODS.add(bad, made[bad]))
    nothing: Any = SimpleNamespace(train=print)
    with refused(DataError, "method"):
        personalize(nothing, {Candidate.GLOBAL: start}, (), nothing, how, rng=np.random.default_rng(1))
