"""The fleet of a run moves to the base of another scenario; an interrupted one goes on in the same folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from aggregation.errors import ConfigError
from edgeadapt.bases.base import Base
from simulations.engine.progress import RunProgress
from simulations.engine.provision import registry, training_base
from simulations.scenario import Scenario
from simulations.suite.run import Plan, RunFolder, federate, migrate_run, prepare
from tests.support import refused
from tests.support.trial import call

HOUSEHOLDS = {"households": 9, "languages": ["en"], "public_phrases": 1}
FEDERATION = {"rounds": 1, "training": {"learning_rate": 0.01}}


@pytest.fixture
def run(tmp_path: Path, minilm: Path, one_thread: None) -> RunFolder:
    """A run of one round on a tiny base."""
    table = {"name": "old", "base": {"model": str(minilm)}, "network": {"message_loss": 0.0}}
    scenario = Scenario.parse(table | {"population": HOUSEHOLDS, "federation": FEDERATION}, "test")
    plan = Plan.of(scenario)
    folder, population = RunFolder.start(tmp_path / "run", scenario), plan.loaded.population
    base = training_base(folder.path, scenario, population)
    with RunProgress(quiet=True) as progress:
        prepare(folder, population, base, progress)
        federate(folder, population, base, progress)
    return folder


def test_an_interrupted_migration_of_a_run_goes_on(
    run: RunFolder,
    tmp_path: Path,
    minilm: Path,
    make_base: Callable[..., Base],
    capsys: pytest.CaptureFixture[str],
) -> None:
    following = make_base(tmp_path / "next", 7, Tokenizer.from_file(str(minilm / "tokenizer.json")), 512)
    to = tmp_path / "next.toml"
    to.write_text(f'name = "next"\n[base]\nmodel = "{following.folder}"\n[adapter]\nrank = 4\n')
    seen: list[Any] = []

    def stopped(each: Any) -> None:
        seen.append(each.step)
        if len(seen) == 2:
            raise KeyboardInterrupt

    scenario = Scenario.read(to)
    with pytest.raises(KeyboardInterrupt):
        migrate_run(run, scenario, 1, 1.0, stopped)
    capsys.readouterr()
    call("simulate", "migrate", run.path, to, "--rounds", 1, "--margin", 1, "--json")
    row = json.loads(capsys.readouterr().out)
    assert [*seen, *(each["step"] for each in row["rounds"])] == ["before", "head", "training", "after"]
    assert registry(run.path).version(row["version"]).manifest.base_digest == following.digest
    assert (row["worse"], row["old"]) == (False, 2)


def test_a_run_in_groups_is_refused(run: RunFolder) -> None:
    table = {"name": "old", "groups": {"by": "language"}}
    with refused(ConfigError, "groups.by"):
        migrate_run(RunFolder(run.path, Scenario.parse(table, "test")), run.scenario, 1, 1.0, lambda each: None)
