"""A run whose devices train with the graph of a bundle instead of torch."""

from pathlib import Path
from typing import Any

import pytest

from adapters.base import Base
from adapters.bundle import BASE_MANIFEST, TRAINING, VerifiedBase
from aggregation.errors import ConfigError
from client.training.graphtrainer import GraphTrainer
from client.training.trainer import Trainer
from simulations.engine.provision import Enrolment, bundle_of, device_base, peft_config
from simulations.scenario import Scenario
from tests.support.errors import refused


def with_engine(scenario: Scenario, engine: str = "onnx", **export: Any) -> Scenario:
    base = scenario.base.model_copy(update={"engine": engine})
    return scenario.model_copy(update={"base": base, "export": scenario.export.model_copy(update=export)})


def test_torch_trains_on_the_base_itself(fleet_of: Any, tmp_path: Path) -> None:
    fleet = fleet_of(3)
    assert device_base(tmp_path, fleet.scenario, fleet.base, fleet.population) is fleet.base


@pytest.mark.usefixtures("one_thread")
def test_a_bundle_is_made_once_and_named_to_the_devices(fleet_of: Any) -> None:
    fleet = fleet_of(4)
    scenario = with_engine(fleet.scenario)
    base = device_base(fleet.out, scenario, fleet.base, fleet.population)
    assert isinstance(base, VerifiedBase)
    assert base.digest == fleet.base.digest
    assert TRAINING in base.manifest.files
    written = (bundle_of(fleet.out) / BASE_MANIFEST).stat().st_mtime_ns
    device_base(fleet.out, scenario, fleet.base, fleet.population)
    assert (bundle_of(fleet.out) / BASE_MANIFEST).stat().st_mtime_ns == written
    assert Enrolment.of(fleet.out, scenario, fleet.population, fleet.base).settings.base == str(bundle_of(fleet.out))


def test_a_method_that_needs_torch_is_refused_before_the_rounds(fleet_of: Any, tmp_path: Path, tiny_base: Base) -> None:
    fleet = fleet_of(3, adapter={"bias": "lora_only"})
    with refused(ConfigError, "task.peft_config"):
        device_base(tmp_path, with_engine(fleet.scenario), fleet.base, fleet.population)


@pytest.mark.parametrize("method", ["dora", "ia3", "ln_tuning", "beft", "loha"])
def test_a_bundle_has_the_slots_of_the_method(fleet_of: Any, tmp_path: Path, method: str) -> None:
    fleet = fleet_of(3, adapter={"method": method, "rank": 4})
    base = device_base(tmp_path, with_engine(fleet.scenario), fleet.base, fleet.population)
    config, labels = peft_config(fleet.scenario, fleet.base), len(fleet.population.labels)
    ours, theirs = GraphTrainer(base, labels, config), Trainer(fleet.base, labels, config)
    assert ours.layout == theirs.layout
