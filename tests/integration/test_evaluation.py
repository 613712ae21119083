"""A secure sum of right answers: devices of two releases count, and a release that is worse is found and taken back.

The apps, the repository of channels and the commands are the real ones. The base is tiny.
"""

import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from click.testing import CliRunner

from adapters.base import Base
from adapters.evaluation import RENEWAL
from adapters.rollout import Rollout
from adapters.task import UNIFORMS
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from client.node.privacyledger import PrivacyLedger
from client.node.statedir import SETTINGS
from client.training.examples import Example, Split, in_split, read_examples, write_examples
from client.updates import ChannelSource, follow, update
from client.updates.targeting import Targeting
from coordinator.channels.history import audit_repository
from coordinator.channels.repository import ChannelRepository
from coordinator.channels.rollback import prepare
from edgeadapt import cli
from export.bundle.sources import Origin, from_registry
from export.bundle.write import create
from export.onnx.classifier import export_classifier
from export.onnx.exported import ExportedBase, Profile
from export.onnx.slotted import with_mean_head
from governance.evaluations import NoVerdictError
from governance.gates import GateError
from governance.gatesettings import GateSettings
from tests.support import refused
from tests.support.bundles import stated
from tests.support.hostile import audit_failures

MARGIN = GateSettings().accuracy.margin
DEVICES = 8  # with 30 held-out examples each
NOISY = {"privacy__mechanism": "skellam", "privacy__noise_multiplier": 0.5}
KEPT = {"aggregation__keep_masked_inputs": True, "aggregation__ring_bits": 32}


