"""Simulated devices that lie: what they make of an update, which ones they are, and what others and the report see."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregation.errors import ConfigError
from client.node.app import STATE
from client.node.statedir import DeviceStateDir
from client.training import torchengine
from client.training.examples import Example
from client.training.trainer import ClassifierTrainer
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.methods.parts import PARTS
from edgeadapt.rounds.task import Task
from simulations.engine.devices import LyingApp, LyingTrainer, attackers
from simulations.report.formatting import headline
from simulations.scenario import Scenario
from tests.support import FleetOf
from tests.support.hostile import audit_failures

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = Task(PeftConfig("LORA", 2, 4, ("query", "value")), ("A", "B", "C"), 1, 4, 0.01, 0.0, 0.0, PARTS, PARTS)
EXAMPLES = tuple(Example(text, i % 3) for i, text in enumerate(("turn on the light", "play music", "set a timer")))
DEVICES = [f"device-{number:02d}" for number in range(20)]


@pytest.fixture(scope="module")
def trainer(tiny_base: Any) -> ClassifierTrainer:
    return torchengine.classifier(tiny_base, 3, PeftConfig.lora(2, 4))


def trained(trainer: Any, start: Tensors, examples: tuple[Example, ...] = EXAMPLES) -> Any:
    after = trainer.train(start, examples, TASK, epochs=2, rng=np.random.default_rng(3))
    return trainer.layout.flatten(after).astype(np.float64) - trainer.layout.flatten(start)


def test_each_lie_is_the_update_that_it_is_named_after(trainer: ClassifierTrainer) -> None:
    start = {spec.name: np.full(spec.shape, 0.02, np.float32) for spec in trainer.layout.tensors}
    mirrored = tuple(replace(each, label=2 - each.label) for each in EXAMPLES)
    honest, flipped = trained(trainer, start), trained(trainer, start, mirrored)
    assert np.linalg.norm(honest - flipped) > 0.1 * np.linalg.norm(honest)
    for kind, update in {"sign-flip": -honest, "label-flip": flipped, "boost": 10 * flipped}.items():
        found = trained(LyingTrainer(trainer, kind), start)
        assert np.abs(found - update).max() <= 1e-5 * np.abs(update).max() + 1e-7, kind


def scenario_of(**attack: Any) -> Scenario:
    return Scenario.parse({"seed": 4, "attack": attack}, "test")


def test_so_many_devices_lie_as_the_scenario_says_and_the_same_ones_in_each_run() -> None:
    found = {share: attackers(scenario_of(kind="boost", share=share), DEVICES) for share in (0.01, 0.1, 0.2)}
    assert [len(names) for names in found.values()] == [1, 2, 4]
    assert found[0.2] == attackers(scenario_of(kind="boost", share=0.2), reversed(DEVICES))
    assert found[0.2] != attackers(Scenario.parse({"seed": 5, "attack": {"kind": "boost", "share": 0.2}}, "x"), DEVICES)
    assert attackers(scenario_of(), DEVICES) == frozenset()


@pytest.mark.parametrize(
    "tables",
    [
        {"federation": {"analytic": {"rounds": 1}}},
        {"data": {"files": ["a.csv"], "label": ""}},
        {"attack": {"share": 0.5}},
    ],
)
def test_what_no_attacker_can_take_part_in_is_refused(tables: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Scenario.parse({**tables, "attack": {"kind": "boost", **tables.get("attack", {})}}, "test")


def test_attackers_pass_every_check_and_move_the_adapter_while_the_others_stay_honest(
    app_fleet_of: FleetOf,
) -> None:
    updates = {}
    for kind in ("none", "boost"):
        fleet = app_fleet_of(6, rounds=1, aggregation__keep_masked_inputs=True)
        folder = str(fleet.state_dir("device-03").folder)
        names = frozenset() if kind == "none" else frozenset({folder})
        app = LyingApp(kind, names, lambda context: DeviceStateDir.open(Path(str(context.node_config[STATE]))))
        (record,) = fleet.federate(fleet.grid(app=app))
        assert (record.dropped, record.spoiled, record.version) == ({}, None, 1)
        assert audit_failures(fleet.out / "coordinator") == set()
        before, after = fleet.registry().tensors(0), fleet.registry().tensors(1)
        updates[kind] = np.concatenate([(after[name] - before[name]).ravel() for name in sorted(before)])
    assert np.linalg.norm(updates["boost"] - updates["none"]) > 0.5 * np.linalg.norm(updates["none"])


def test_the_report_says_first_that_devices_lied(make_result: Callable[..., Any]) -> None:
    result = make_result()
    assert "ATTACK" not in headline(result)
    lied = headline(replace(result, attack="sign-flip", attackers=("en-01", "de-02")))
    assert lied.startswith("UNDER ATTACK: 2 devices lied in training (sign-flip). ")
