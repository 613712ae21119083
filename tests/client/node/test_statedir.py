"""A state directory names a missing or damaged file, is written completely or not at all, and is locked."""

import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, TrustError
from aggregation.pki.identity import IdentityKey
from aggregation.transcript.logstate import LogState
from client.cli import device
from client.node import statedir
from client.node.policy import PolicySettings
from client.node.statedir import DeviceSettings, DeviceStateDir
from edgeadapt.formats.bundle import BASE_MANIFEST
from tests.support import FleetOf, refused

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = DeviceSettings(base="some_base", policy=PolicySettings(minimum_cohort=5))
FILES = ("certificate.der", "authority.pem", "coordinator.pem")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    trust = dict.fromkeys(FILES, b"-")
    identity = IdentityKey.generate(SystemEntropy())
    DeviceStateDir.create(tmp_path / "state", SETTINGS, identity, trust, SystemEntropy())
    return tmp_path / "state"


def test_a_state_directory_opens_with_the_settings_it_was_created_with(folder: Path) -> None:
    state_dir = DeviceStateDir.open(folder)
    assert state_dir.settings == SETTINGS
    assert state_dir.examples == folder / "examples.jsonl"
    assert state_dir.load_state() is None


def test_every_file_of_a_state_directory_is_readable_by_its_owner_only(folder: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o600}
    assert len(modes) == 6


@pytest.mark.parametrize(
    ("content", "about"),
    [
        ('base = "x"\nbasis = 1\n', "basis"),
        ('base = "x"\ngateway = "fleet.example"\n', "gateway"),
        ('base = "x"\ngateway = "a:1,"\n', "gateway"),
        ('base = "x"\nrenewal = "a:1,b:1"\n', "renewal"),
        ("base = x\n", "device.toml"),
        ("base = 'x'\n\udcff", "device.toml"),
    ],
)
def test_wrong_settings_are_refused_by_key(folder: Path, content: str, about: str) -> None:
    (folder / "device.toml").write_bytes(content.encode(errors="surrogateescape"))
    with refused(ConfigError, about):
        DeviceStateDir.open(folder)


@pytest.mark.parametrize("gateway", ["127.0.0.1:9443", "[::1]:9443", "a.fleet.example:9443,b.fleet.example:9443"])
def test_addresses_of_a_gateway_are_accepted(folder: Path, gateway: str) -> None:
    (folder / "device.toml").write_text(f'base = "x"\ngateway = "{gateway}"\n')
    assert DeviceStateDir.open(folder).settings.gateway == gateway


@pytest.mark.parametrize(("command", "option"), [("run", "--gateway"), ("enrol --renew", "--renewal")])
def test_an_address_without_a_port_is_refused_before_anything_connects(folder: Path, command: str, option: str) -> None:
    done = CliRunner().invoke(device, [*command.split(), "--state", str(folder), option, "fleet.example"])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.about == option


def test_a_folder_that_is_not_a_state_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        with refused(ConfigError, "device.toml") as caught:
            DeviceStateDir.open(folder)
        assert str(folder) in str(caught.value)
        assert "edgeadapt device enrol" in str(caught.value)


def test_a_missing_key_or_certificate_is_named(fleet_of: FleetOf) -> None:
    state_dir = fleet_of().state_dir("device-00")
    state_dir.device("b" * 64)
    for name in ("identity.pem", *FILES):
        content = (state_dir.folder / name).read_bytes()
        (state_dir.folder / name).unlink()
        with refused(TrustError, name):
            state_dir.device("b" * 64)
        (state_dir.folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["identity.pem", "authority.pem", "coordinator.pem", "revoked.crl"])
def test_a_damaged_file_is_named(fleet_of: FleetOf, name: str) -> None:
    state_dir = fleet_of().state_dir("device-00")
    (state_dir.folder / name).write_bytes(b"no key")
    with pytest.raises(TrustError) as caught:
        state_dir.device("b" * 64)
    assert str(caught.value).startswith(f"{state_dir.folder / name}: ")


# The state of a session.


@pytest.fixture
def joined(fleet_of: FleetOf) -> DeviceStateDir:
    """A state directory in the middle of a session."""
    fleet = fleet_of(rounds=1)
    fleet.federate(fleet.grid())
    state_dir: DeviceStateDir = fleet.state_dir("device-00")
    assert state_dir.load_state() is not None
    return state_dir


def test_an_altered_truncated_or_foreign_state_is_refused(joined: DeviceStateDir) -> None:
    path = joined.folder / statedir.STATE
    sealed = path.read_bytes()
    damaged = [sealed[:-1], sealed[: len(sealed) // 2], b"", sealed + b"\0"]
    damaged += [sealed[:i] + bytes([sealed[i] ^ 1]) + sealed[i + 1 :] for i in (0, 20, 40, len(sealed) - 1)]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(TrustError) as caught:
            joined.load_state()
        assert str(path) in str(caught.value)
    path.write_bytes(sealed)
    joined.load_state()
    (joined.folder / statedir.SEALING_KEY).write_bytes(bytes(32))
    with refused(TrustError, "sealed.ciphertext"):
        joined.load_state()


def test_a_state_without_its_sealing_key_is_refused(joined: DeviceStateDir) -> None:
    (joined.folder / statedir.SEALING_KEY).unlink()
    with refused(TrustError, "sealing.key"):
        joined.load_state()


def test_the_sealed_state_shows_nothing_of_its_content(joined: DeviceStateDir) -> None:
    sealed = (joined.folder / statedir.STATE).read_bytes()
    assert b"device-0" not in sealed
    assert stat.S_IMODE((joined.folder / statedir.STATE).stat().st_mode) == 0o600


def test_a_damaged_log_state_is_refused_with_the_command_that_deletes_it(folder: Path) -> None:
    state_dir = DeviceStateDir.open(folder)
    assert state_dir.load(LogState) is None
    (folder / "log.state").write_bytes(b"damaged")
    with refused(TrustError, "log.state") as caught:
        state_dir.load(LogState)
    assert "edgeadapt device forget" in str(caught.value)


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


def test_threads_hold_the_lock_one_at_a_time(folder: Path) -> None:
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


def test_a_session_is_on_the_next_base_if_that_is_what_its_offer_has(
    tmp_path: Path, tiny_base: Any, make_base: Callable[..., Any]
) -> None:
    following = make_base(tmp_path / "next", 4)
    chosen = DeviceSettings(base=str(tiny_base.folder), next_base=str(following.folder))
    state_dir = DeviceStateDir(tmp_path, chosen)
    assert state_dir.base(following.digest) == following
    for digest in ("", tiny_base.digest, "f" * 64):
        assert state_dir.base(digest) == tiny_base


def test_a_next_base_that_is_missing_or_altered_excludes_no_device_from_its_own_base(
    tmp_path: Path, tiny_base: Any
) -> None:
    missing = DeviceStateDir(tmp_path, DeviceSettings(base=str(tiny_base.folder), next_base=str(tmp_path / "later")))
    assert missing.base(tiny_base.digest) == tiny_base
    with refused(ConfigError, "base"):
        missing.base("f" * 64)
    bundle = tmp_path / "bundle"
    (bundle / BASE_MANIFEST).parent.mkdir(parents=True)
    (bundle / BASE_MANIFEST).write_text("{}")
    (tmp_path / "trust.pem").write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    forged = DeviceStateDir(tmp_path, DeviceSettings(base=str(tiny_base.folder), next_base=str(bundle)))
    assert forged.base(tiny_base.digest) == tiny_base
    with pytest.raises(TrustError):
        forged.base("f" * 64)
