"""A run whose clients find their groups: a first round with noise, then a federation for each group, and a router."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from aggregation.errors import ConfigError
from simulations.engine.groups import DISCOVERY, grouped, spent_on_finding
from simulations.engine.progress import RunProgress
from simulations.engine.provision import registry, training_base
from simulations.plan import Kind, Suite, SuiteSettings, Trial
from simulations.scenario import Scenario
from simulations.suite.run import Plan, RunFolder, federate, prepare
from simulations.suite.store import Store
from simulations.suite.trial import Material, TrialRun
from tests.conftest import LABELS, SAID
from tests.support import refused


def scenario(minilm: Path, folder: Path, clients: int) -> Scenario:
    """Make one of clients that each talk of one thing."""
    rng = np.random.default_rng(0)
    words = {label: sorted({word for text in texts for word in text.split()}) for label, texts in SAID.items()}

    def write(name: str, who: Sequence[str]) -> str:
        with (folder / name).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("text", "label", "client"))
            for place, client in enumerate(who):
                label = LABELS[place % 2]
                rows.writerows((" ".join(rng.choice(words[label], 6)), label, client) for _ in range(20))
        return str(folder / name)

    texts = write("texts.csv", [f"client-{number:03}" for number in range(clients)])
    return Scenario.parse(
        {
            "base": {"model": str(minilm)},
            "data": {"files": [texts], "client": "client", "public": [write("public.csv", ["", ""])]},
            "federation": {
                "rounds": 1,
                "analytic": {"rounds": 1},
                "discovery": {"count": 3},
                "privacy": {"mechanism": "skellam", "noise_multiplier": 0.3},
            },
            "groups": {"by": "discovered", "smallest": 5},
        },
        "test",
    )


def test_clients_find_their_groups_in_one_round_and_a_router_answers_by_them(
    tmp_path: Path, minilm: Path, one_thread: None
) -> None:
    plan = Plan.of(scenario(minilm, tmp_path, 60))
    folder = RunFolder.start(tmp_path / "run", plan.scenario)
    base = training_base(folder.path, plan.scenario, plan.loaded.population)
    with RunProgress(quiet=True) as progress:
        people = prepare(folder, plan.loaded.population, base, progress)
        federate(folder, people, base, progress)
        material = Material(people, base, base, folder.path)
        routed = TrialRun(Trial(Kind.ROUTED, plan.scenario), material, Store(folder.path)).compute(progress, "routed")
        assert prepare(folder, plan.loaded.population, base, progress) == people
    first, second = grouped(people, plan.scenario.groups)
    found = {(each.train[0].label, each.found) for each in people.clients}
    assert found in ({(0, "group-1"), (1, "group-2")}, {(0, "group-2"), (1, "group-1")})
    assert first.devices + second.devices == sum(not client.unseen for client in people.clients)
    (record,) = registry(folder.path / DISCOVERY).rounds()
    assert 0 < record.epsilon < 10
    assert spent_on_finding(folder.path) == (record.epsilon, plan.scenario.federation.privacy.delta)
    spent = max(one.epsilon for group in (first, second) for one in registry(folder.path / group.folder).rounds())
    assert routed.epsilon == spent + record.epsilon
    assert np.mean([client.test.right.count("1") / client.test.count for client in routed.clients]) > 0.9


def test_a_fleet_that_the_noise_hides_has_no_groups(tmp_path: Path, minilm: Path, one_thread: None) -> None:
    plan = Plan.of(scenario(minilm, tmp_path, 8))
    folder = RunFolder.start(tmp_path / "run", plan.scenario)
    base = training_base(folder.path, plan.scenario, plan.loaded.population)
    with RunProgress(quiet=True) as progress, refused(ConfigError, "discovery"):
        prepare(folder, plan.loaded.population, base, progress)


def test_a_router_needs_groups() -> None:
    table = {"name": "x", "scenario": "households.toml", "arms": {"routed": {"kind": "routed"}}}
    with refused(ConfigError, "groups.by"):
        Suite(SuiteSettings.parse(table, "x"), {}, Path()).check()
