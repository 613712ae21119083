"""The device's home: what is missing or altered is said, what is written is whole, and one step is answered once."""

import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import IdentityKey
from client.node import statedir as device_home
from client.node.policy import PolicySettings
from client.node.statedir import DeviceSettings, DeviceStateDir, enrol

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = DeviceSettings(base="some_base", policy=PolicySettings(minimum_cohort=5))
FILES = ("certificate.der", "authority.pem", "coordinator.pem")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trust = dict.fromkeys(FILES, b"-")
    enrol(tmp_path / "home", SETTINGS, IdentityKey.generate(SystemEntropy()), trust, SystemEntropy())
    return tmp_path / "home"


def test_a_home_opens_with_the_settings_it_was_made_with(folder: Path) -> None:
    state_dir = DeviceStateDir.open(folder)
    assert state_dir.settings == SETTINGS
    assert state_dir.examples == folder / "examples.jsonl"
    assert state_dir.load_state() is None


def test_every_file_of_a_home_is_readable_by_its_owner_only(folder: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o600}
    assert len(modes) == 6


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_a_base_with_any_name_is_written_and_read_back(tmp_path: Path, base: str) -> None:
    identity = IdentityKey(bytes(32))
    assert enrol(tmp_path, DeviceSettings(base=base), identity, {}, SystemEntropy()).settings.base == base


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('base = "x"\nbasis = 1\n', "basis: there is no such key"),
        ('base = "x"\n[policy]\nminimum_cohrt = 9\n', "policy.minimum_cohrt: there is no such key"),
        ('base = "x"\n[policy]\nminimum_ring_bits = 40\nmaximum_ring_bits = 30\n', "policy: ring bits must be"),
        ('base = "x"\n[policy]\nrevocation_days = 1000000000\n', "revocation_days"),
        ("[policy]\nminimum_cohort = 8\n", "base"),
        ('base = "x"\n[policy]\nminimum_cohort = 2\n', "minimum_cohort"),
        ('base = "x"\n[policy]\nminimum_cohort = "8"\n', "minimum_cohort"),
        ('base = "x"\n[policy]\nminimum_cohort = true\n', "minimum_cohort"),
        ("base = x\n", "device.toml"),
        ("base = 'x'\n\udcff", "device.toml"),
    ],
)
def test_settings_that_are_wrong_are_refused_in_one_line_that_names_them(
    folder: Path, content: str, reason: str
) -> None:
    (folder / "device.toml").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=reason) as caught:
        DeviceStateDir.open(folder)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_home_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(ConfigError, match="is not a device's home"):
            DeviceStateDir.open(folder)


def test_a_missing_key_or_certificate_is_named(fleet_of: Callable[..., Any]) -> None:
    state_dir = fleet_of().state_dir("device-00")
    state_dir.device("b" * 64)
    for name in ("identity.pem", *FILES):
        content = (state_dir.folder / name).read_bytes()
        (state_dir.folder / name).unlink()
        with pytest.raises(TrustError, match=f"has no {name}: enrol this device first"):
            state_dir.device("b" * 64)
        (state_dir.folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["identity.pem", "authority.pem", "coordinator.pem", "revoked.crl"])
def test_a_damaged_file_is_named(fleet_of: Callable[..., Any], name: str) -> None:
    state_dir = fleet_of().state_dir("device-00")
    (state_dir.folder / name).write_bytes(b"no key")
    with pytest.raises(TrustError, match=re.escape(f"{state_dir.folder / name}: not a")):
        state_dir.device("b" * 64)


# The state of a session.


@pytest.fixture
def joined(fleet_of: Callable[..., Any]) -> DeviceStateDir:
    """A home in the middle of a session."""
    fleet = fleet_of(rounds=1)
    fleet.federate(fleet.grid())
    state_dir: DeviceStateDir = fleet.state_dir("device-00")
    assert state_dir.load_state() is not None
    return state_dir


def test_an_altered_truncated_or_foreign_state_is_refused(joined: DeviceStateDir) -> None:
    path = joined.folder / device_home.STATE
    sealed = path.read_bytes()
    spoiled = [sealed[:-1], sealed[: len(sealed) // 2], b"", sealed + b"\0"]
    spoiled += [sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :] for i in (0, 20, 40, len(sealed) - 1)]
    for content in spoiled:
        path.write_bytes(content)
        with pytest.raises(TrustError, match=r"session\.sealed: .*sealed session state"):
            joined.load_state()
    path.write_bytes(sealed)
    joined.load_state()
    (joined.folder / device_home.SEALING_KEY).write_bytes(bytes(32))
    with pytest.raises(TrustError, match="another device"):
        joined.load_state()


def test_a_state_without_its_sealing_key_is_refused(joined: DeviceStateDir) -> None:
    (joined.folder / device_home.SEALING_KEY).unlink()
    with pytest.raises(TrustError, match=r"sealing\.key"):
        joined.load_state()


def test_the_sealed_state_shows_nothing_of_its_content(joined: DeviceStateDir) -> None:
    sealed = (joined.folder / device_home.STATE).read_bytes()
    assert b"device-0" not in sealed
    assert stat.S_IMODE((joined.folder / device_home.STATE).stat().st_mode) == 0o600


def test_a_damaged_memory_of_the_log_is_refused_in_a_line_that_says_what_to_do(folder: Path) -> None:
    state_dir = DeviceStateDir.open(folder)
    assert state_dir.load_log_state() is None
    (folder / "log.seen").write_bytes(b"damaged")
    with pytest.raises(TrustError, match=r"log\.seen is damaged: 'edgeadapt device forget' starts"):
        state_dir.load_log_state()


def test_a_state_that_cannot_be_written_leaves_the_old_one(
    joined: DeviceStateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, before = joined.load_state(), {path: path.read_bytes() for path in joined.folder.iterdir()}
    assert state is not None

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        joined.save_state(state)
    assert {path: path.read_bytes() for path in joined.folder.iterdir()} == before


def test_one_message_at_a_time_whoever_asks(folder: Path) -> None:
    state_dir, inside, most = DeviceStateDir.open(folder), [0], [0]

    def work() -> None:
        with state_dir.locked():
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            time.sleep(0.005)
            inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_another_process_waits_for_the_lock_and_a_kill_frees_it(folder: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from client.node.statedir import DeviceStateDir\n"
    hold += "with DeviceStateDir.open(Path(sys.argv[1])).locked(): print('in', flush=True); time.sleep(60)"
    got = threading.Event()

    def take() -> None:
        with DeviceStateDir.open(folder).locked():
            got.set()

    with subprocess.Popen([sys.executable, "-c", hold, str(folder)], cwd=ROOT, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"in\n"
        waiting = threading.Thread(target=take)
        waiting.start()
        assert not got.wait(0.2)
        other.kill()
        assert got.wait(5)
        waiting.join()
