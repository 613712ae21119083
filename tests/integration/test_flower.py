"""The ServerApp and the ClientApp on Flower's own runtime: a SuperLink with TLS and four authenticated SuperNodes.

The fleet is made by commands alone, and ``edgeadapt coordinator run`` submits the app bundle, which only names the two
apps (docs/how-to/flower.md): the devices run the installed package. They train with the training graph of a bundle, and
no process of theirs can import torch. One round serves all tests: Flower starts a process for each message.

The certificate of a device is revoked while its SuperNode is connected. Flower knows the SuperNode by another key, and
goes on to deliver its messages. The coordinator keeps the device out of the session.
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.statedir import CoordinatorStateDir
from edgeadapt.bases.base import Base
from edgeadapt.formats import files
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.roundrecord import RoundRecord
from tests.support.blocked import STARTED, without_torch
from tests.support.trial import AUTHORITY, COORDINATOR, call, make_trial_fleet

pytestmark = pytest.mark.slow

REVOKED, STAY = "attic", ("garage", "hall", "kitchen")
DEVICES = (REVOKED, *STAY)
PHRASES = [("Light", "turn on the light"), ("Music", "play music"), ("Timer", "set a timer")]
EXAMPLES = [
    ("switch the lamp on", 0, "train"),
    ("play the song", 1, "train"),
    ("wake me in ten minutes", 2, "train"),
    ("make it bright", 0, "validation"),
]
RUN = 330  # seconds, on two busy cores


@dataclass(frozen=True)
class Outcome:
    state_dir: CoordinatorStateDir
    log: str
    statuses: list[str]
    asked: dict[str, list[tuple[str, str]]]  # device → group and step of each message that it got
    devices: dict[str, tuple[str, str]]  # device → its processes, and its log

    @property
    def record(self) -> RoundRecord:
        (record,) = self.state_dir.registry.rounds()
        return record


@pytest.fixture(scope="module")
def outcome(deployment: Any, tmp_path_factory: pytest.TempPathFactory, tiny_base: Base) -> Iterator[Outcome]:
    out, base = tmp_path_factory.mktemp("fleet"), str(tiny_base.folder)
    settings = ("rounds=1", "deadline=150", "attempts=1", "training.learning_rate=0.01")
    bundles = dict.fromkeys(DEVICES, exported_bundle(out / "shared", base))
    make_trial_fleet(out, base, PHRASES, dict.fromkeys(DEVICES, EXAMPLES), *settings, rank=2, bundles=bundles)
    for device in DEVICES:
        deployment.add_node(device, out / device, without_torch(out / f"site-{device}"))
    deployment.wait_for_nodes()

    opened = CoordinatorStateDir.open(out / COORDINATOR)
    call("authority", "revoke", out / AUTHORITY, REVOKED)
    shutil.copy(out / AUTHORITY / "revoked.crl", opened.folder / "revoked.crl")
    log = deployment.finish(deployment.begin(opened.folder), seconds=RUN)

    devices = {name: ((out / f"site-{name}" / STARTED).read_text(), deployment.log(name)) for name in DEVICES}
    received = r"ROUND (\S+)\]\s.*Receiving: \w+\.(\w+) message"
    messages = {name: re.findall(received, log) for name, (_, log) in devices.items()}
    yield Outcome(opened, log, deployment.statuses(), messages, devices)
    opened.registry.close()


def exported_bundle(folder: Path, base: str) -> Path:
    """A bundle of the base with a training graph, and the key that signed it."""
    key, bundle = folder / "vendor.pem", folder / "bundle"
    call("bundle", "key", key)
    call("bundle", "make", "--base", base, "--head", "mean", "--training", "--key", key, "--bundle", bundle)
    shutil.copy(folder / "vendor.pub.pem", folder / "trust.pem")
    return bundle


def test_devices_without_torch_train_in_flowers_processes(outcome: Outcome) -> None:
    record = outcome.record
    assert (record.survivors, record.dropped, record.aborted, record.version) == (STAY, {}, None, 1)
    assert record.metrics == {}  # an accuracy of three held-out examples would show their number
    for processes, log in (outcome.devices[name] for name in STAY):
        assert "flower-supernode" in processes
        assert "flwr-clientapp" in processes  # the process that trains
        assert "contributed nothing" not in log  # a warning, as of an import that fails
    assert "round 1 of 1: 3 survivors, 0 dropouts" in outcome.log
    assert outcome.statuses == ["finished:completed"]


def test_a_device_gets_three_messages_for_a_session_and_three_for_a_round(outcome: Outcome) -> None:
    making, round_ = ("checkin", "offer", "roster"), ("plan", "survivors", "unmask")
    assert outcome.asked["kitchen"] == [*(("session-1-1", step) for step in making), *(("1", step) for step in round_)]


def test_a_device_that_is_revoked_is_asked_and_not_admitted(outcome: Outcome) -> None:
    """So it is not Flower that keeps it out: it got the check-in as well."""
    assert outcome.asked[REVOKED] == [("session-1-1", "checkin")]
    assert f"is not admitted: certificate of {REVOKED} is revoked" in outcome.log


def test_the_version_is_signed_and_differs_from_its_parent(outcome: Outcome) -> None:
    registry = outcome.state_dir.registry
    version, parent = registry.version(1), registry.version(0)
    manifest = VersionManifest.accept(version.raw, [outcome.state_dir.key.public])
    assert manifest.parent == parent.manifest.sha256
    assert files.sha256(registry.blob(1)) == manifest.sha256 != parent.manifest.sha256
    after, before = registry.tensors(1), registry.tensors(0)
    moved = max(float(np.abs(after[name] - before[name]).max()) for name in before)
    assert 1e-6 < moved < 1.0
