"""The page on extensions: its package is installed, and its rule and its step are used as a reader would."""

import re
import sys
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from aggregation.errors import ConfigError, DataError
from client.training.engine import classifier_trainer
from client.training.examples import read_examples
from client.training.personal import METHODS, Candidate, Choice, PersonalStep, personalize
from edgeadapt.audit.findings import Check, Status
from edgeadapt.audit.transcripts import AuditInput, AuditOptions
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.manifest import ServerRule
from edgeadapt.rounds import optimizer
from edgeadapt.rounds.optimizer import OPTIMIZERS
from simulations.scenario import Scenario
from tests.support import refused

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
    for table in (OPTIMIZERS, METHODS):
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
    mine: None, fleet_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
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


def test_a_name_of_a_package_is_valid_in_a_scenario_and_an_unknown_one_lists_the_known(mine: None) -> None:
    own = {"personal": {"method": "careful"}, "federation": {"server": {"optimizer": "nesterov"}}}
    assert Scenario.parse(own, "mine").federation.server.rule() == OPTIMIZERS.find("nesterov")()
    with refused(ConfigError, "personal.method") as caught:
        Scenario.parse({"personal": {"method": "careless"}}, "mine")
    assert "take one of fine-tune, ridge, ensemble, interpolate, careful, or install it" in str(caught.value)


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
