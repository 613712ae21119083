"""The tiny bases and bundles of ``tests.support.models``, a repository that is served, and a device that follows it."""

import http.server
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from client.inference.trust import Trust
from client.updates import ChannelSource, Updated, follow, update
from edgeadapt.releases.repository import ChannelRepository
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.support import models
from tests.support.bundles import resign
from tests.support.models import Source

globals().update(models.FIXTURES)

NOW = datetime.now(UTC)


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


@dataclass
class Place:
    """A vendor with a repository that is served, and a device that follows its stable channel."""

    folder: Path
    repository: ChannelRepository
    address: str
    vendor: IdentityKey
    source: Source
    exported: ExportedBase
    made: Path
    device: Path

    @property
    def bundle(self) -> Path:
        return self.device / "bundle"

    def publish(
        self, version: int, *, seed: int = 0, channel: str = "stable", exported: ExportedBase | None = None
    ) -> None:
        write_bundle(self.made, exported or self.exported, [self.source("global", seed)], key=self.vendor)
        resign(self.made, self.vendor, version=version)
        self.repository.publish(channel, self.made, [self.vendor.public])

    def follow(self, channel: str = "stable") -> None:
        (self.folder / "root.json").write_bytes(self.repository.root())
        follow(self.bundle, ChannelSource(self.address, channel), self.folder / "root.json")

    def update(self) -> Updated:
        return update(self.bundle, entropy=SystemEntropy())

    def version(self) -> int:
        """Of the adapter in use, which the device accepts."""
        trust = Trust.open(self.bundle)
        return trust.adapter("global", trust.bundle.base()).manifest.version


@pytest.fixture
def place(
    tmp_path: Path, vendor: IdentityKey, household: IdentityKey, source: Source, exported: ExportedBase
) -> Iterator[Place]:
    repository = ChannelRepository.create(tmp_path / "releases", SystemEntropy(), NOW)
    repository.protect("stable", on=False)
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "releases" / "public"))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    device = tmp_path / "device"
    device.mkdir()
    (device / "trust.pem").write_bytes(vendor.public.to_pem() + household.public.to_pem())
    made = tmp_path / "made" / "bundle"
    address = f"http://127.0.0.1:{server.server_address[1]}"
    yield Place(tmp_path, repository, address, vendor, source, exported, made, device)
    server.shutdown()
    server.server_close()


@pytest.fixture
def following(place: Place) -> Place:
    """The device has release 1, with version 1 of the adapter."""
    place.publish(1)
    place.follow()
    assert place.update().changed
    assert place.version() == 1
    return place
