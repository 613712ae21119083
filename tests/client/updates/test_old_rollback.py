"""A rollback that was prepared and never published, in the hands of a thief of the snapshot's key, years later.

The metadata stay signed by the channel's key. What ends them is their date, by the device's clock, and any later
version of the channel that the device has seen.
"""

import shutil
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tuf.api.metadata import Root, Targets
from tuf.ngclient._internal import trusted_metadata_set

from aggregation.errors import TrustError
from edgeadapt.releases.actions import Action
from edgeadapt.releases.metadata import ROOT, TOP
from edgeadapt.releases.prepared import RELEASE, Release
from tests.client.updates.conftest import NOW, Place
from tests.client.updates.test_prepared_rollback import made as made
from tests.client.updates.test_prepared_rollback import place_in
from tests.client.updates.test_prepared_rollback import staged as staged
from tests.support import refused

YEARS = timedelta(days=800)
CHANNEL = "stable"


def years_later(patch: pytest.MonkeyPatch) -> None:
    """Set the device's clock, of which TUF's client makes its own."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + YEARS

    patch.setattr(trusted_metadata_set, "datetime", SimpleNamespace(datetime=Clock, timezone=timezone))


def thief(staged: Place, tmp_path: Path) -> Any:
    """Who copied the repository with its prepared rollback, and the key of snapshot and timestamp."""
    copied = place_in(Path(shutil.copytree(staged.folder, tmp_path / "stolen")), staged.vendor)
    return copied.repository


def show_old_rollback(repository: Any, staged: Place, times: int = 1) -> None:
    """Publish it under a snapshot of today, with the root and targets that the vendor has renewed since."""
    metadata = type(repository.metadata)(repository.folder, NOW + YEARS)
    read = repository.prepared.read(CHANNEL)
    assert read is not None
    found, listed = read[0], read[0].signed.targets
    for path in repository.prepared.targets.folder.rglob("*.*"):
        if path.is_file():
            shutil.copy(path, repository.targets.folder / path.relative_to(repository.prepared.targets.folder))
    digest = listed[f"{CHANNEL}/{RELEASE}"].hashes["sha256"]
    release = Release.decode(repository.targets.path(CHANNEL, RELEASE, digest).read_bytes())
    action = Action("rollback", subject=CHANNEL, release=3, again=1, sha256=digest, adapters=dict(release.adapters))
    for _ in range(times):  # of its snapshot, whose version must be above the vendor's
        root, top = metadata.load(Root, ROOT), metadata.load(Targets, TOP)
        metadata.commit(action, {}, root=root, top=top, prepared={CHANNEL: found})
    shutil.rmtree(staged.repository.folder / "public")
    shutil.copytree(repository.folder / "public", staged.repository.folder / "public")


def test_a_device_refuses_a_rollback_that_expired_whatever_it_has_seen(
    staged: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    show_old_rollback(thief(staged, tmp_path), staged)
    years_later(monkeypatch)
    with refused(TrustError, "repository.expired"):
        staged.update()


def test_a_device_whose_clock_stands_still_takes_it(staged: Place, tmp_path: Path) -> None:
    """Not repaired: without a clock, nothing tells a device that a year has passed."""
    show_old_rollback(thief(staged, tmp_path), staged)
    assert staged.update().release.number == 3


def test_a_device_that_saw_a_later_version_of_the_channel_refuses_it_whatever_its_clock_says(
    staged: Place, tmp_path: Path
) -> None:
    stolen = thief(staged, tmp_path)
    staged.repository.set_rollout(CHANNEL, 100)
    staged.repository.renew(everything=True)
    assert staged.update().release.number == 2
    show_old_rollback(stolen, staged, times=5)
    with refused(TrustError, "repository.version"):
        staged.update()
