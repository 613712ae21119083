"""A scenario file: what is wrong in it is said in one line, and every key is there to be found."""

import tomllib
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.errors import ConfigError
from simulations.data.households import sample_population
from simulations.scenario import Scenario, describe

SHIPPED = sorted(Path(str(files("simulations"))).glob("scenarios/*.toml"))


def read(folder: Path, text: str = "", *overrides: str) -> Scenario:
    path = folder / "scenario.toml"
    path.write_text(text)
    return Scenario.read(path, overrides)


def refused(folder: Path, reason: str, text: str = "", *overrides: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        read(folder, text, *overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_scenario_is_read_and_says_no_more_than_what_differs(path: Path) -> None:
    scenario = Scenario.read(path)
    assert scenario.name == path.stem
    assert tomllib.loads(path.read_text())["name"] == path.stem


def test_the_demos_scenario_is_what_the_project_promises() -> None:
    scenario = Scenario.read(next(path for path in SHIPPED if path.stem == "households"))
    assert scenario.population.households >= 12
    assert len(scenario.population.languages) >= 3
    assert scenario.population.unseen == 0.2
    assert scenario.network.victims >= 1
    assert (scenario.adapter.rank, scenario.adapter.targets) == (8, ("query", "value"))
    assert scenario.federation.aggregation.ring_bits <= 24  # three bytes an element


def test_an_empty_file_is_the_default_scenario(tmp_path: Path) -> None:
    assert read(tmp_path) == Scenario()


def test_a_stored_scenario_is_read_back_the_same(tmp_path: Path) -> None:
    import json

    scenario = read(tmp_path, "", 'population.languages=["en","de"]', "federation.deadline=0.5", "seed=4294967295")
    assert Scenario.parse(json.loads(scenario.model_dump_json()), "x") == scenario


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[federation]\nround = 3", r"unknown key 'federation\.round'; did you mean 'federation\.rounds'\?"),
        ("sed = 3", r"unknown key 'sed'; did you mean 'seed'\?"),
        (
            "[federation.training]\nlearning-rate = 0.1",
            r"unknown key 'federation\.training\.learning-rate'; did you mean 'federation\.training\.learning_rate'",
        ),
        ("[zzz]\nqqq = 1", r"unknown key 'zzz'$"),
        ('seed = "1"', "seed: Input should be a valid integer"),
        ("seed = 1.5", "seed: "),
        ("seed = true", "seed: "),
        ("seed = -1", "seed: Input should be greater than or equal to 0"),
        ("seed = 4294967296", "seed: "),
        ("name = 5", "name: "),
        ('name = "../x"', "name: "),
        ("federation = 1", "federation: "),
        ("[network]\nloss = 0.6", r"network\.loss: Input should be less than or equal to 0\.5"),
        ("[network]\nloss = nan", r"network\.loss: "),
        ("[network]\ndelay = inf", r"network\.delay: "),
        ("[federation]\ndeadline = inf", r"federation\.deadline: "),
        ("[federation.server]\nlearning_rate = nan", r"federation\.server\.learning_rate: "),
        ('[federation.server]\noptimizer = "sgd"', r"federation\.server\.optimizer: "),
        ("[adapter]\ntargets = []", r"adapter\.targets: "),
        ('[adapter]\ntargets = "query"', r"adapter\.targets: "),
        ("[population]\nlanguages = [1]", r"population\.languages"),
        ("[population]\nhouseholds = 2", r"population\.households: "),
        ("[population]\nutterances_min = 70\nutterances_max = 60", "is above utterances_max"),
        ("seed = 2026-01-01", "seed: "),
        ("this is not TOML", "is not TOML"),
        ("seed = 1\nseed = 2", "is not TOML"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_that_names_it(tmp_path: Path, text: str, reason: str) -> None:
    refused(tmp_path, reason, text)
    refused(tmp_path, r"scenario\.toml", text)


def test_a_language_that_does_not_exist_is_refused_by_name(tmp_path: Path) -> None:
    scenario = read(tmp_path, '[population]\nlanguages = ["en", "qx"]')
    with pytest.raises(ConfigError, match="qx") as caught:
        sample_population(scenario.population, scenario.seed)
    assert "\n" not in str(caught.value)


def test_a_missing_file_a_folder_and_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for path, reason in ((tmp_path / "gone.toml", "there is no file"), (tmp_path, "there is no file")):
        with pytest.raises(ConfigError, match=reason):
            Scenario.read(path)
    with pytest.raises(ConfigError, match="is not TOML"):
        Scenario.read(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=7", "seed", 7),
        (" seed = 7 ", "seed", 7),
        ("name=other", "name", "other"),
        ('name="other"', "name", "other"),
        ("federation.rounds=3", "federation.rounds", 3),
        ("federation.training.learning_rate=1e-3", "federation.training.learning_rate", 1e-3),
        ('population.languages=["en","es"]', "population.languages", ("en", "es")),
        ("base.model=/a/path with=signs", "base.model", "/a/path with=signs"),
        ("base.model=", "base.model", ""),
    ],
)
def test_a_key_is_set_from_the_command_line(tmp_path: Path, override: str, key: str, value: Any) -> None:
    found: Any = read(tmp_path, "[federation]\nrounds = 9", override)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value


def test_what_is_set_last_holds_and_leaves_the_rest_of_its_section(tmp_path: Path) -> None:
    found = read(tmp_path, "[federation]\nrounds = 9\ndeadline = 5", "federation.rounds=3", "federation.rounds=4")
    assert (found.federation.rounds, found.federation.deadline) == (4, 5)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("seed", "--set takes KEY=VALUE"),
        ("=7", "--set takes KEY=VALUE"),
        ("federation.=7", "--set takes KEY=VALUE"),
        ("", "--set takes KEY=VALUE"),
        ("seed.x=7", "'seed' is a value, not a table"),
        ("sed=7", "did you mean 'seed'"),
        ("federation.rond=7", r"did you mean 'federation\.rounds'"),
        ("seed=seven", "seed: Input should be a valid integer"),
        ("seed=7\nname = 'x'", "seed: Input should be a valid integer"),
    ],
)
def test_what_cannot_be_set_is_refused(tmp_path: Path, override: str, reason: str) -> None:
    refused(tmp_path, reason, "seed = 1", override)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=20), st.text(max_size=20))
def test_any_override_is_taken_or_refused_in_one_line(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "scenario.toml"
    path.touch()
    try:
        Scenario.read(path, [f"{key}={value}"])
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017


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
