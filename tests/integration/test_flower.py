"""The ServerApp and the ClientApp on Flower's own runtime: a SuperLink with TLS and four authenticated SuperNodes.

The devices run the installed package; the bundle of the coordinator only names the two apps (docs/how-to/flower.md).
One deployment serves all tests, in their order: a round with everybody, a round in which a device goes away, and a
second run that goes on where the first one ended.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import files
from adapters.base import find_base
from adapters.layout import Layout
from adapters.manifest import VersionManifest
from coordinator.settings import SETTINGS, FederationSettings
from coordinator.statedir import CoordinatorStateDir
from simulations.data.households import sample_population
from simulations.engine import provision
from simulations.scenario import Scenario

pytestmark = pytest.mark.slow

BUNDLE = Path(__file__).resolve().parents[2] / "coordinator" / "flower"
DEVICES = ("en-01", "en-02", "en-03", "en-04")
LEAVES = "en-04"  # after round 1
SCENARIO = {
    "name": "flower",
    "population": {
        "households": 5,  # one of them unseen
        "languages": ["en"],
        "utterances_min": 12,
        "utterances_max": 16,
        "test_utterances": 1,
        "public_phrases": 1,
    },
    "federation": {"rounds": 2, "deadline": 150.0, "attempts": 1},
}
RUN = 330  # seconds, on two busy cores; about 60 on idle ones


@dataclass(frozen=True)
class Outcome:
    """What both runs left behind."""

    state_dir: CoordinatorStateDir
    logs: tuple[str, str]
    statuses: list[str]
    asked: list[tuple[str, str]]  # the first device: group and step of each message that it got

    @property
    def rounds(self) -> Any:
        return self.state_dir.registry.rounds()


@pytest.fixture(scope="module")
def outcome(deployment: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    out = tmp_path_factory.mktemp("fleet")
    scenario = Scenario.parse(SCENARIO, "test")
    population = sample_population(scenario.population, scenario.seed)
    provision.provision(out, scenario, population, find_base(scenario.base.model))
    state_dir = out / provision.COORDINATOR
    for device in DEVICES:
        deployment.add_node(device, provision.device_folder(out, device))
    deployment.wait_for_nodes()

    registry = provision.registry(out)
    first = deployment.begin(BUNDLE, state_dir)
    deployment.wait("round 1", lambda: len(registry.rounds()) == 1, seconds=RUN)
    deployment.stop(LEAVES)
    logs = [deployment.finish(first, seconds=RUN)]
    settings = FederationSettings.read(state_dir / SETTINGS)
    (state_dir / SETTINGS).write_text(settings.model_copy(update={"rounds": 3}).to_toml())
    logs.append(deployment.finish(deployment.begin(BUNDLE, state_dir), seconds=RUN))

    opened = CoordinatorStateDir.open(state_dir)
    asked = re.findall(r"ROUND (\S+)\]\s.*Receiving: \w+\.(\w+) message", deployment.log(DEVICES[0]))
    yield Outcome(opened, (logs[0], logs[1]), deployment.statuses(), asked)
    registry.close()
    opened.registry.close()


def test_every_device_survives_the_first_round(outcome: Outcome) -> None:
    first = outcome.rounds[0]
    assert (first.survivors, first.dropped, first.aborted, first.version) == (DEVICES, {}, None, 1)
    assert first.metrics["examples"] > len(DEVICES)


def test_a_round_ends_with_the_others_when_a_device_goes_away(outcome: Outcome) -> None:
    second = outcome.rounds[1]
    assert second.survivors == DEVICES[:3]
    assert set(second.dropped) == {LEAVES}
    assert second.version == 2


def test_a_second_run_goes_on_with_the_rounds_that_are_still_to_do(outcome: Outcome) -> None:
    third = outcome.rounds[2]
    assert [record.round for record in outcome.rounds] == [1, 2, 3]
    assert (third.survivors, third.dropped, third.version) == (DEVICES[:3], {}, 3)
    assert "round 1 of" not in outcome.logs[1]


def test_a_device_is_asked_three_times_for_a_session_and_three_times_a_round(outcome: Outcome) -> None:
    sessions = {"session-1-1": ("1", "2"), "session-3-1": ("3",)}
    making, round_ = ("hello", "offer", "roster"), ("plan", "survivors", "unmask")
    expected = []
    for session, rounds in sessions.items():
        expected += [(session, step) for step in making]
        expected += [(number, step) for number in rounds for step in round_]
    assert outcome.asked == expected


def test_flower_says_that_both_runs_completed(outcome: Outcome) -> None:
    assert outcome.statuses == ["finished:completed", "finished:completed"]


def test_whoever_streams_a_run_reads_how_its_rounds_went(outcome: Outcome) -> None:
    assert "session of 4 devices for 2 rounds" in outcome.logs[0]
    assert "round 1 of 2: 4 survivors, 0 dropouts" in outcome.logs[0]
    assert "round 3 of 3: 3 survivors, 0 dropouts" in outcome.logs[1]


def test_every_version_is_signed_by_the_coordinator_and_changes_the_one_before(outcome: Outcome) -> None:
    registry = outcome.state_dir.registry
    for number in range(1, 4):
        version, parent = registry.version(number), registry.version(number - 1)
        manifest = VersionManifest.accept(version.raw, [outcome.state_dir.key.public])
        assert manifest.parent == parent.manifest.sha256
        assert files.sha256(registry.blob(number)) == manifest.sha256 != parent.manifest.sha256
        after, before = registry.tensors(number), registry.tensors(number - 1)
        moved = max(float(np.abs(after[name] - before[name]).max()) for name in before)
        assert 1e-6 < moved < 1.0


def test_a_device_sends_its_masked_vector_and_little_else(outcome: Outcome) -> None:
    layout = Layout.of(outcome.state_dir.registry.tensors(0))
    vector = layout.size * outcome.state_dir.settings.aggregation.ring_bits / 8  # bytes
    for record in outcome.rounds:
        each = record.bytes_up / len(record.survivors)
        assert vector < each < 1.05 * vector
        assert each < find_base(Scenario().base.model).weight_bytes / 100


def test_a_device_is_sent_the_adapter_and_little_else(outcome: Outcome) -> None:
    size = outcome.state_dir.registry.version(0).manifest.size
    first = outcome.rounds[0]
    assert size < first.bytes_down / len(DEVICES) < 1.05 * size