def run(*words: object) -> str:
    done = CliRunner().invoke(cli, [str(word) for word in words])
    if isinstance(done.exception, EdgeAdaptError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def exported(tiny_base: Base) -> ExportedBase:
    return export_classifier(with_mean_head(tiny_base, ["query", "value"]), tiny_base, Profile.FP32, training=True)


@dataclass
class Channel:
    """A fleet whose devices follow a channel of a repository; every second one is in at a share of 50 %."""

    fleet: Any
    exported: ExportedBase
    key: IdentityKey
    repository: ChannelRepository

    @property
    def folder(self) -> Path:
        return self.repository.folder

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(Path(folder).name for folder in self.fleet.nodes.values())

    def bundle(self, device: str) -> Path:
        return Path(self.fleet.state_dir(device).folder / "channel" / "bundle")

    def publish(self, channel: str, origin: Origin, version: int) -> None:
        bundle = self.fleet.out / "made" / str(version) / "bundle"
        create(bundle, self.exported, replace(origin, version=version), name="global", form="int8", key=self.key)
        self.repository.publish(channel, bundle, [self.key.public])

    def promote(self) -> None:
        source = self.repository.release("canary")
        assert source is not None
        self.repository.promote("canary", source.number, "stable", (), share=50)
        prepare(self.repository, "stable", self.key, MARGIN)
        self.update()

    def join(self) -> None:
        """Let devices follow the channel, and run its bundle."""
        (self.fleet.out / "root.json").write_bytes(self.repository.root())
        keys = (f"{number:032x}" for number in range(10**6))
        for number, device in enumerate(self.devices):
            folder = self.bundle(device).parent
            folder.mkdir()
            (folder / "trust.pem").write_bytes(self.key.public.to_pem())
            source = ChannelSource(str(self.folder / "public"), "stable")
            follow(self.bundle(device), source, self.fleet.out / "root.json")
            stages = [Rollout(release, release - 1, 50) for release in (2, 4)]
            chosen = (each.release if number % 2 else each.previous for each in stages)
            wanted = list(chosen)
            key = next(key for key in keys if [Targeting(key).release(each) for each in stages] == wanted)
            Targeting(key).write(folder / "updates")
            file = folder.parent / SETTINGS
            file.write_text(tomli_w.dumps(tomllib.loads(file.read_text()) | {"base": str(self.bundle(device))}))

    def update(self) -> None:
        for device in self.devices:
            update(self.bundle(device), entropy=SystemEntropy())

    def having(self, version: int) -> tuple[str, ...]:
        return tuple(device for device in self.devices if stated(self.bundle(device)).version == version)

    def right(self, version: int) -> tuple[int, int]:
        """Right answers and examples of the devices with a version, counted in one place."""
        labels, found, count = self.fleet.population.labels, 0, 0
        for device in self.having(version):
            session = ClassificationSession.open(self.bundle(device))
            own = read_examples(self.fleet.state_dir(device).examples, len(labels))
            for each in in_split(own, Split.VALIDATION):
                found, count = (
                    found + (session.classify([each.text], "global")[0].label == labels[each.label]),
                    count + 1,
                )
        return found, count

    def compare(self) -> Any:
        """The record of a round of evaluation."""
        run("coordinator", "evaluate", self.fleet.out / "coordinator", "--releases", self.folder, "--channel", "stable")
        return self.fleet.federate(self.fleet.grid())[-1]

    def verdict(self, *options: str) -> str:
        return run("adapters", "verdict", self.fleet.out / "coordinator", "stable", "--releases", self.folder, *options)

    def watch(self) -> Any:
        """What a look leads to, on a machine with the key of snapshot and timestamp alone."""
        roles = {role: keys for role, _, _, keys in self.repository.metadata.roles()}
        elsewhere = [path for path in (self.folder / "keys").iterdir() if path not in roles["snapshot"]]
        for path in elsewhere:
            path.rename(self.fleet.out / path.name)
        options = ("stable", "--releases", self.folder, "--once", "--json")
        found = json.loads(run("adapters", "watch", self.fleet.out / "coordinator", *options))
        for path in elsewhere:
            (self.fleet.out / path.name).rename(path)
        return found


@pytest.fixture
def channel_of(app_fleet_of: Callable[..., Any], exported: ExportedBase) -> Callable[..., Channel]:
    def make(**settings: Any) -> Channel:
        fleet, key = app_fleet_of(DEVICES, **KEPT, **settings), IdentityKey.generate(SystemEntropy())
        for client in fleet.population.clients:
            path = fleet.state_dir(client.name).examples
            own = read_examples(path, len(fleet.population.labels))
            extra = [Example(f"{e.text} {k}", e.label) for k in range(3) for e in in_split(own, Split.TRAIN)]
            write_examples(path, [*own, *extra])
        repository = ChannelRepository.create(fleet.out / "releases", SystemEntropy(), datetime.now(UTC))
        repository.protect("stable", on=False)
        (repository.folder / "gates.toml").write_text(GateSettings().to_toml())
        return Channel(fleet, exported, key, repository)

    return make


def louder(origin: Origin) -> Origin:
    """The same answers from other bytes."""
    head = next(name for name in origin.tensors if name.endswith("classifier.weight"))
    tensors = origin.tensors | {head: origin.tensors[head] * np.float32(1.5)}
    return replace(origin, sha256="e" * 64, tensors=tensors)  # which a manifest names as its source


def permuted(origin: Origin) -> Origin:
    """Each label's answer is that of another one."""
    return replace(louder(origin), labels=(*origin.labels[1:], origin.labels[0]))


def test_a_bad_canary_is_found_by_sums_and_taken_back_and_a_good_one_stays(channel_of: Callable[..., Channel]) -> None:
    channel = channel_of(rounds=1, analytic__rounds=1)
    fleet, folder = channel.fleet, channel.fleet.out / "coordinator"
    fleet.federate(fleet.grid())
    good, before = from_registry(folder, 1, None), fleet.registry().tensors(1)
    channel.publish("stable", good, 1)
    channel.publish("canary", permuted(good), 2)
    channel.join()
    channel.promote()
    assert len(channel.having(1)) == len(channel.having(2)) == DEVICES // 2
    with refused(NoVerdictError, "evaluation"):
        channel.verdict()

    record = channel.compare()
    (found, count), (found_before, count_before) = channel.right(2), channel.right(1)
    assert (count, count_before, record.version) == (120, 120, 2)
    assert found / count < 0.4 < 0.7 < found_before / count_before
    assert record.metrics == {
        "deviation": 0.0,
        "accuracy_newest": round(found / count, 2),
        "examples_newest": 64.0,
        "accuracy_previous": round(found_before / count_before, 2),
        "examples_previous": 64.0,
    }
    moved = {name: float(np.abs(value - before[name]).max()) for name, value in fleet.registry().tensors(2).items()}
    assert 0 < max(moved.values()) <= RENEWAL * UNIFORMS / 2 + 1e-5
    assert fleet.registry().version(2).manifest.rule.name == "Evaluation"
    assert audit_failures(folder) == set()
    with refused(GateError, "evaluation"):
        channel.verdict()

    done = channel.watch()
    assert (done["outcome"], done["release"]) == ("rolled back", 3)
    channel.update()
    assert len(channel.having(3)) == DEVICES  # at the next check the release is off every device
    assert {stated(channel.bundle(device)).labels for device in channel.devices} == {good.labels}
    with refused(ConfigError, "rollout"):
        channel.verdict()
    assert channel.watch()["outcome"] == "no rollout"

    channel.publish("canary", louder(good), 4)
    channel.promote()
    with refused(NoVerdictError, "evaluation"):  # the one before compared other releases
        channel.verdict()
    assert channel.watch()["outcome"] == "no verdict"
    assert channel.compare().version == 3
    judged = json.loads(channel.verdict("--json"))
    assert not judged["worse"]
    assert judged["metrics"]["accuracy_newest"] > 0.7
    assert channel.watch()["outcome"] == channel.watch()["outcome"] == "kept"
    assert audit_failures(folder) == set()
    actions = [each.action for each in audit_repository(channel.folder, None).records]
    judged_actions = [(each.kind, each.release, each.evaluation.worse) for each in actions if each.evaluation]
    assert judged_actions == [("rollback", 3, True), ("evaluate", 4, False)]
    channel.repository.prepared.discard("stable")
    with refused(ConfigError, "prepared"):
        channel.watch()


def test_with_noise_the_counts_are_noisy_the_ledger_has_them_and_devices_with_few_examples_count_nothing(
    channel_of: Callable[..., Channel],
) -> None:
    channel = channel_of(rounds=1, **NOISY)
    fleet, folder = channel.fleet, channel.fleet.out / "coordinator"
    good = from_registry(folder, 0, None)
    channel.publish("stable", good, 1)
    channel.publish("canary", permuted(good), 2)
    channel.join()
    channel.promote()
    few = channel.having(2)[0]
    path = fleet.state_dir(few).examples
    own = read_examples(path, len(fleet.population.labels))
    kept = [*in_split(own, Split.TRAIN), *in_split(own, Split.VALIDATION)[:3]]
    write_examples(path, kept)
    fleet.federate(fleet.grid())
    record = channel.compare()
    assert record.aborted is None, (record.aborted, record.dropped)
    assert 0 < fleet.registry().rounds()[0].epsilon < record.epsilon
    deviation = record.metrics["deviation"]
    assert 5 < deviation < 30
    # Not published below 100 examples.
    assert abs(record.metrics.get("examples_previous", 100.0) - 120) < 5 * deviation
    assert record.metrics.get("examples_newest", 0.0) < 90 + 5 * deviation  # of three devices
    assert audit_failures(folder) == set()
    assert fleet.state_dir(few).load_privacy_ledger() != PrivacyLedger()
