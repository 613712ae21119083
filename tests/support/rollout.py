"""A fleet whose devices follow a channel, of which a release is rolled out to half of them; and what makes one bad."""

import tomllib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError
from aggregation.pki.identity import IdentityKey
from client.inference.session import ClassificationSession
from client.node.statedir import SETTINGS
from client.training.examples import Split, in_split, read_examples
from client.updates import ChannelSource, follow, update
from client.updates.channel import Targeting
from edgeadapt.formats.release import Rollout
from edgeadapt.program import cli
from edgeadapt.promotion.gates import GateSettings
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.releases.rollback import prepare
from export.bundle.sources import Origin
from export.bundle.write import create
from export.onnx.exported import ExportedBase
from tests.support.bundles import stated

MARGIN = GateSettings().accuracy.margin
NOISE = 0.02  # multiplier: a verdict on a few devices takes nearly exact counts, which their owners must accept


def run(*words: object) -> str:
    """What a command prints. Raises the error that it ended with."""
    done = CliRunner().invoke(cli, [str(word) for word in words])
    if isinstance(done.exception, EdgeAdaptError):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.output


@dataclass
class StagedFleet:
    """A fleet whose devices follow a channel of a repository; every second one is in at a share of 50 %."""

    fleet: Any
    exported: ExportedBase
    key: IdentityKey
    repository: ChannelRepository

    @classmethod
    def of(cls, fleet: Any, exported: ExportedBase) -> "StagedFleet":
        """With a new repository; its channels are empty."""
        repository = ChannelRepository.create(fleet.out / "releases", SystemEntropy(), datetime.now(UTC))
        repository.protect("stable", on=False)
        (repository.folder / "gates.toml").write_text(GateSettings().to_toml())
        return cls(fleet, exported, IdentityKey.generate(SystemEntropy()), repository)

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
            stages = [Rollout(release, release - 1, 50) for release in (2, 4, 6)]
            chosen = (each.release if number % 2 else each.previous for each in stages)
            wanted = list(chosen)
            key = next(key for key in keys if [Targeting(key).release(each) for each in stages] == wanted)
            Targeting(key).write(folder / "updates")
            file = folder.parent / SETTINGS
            settings = tomllib.loads(file.read_text())
            settings["policy"] = settings.get("policy", {}) | {"minimum_evaluation_noise": NOISE}
            file.write_text(tomli_w.dumps(settings | {"base": str(self.bundle(device))}))

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

    def keep_only_the_snapshots_key(self) -> list[Path]:
        """Take the other keys out of the repository, as on a machine that watches. Returns where they are."""
        roles = {role: keys for role, _, _, keys in self.repository.metadata.roles()}
        elsewhere = [path for path in (self.folder / "keys").iterdir() if path not in roles["snapshot"]]
        return [path.rename(self.fleet.out / path.name) for path in elsewhere]

    def give_back(self, keys: list[Path]) -> None:
        for path in keys:
            path.rename(self.folder / "keys" / path.name)


def louder(origin: Origin) -> Origin:
    """The same answers from other bytes."""
    head = next(name for name in origin.tensors if name.endswith("classifier.weight"))
    tensors = origin.tensors | {head: origin.tensors[head] * np.float32(1.5)}
    return replace(origin, sha256="e" * 64, tensors=tensors)  # which a manifest names as its source


def permuted(origin: Origin) -> Origin:
    """Each label's answer is that of another one."""
    found = louder(origin)
    head = {name: np.roll(value, 1, 0) for name, value in found.tensors.items() if "classifier." in name}
    return replace(found, tensors=found.tensors | head)
