"""A coordinator with three versions of the tiny classifier, and a repository of channels for their bundles."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from coordinator.registry import Registry
from edgeadapt.bases.base import Base
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout, Tensors
from edgeadapt.formats.manifest import Card, PrivacyBound, VersionManifest
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.releases.repository import ChannelRepository
from export.bundle.write import AdapterSource, write_bundle
from export.onnx.exported import ExportedBase
from tests.support import models
from tests.support.registry import Rounds, commit

globals().update(models.FIXTURES)

NOW = datetime.now(UTC)
CARD = Card(owner="Zoë", purpose="Lights", data="Volunteers", license="LicenseRef-Ours OR MIT", languages=("de", "en"))


def version_of(number: int, values: Tensors, base: Base, before: bytes | None) -> tuple[VersionManifest, bytes]:
    """The manifest and file of a version of the tiny classifier."""
    blob = files.encode(values)
    manifest = replace(
        Rounds.manifest(number),
        sha256=files.sha256(blob),
        size=len(blob),
        base_digest=base.digest,
        layout_digest=Layout.of(values).digest,
        parent=None if before is None else files.sha256(before),
        metrics={"loss": 1 / number, "accuracy": 0.5 + 0.1 * number} if number else {},
        privacy=PrivacyBound(2.0 * number, 1e-6) if number else None,
        peft_config=PeftConfig.lora(rank=4, alpha=8),
        labels=models.LABELS,
    )
    return manifest, blob


@dataclass
class Vendor:
    """A state directory with versions, a repository of channels, and the keys of both."""

    state_dir: Path
    coordinator: IdentityKey
    repository: ChannelRepository
    key: IdentityKey
    values: tuple[Tensors, ...]
    exported: ExportedBase
    bundle: Path

    def publish(
        self,
        number: int,
        channel: str = "canary",
        version: int | None = None,
        really: int | None = None,
        labels: tuple[str, ...] = models.LABELS,
    ) -> None:
        """Export a version and publish the bundle; ``really``: with the tensors of this one instead."""
        source = AdapterSource(
            "global",
            self.values[number if really is None else really],
            labels,
            number + 1 if version is None else version,
            files.sha256(files.encode(self.values[number])),
            peft_config=PeftConfig.lora(rank=4, alpha=8),
            card=CARD,
        )
        write_bundle(self.bundle, self.exported, [source], key=self.key, form="fp32")
        self.repository.publish(channel, self.bundle, [self.key.public])


@pytest.fixture
def vendor_place(tmp_path: Path, tiny_base: Base, model: Any, exported: ExportedBase, vendor: IdentityKey) -> Vendor:
    state_dir, coordinator = tmp_path / "fleet", IdentityKey.generate(SystemEntropy())
    state_dir.mkdir()
    (state_dir / "coordinator.pem").write_bytes(coordinator.public.to_pem())
    values = tuple(models.draw(model, seed) for seed in range(3))
    address = f"sqlite:///{state_dir}/registry.db"
    registry, before = Registry.open(address, str(state_dir / "blobs"), [coordinator.public]), None
    for number, each in enumerate(values):
        manifest, blob = version_of(number, each, tiny_base, before)
        commit(registry, manifest, blob, coordinator)
        before = blob
    registry.close()
    repository = ChannelRepository.create(tmp_path / "releases", SystemEntropy(), NOW)
    return Vendor(state_dir, coordinator, repository, vendor, values, exported, tmp_path / "made" / "bundle")
