"""A scenario file: an error is one line that names the key, and every key is documented."""

import json
import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from aggregation.errors import ConfigError
from simulations.data.households import sample_population
from simulations.scenario import Scenario, describe, read_scenario
from tests.support import refused

SHIPPED = sorted(Path(str(files("simulations"))).glob("scenarios/*.toml"))


def read(folder: Path, text: str = "", *overrides: str) -> Scenario:
    path = folder / "scenario.toml"
    path.write_text(text)
    return Scenario.read(path, overrides)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_scenario_is_valid_and_named_like_its_file(path: Path) -> None:
    scenario = Scenario.read(path)
    assert scenario.name == path.stem
    assert tomllib.loads(path.read_text())["name"] == path.stem


def test_an_empty_file_is_the_default_scenario(tmp_path: Path) -> None:
    assert read(tmp_path) == Scenario()


def test_a_stored_scenario_is_read_back_the_same(tmp_path: Path) -> None:

    scenario = read(tmp_path, "", 'population.languages=["en","de"]', "federation.deadline=0.5", "seed=4294967295")
    assert Scenario.parse(json.loads(scenario.model_dump_json()), "x") == scenario


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("[federation.training]\nlearning-rate = 0.1", "federation.training.learning-rate"),
        ('seed = "1"', "seed"),
        ('name = "../x"', "name"),
        ("federation = 1", "federation"),
        ("[network]\nmean_delay = inf", "network.mean_delay"),
        ('[adapter]\nmethod = "lokr"', "adapter.method"),
        ("[population]\nlanguages = [1]", "population.languages.0"),
        ("[population]\nutterances_min = 70\nutterances_max = 60", "population"),
        ('[federation.evaluation]\nevery = 1\nreleases = "r"\nchannel = "c"', ""),
        ("this is not TOML", "scenario.toml"),
    ],
)
def test_a_wrong_key_or_value_is_refused_in_one_line_that_names_the_file(tmp_path: Path, text: str, key: str) -> None:
    with refused(ConfigError, key) as error:
        read(tmp_path, text)
    assert str(tmp_path / "scenario.toml") in str(error.value)
    assert key in str(error.value)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        ("federation.training.learning_rate=1e-3", "federation.training.learning_rate", 1e-3),
        ('population.languages=["en","es"]', "population.languages", ("en", "es")),
        ("base.model=/a/path with=signs", "base.model", "/a/path with=signs"),
    ],
)
def test_a_key_is_set_from_the_command_line(tmp_path: Path, override: str, key: str, value: Any) -> None:
    found: Any = read(tmp_path, "[federation]\nrounds = 9", override)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_every_key_is_described_with_its_default() -> None:
    lines = list(describe())
    assert len(lines) > 30
    for line in lines:
        setting, _, meaning = line.partition("  # ")
        assert meaning not in ("", "None"), line
        key, _, default = setting.partition(" = ")
        assert tomllib.loads(f"x = {default}"), line
        assert "." in key or key in ("name", "seed")


def test_the_described_defaults_make_the_default_scenario(tmp_path: Path) -> None:
    overrides = [line.partition("  # ")[0].replace(" = ", "=", 1) for line in describe()]
    assert read(tmp_path, "", *overrides) == Scenario()


def test_one_setting_gives_households_public_phrases_and_vocabulary_their_languages() -> None:
    nine = ("de", "en", "es", "fr", "it", "nl", "pl", "pt", "sv")
    for named, codes in ((["all"], nine), (["es", "de"], ("es", "de"))):
        scenario = read_scenario(Path("multilingual.toml"), [f"population.languages={json.dumps(named)}"])
        population = sample_population(scenario.population, 0)
        assert {client.language for client in population.clients} == set(codes)
        assert scenario.population.published == scenario.kept_languages == codes
        assert len(population.labels) > 10
    own = read_scenario(Path("multilingual.toml"), ['data.files=["texts.csv"]'])
    assert own.kept_languages == ()  # whatever languages they are in
    with refused(ConfigError, "population"):
        read_scenario(Path("multilingual.toml"), ['population.languages=["all"]', "population.households=8"])
