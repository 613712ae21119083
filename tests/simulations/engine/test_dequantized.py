"""Training on the base as the export profile rounds it."""

from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError
from simulations.engine import provision
from simulations.engine.provision import DEQUANTIZED, training_base
from simulations.scenario import Scenario
from tests.support import refused


def scenario(base: Any, **export: Any) -> Scenario:
    settings = {"name": "tiny", "base": {"model": str(base.folder)}, "adapter": {"rank": 2}, "export": export}
    return Scenario.parse(settings, "tiny")


def test_without_train_on_dequantized_the_base_is_the_scenarios_own(
    tiny_base: Any, tmp_path: Path, fleet_of: Any
) -> None:
    chosen = scenario(tiny_base, profile="native-int4")
    assert training_base(tmp_path / "run", chosen, fleet_of(4).population) == tiny_base
    assert not (tmp_path / "run" / DEQUANTIZED).exists()


def test_the_dequantized_base_is_made_once_and_every_device_finds_it(
    tiny_base: Any, tmp_path: Path, fleet_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = scenario(tiny_base, profile="native-int4", train_on_dequantized=True)
    population = fleet_of(4).population
    base = training_base(tmp_path / "run", chosen, population)
    assert base.folder == tmp_path / "run" / DEQUANTIZED
    assert base.digest != tiny_base.digest
    monkeypatch.setattr("simulations.engine.provision.dequantized", None)  # a second call would fail
    assert training_base(tmp_path / "run", chosen, population) == base
    provision.provision(tmp_path / "fleet", chosen, population, base)
    provision.Enrolment.of(tmp_path / "fleet", chosen, population, base).enrol(
        client.name for client in population.clients
    )
    assert {
        state_dir.settings.base for state_dir in provision.open_state_dirs(tmp_path / "fleet", population).values()
    } == {str(base.folder)}
    seed = provision.registry(tmp_path / "fleet").version(0)
    assert seed.manifest.base_digest == base.digest


def test_train_on_dequantized_is_refused_with_a_profile_that_does_not_quantize(tiny_base: Any) -> None:
    with refused(ConfigError, "export"):
        scenario(tiny_base, profile="fp32", train_on_dequantized=True)
