"""Enrolment creates the key on the device, and accepts only a certificate of the anchors authority for this key."""

import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.pki import Authority, certificates, requests
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import Revocation
from aggregation.transcript.logstate import LogState
from client.cli import device
from client.node.adapterstate import AdapterState
from client.node.statedir import (
    CERTIFICATE,
    IDENTITY,
    LOCK,
    LOG_STATE,
    REQUEST,
    DeviceSettings,
    DeviceStateDir,
    TrustAnchors,
    enrol,
    install_certificate,
)
from tests.support import refused

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
DIGEST = "b" * 64


@pytest.fixture
def authority() -> Authority:
    return Authority.create("fleet", SystemEntropy(), NOW - DAY, NOW + 365 * DAY)


@pytest.fixture
def anchors(authority: Authority) -> TrustAnchors:
    return TrustAnchors(authority.root.to_pem(), IdentityKey.generate(SystemEntropy()).public.to_pem())


@pytest.fixture
def state_dir(tmp_path: Path, anchors: TrustAnchors) -> DeviceStateDir:
    enrol(tmp_path / "kitchen", "kitchen", DeviceSettings(base="some_base"), anchors, SystemEntropy())
    return DeviceStateDir.open(tmp_path / "kitchen")


def certified(authority: Authority, state_dir: DeviceStateDir, serial: int = 7, days: int = 30) -> bytes:
    name, key = requests.read_request((state_dir.folder / REQUEST).read_bytes())
    return authority.issue(name, key, not_before=NOW - DAY, not_after=NOW + days * DAY, serial=serial)


def test_a_device_is_enrolled_once_its_certificate_is_there(authority: Authority, state_dir: DeviceStateDir) -> None:
    with refused(TrustError, "certificate.der"):
        state_dir.device(DIGEST)
    der = certified(authority, state_dir)
    assert install_certificate(state_dir, certificates.to_pem(der), NOW) == ("kitchen", NOW + 30 * DAY)
    assert state_dir.device(DIGEST).certificate == der
    assert (
        state_dir.device(DIGEST).identity.public == requests.read_request((state_dir.folder / REQUEST).read_bytes())[1]
    )


def test_the_private_key_is_in_one_file_that_its_owner_alone_can_read(state_dir: DeviceStateDir) -> None:
    holding = [path.name for path in state_dir.folder.iterdir() if b"PRIVATE" in path.read_bytes()]
    assert holding == [IDENTITY]
    assert {stat.S_IMODE(path.stat().st_mode) for path in state_dir.folder.iterdir()} == {0o600}
    assert stat.S_IMODE(state_dir.folder.stat().st_mode) == 0o700


def test_a_newer_certificate_takes_the_place_of_the_older(authority: Authority, state_dir: DeviceStateDir) -> None:
    install_certificate(state_dir, certified(authority, state_dir), NOW)
    assert install_certificate(state_dir, certified(authority, state_dir, serial=8, days=60), NOW)[1] == NOW + 60 * DAY


@pytest.mark.parametrize(
    ("wrong", "about"),
    [
        ("authority", "certificate.issuer"),
        ("key", "certificate.key"),
        ("expired", "certificate.validity"),
        ("revoked", "certificate.revoked"),
        ("request", "certificate"),
        ("junk", "certificate"),
    ],
)
def test_a_wrong_certificate_is_refused_and_the_old_one_stays(
    authority: Authority, state_dir: DeviceStateDir, tmp_path: Path, anchors: TrustAnchors, wrong: str, about: str
) -> None:
    install_certificate(state_dir, certified(authority, state_dir), NOW)
    before = (state_dir.folder / CERTIFICATE).read_bytes()
    if wrong == "key":
        enrol(tmp_path / "other", "kitchen", DeviceSettings(base="some_base"), anchors, SystemEntropy())
    if wrong == "revoked":
        state_dir.revoke(authority.revocations(1, {8: Revocation(NOW)}, NOW, NOW + DAY).der)
    stranger = Authority.create("fleet", SystemEntropy(), NOW - DAY, NOW + DAY)
    given: dict[str, Callable[[], bytes]] = {
        "authority": lambda: certified(stranger, state_dir),
        "key": lambda: certified(authority, DeviceStateDir.open(tmp_path / "other")),
        "expired": lambda: certified(authority, state_dir, days=-0),
        "revoked": lambda: certified(authority, state_dir, serial=8),
        "request": lambda: (state_dir.folder / REQUEST).read_bytes(),
        "junk": lambda: b"junk",
    }
    at = NOW + DAY if wrong == "expired" else NOW
    with refused(TrustError, about):
        install_certificate(state_dir, given[wrong](), at)
    assert (state_dir.folder / CERTIFICATE).read_bytes() == before


def test_enrolment_refuses_a_folder_that_is_not_empty(
    tmp_path: Path, state_dir: DeviceStateDir, anchors: TrustAnchors
) -> None:
    before = {path: path.read_bytes() for path in state_dir.folder.iterdir()}
    with refused(ConfigError, "kitchen"):
        enrol(state_dir.folder, "kitchen", DeviceSettings(base="some_base"), anchors, SystemEntropy())
    assert {path: path.read_bytes() for path in state_dir.folder.iterdir()} == before


def test_enrolment_refuses_the_working_directory(
    tmp_path: Path, anchors: TrustAnchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(ConfigError, tmp_path.name):
        enrol(Path(), "kitchen", DeviceSettings(base="some_base"), anchors, SystemEntropy())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_enrolment_leaves_no_files(
    tmp_path: Path, anchors: TrustAnchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Exhausted:
        def __init__(self) -> None:
            self.left = 1

        def bytes(self, n: int) -> bytes:
            self.left -= 1
            if self.left < 0:
                raise OSError(5, "no entropy")
            return bytes(range(n))

    with pytest.raises(OSError, match="no entropy"):
        enrol(tmp_path / "kitchen", "kitchen", DeviceSettings(base="some_base"), anchors, Exhausted())
    with refused(ConfigError, "device.id", value="a b"):
        enrol(tmp_path / "kitchen", "a b", DeviceSettings(base="some_base"), anchors, SystemEntropy())
    assert list(tmp_path.iterdir()) == []


def test_wrong_trust_anchors_are_refused(authority: Authority, anchors: TrustAnchors) -> None:
    with refused(TrustError, "authority.certificate"):
        TrustAnchors(anchors.coordinator, anchors.coordinator)
    with refused(TrustError, "key.pem"):
        TrustAnchors(anchors.authority, authority.root.to_pem())


def test_the_path_of_a_base_is_made_absolute(
    tmp_path: Path, anchors: TrustAnchors, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bases").mkdir()
    monkeypatch.chdir(tmp_path)
    enrol(Path("kitchen"), "kitchen", DeviceSettings(base="bases"), anchors, SystemEntropy())
    assert DeviceStateDir.open(tmp_path / "kitchen").settings.base == str((tmp_path / "bases").resolve())


# The revocation list


def test_a_device_keeps_the_newest_revocation_list_and_refuses_an_older_one(
    authority: Authority, state_dir: DeviceStateDir
) -> None:
    first, second = (authority.revocations(n, {}, NOW, NOW + DAY) for n in (1, 2))
    state_dir.revoke(second.der)
    state_dir.revoke(second.to_pem())
    assert state_dir.root().revoked == second
    with refused(TrustError, "revocations.number"):
        state_dir.revoke(first.der)
    stranger = Authority.create("fleet", SystemEntropy(), NOW - DAY, NOW + DAY)
    with refused(TrustError, "revocations.signature"):
        state_dir.revoke(stranger.revocations(9, {}, NOW, NOW + DAY).der)
    assert DeviceStateDir.open(state_dir.folder).root().revoked == second


# The commands


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(device, [str(argument) for argument in arguments])


def about(result: Result) -> str:
    """What the error of a command is about."""
    assert isinstance(result.exception, EdgeAdaptError), (result.output, result.exception)
    return result.exception.about


def ok(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_from_enrol_to_install_by_command(tmp_path: Path, authority: Authority, anchors: TrustAnchors) -> None:
    (tmp_path / "authority.pem").write_bytes(anchors.authority)
    (tmp_path / "coordinator.pem").write_bytes(anchors.coordinator)
    state_dir = tmp_path / "kitchen"
    files = ("--authority", tmp_path / "authority.pem", "--coordinator", tmp_path / "coordinator.pem")
    said = ok(run("enrol", "--state", state_dir, "--name", "kitchen", "--base", "some_base", *files))
    name, key = requests.read_request((state_dir / REQUEST).read_bytes())
    assert name == "kitchen"
    assert key.key_id in said
    assert authority.root.fingerprint in said
    (tmp_path / "kitchen.pem").write_bytes(certificates.to_pem(certified(authority, DeviceStateDir.open(state_dir))))
    (tmp_path / "revoked.crl").write_bytes(authority.revocations(1, {}, NOW, NOW + DAY).to_pem())
    installed = ("--certificate", tmp_path / "kitchen.pem", "--revoked", tmp_path / "revoked.crl")
    assert "kitchen is enrolled until" in ok(run("enrol", "--state", state_dir, *installed))
    assert DeviceStateDir.open(state_dir).device(DIGEST).root.revoked is not None
    assert about(run("enrol", "--state", state_dir)) == "--base"


def test_enrol_sets_keys_of_the_owners_settings(tmp_path: Path, anchors: TrustAnchors) -> None:
    (tmp_path / "authority.pem").write_bytes(anchors.authority)
    (tmp_path / "coordinator.pem").write_bytes(anchors.coordinator)
    files = ("--authority", tmp_path / "authority.pem", "--coordinator", tmp_path / "coordinator.pem")
    enrolled = ("enrol", "--state", tmp_path / "kitchen", "--name", "kitchen", "--base", "some_base", *files)
    assert about(run(*enrolled, "--set", "policy.minimum_cohurt=3")) == "policy.minimum_cohurt"
    assert about(run(*enrolled, "--set", "policy.minimum_cohort=2")) == "policy.minimum_cohort"
    assert about(run(*enrolled, "--set", "policy.minimum_cohort=3")) == "policy"  # no cohort of 3 has 4 honest devices
    assert not (tmp_path / "kitchen").exists()
    few = ("--set", "policy.minimum_cohort=3", "--set", "policy.minimum_survivors=2")
    ok(run(*enrolled, *few, "--set", "examples=mine.jsonl"))
    settings = DeviceStateDir.open(tmp_path / "kitchen").settings
    assert (settings.policy.minimum_cohort, settings.examples, settings.base) == (3, "mine.jsonl", "some_base")


def test_forget_asks_for_confirmation(state_dir: DeviceStateDir) -> None:
    (state_dir.folder / LOG_STATE).write_bytes(b"damaged")
    with refused(TrustError, LOG_STATE):
        state_dir.load(LogState)
    for typed in ("n\n", ""):
        assert about(CliRunner().invoke(device, ["forget", "--state", str(state_dir.folder)], input=typed)) == "--yes"
    assert (state_dir.folder / LOG_STATE).exists()
    ok(run("forget", "--state", state_dir.folder, "--yes"))
    assert state_dir.load(LogState) is None


def test_forget_deletes_what_a_device_knows_of_the_coordinator_and_nothing_of_its_own(
    state_dir: DeviceStateDir,
) -> None:
    before = {path.name: path.read_bytes() for path in state_dir.folder.iterdir()}
    state_dir.save(AdapterState(3, "ab" * 32, bytes(32)))
    state_dir.take_snapshot(b"examples", bytes(32))
    for name in ("session.sealed", "log.state"):
        (state_dir.folder / name).write_bytes(b"anything")
    ok(run("forget", "--state", state_dir.folder, "--yes"))
    assert {path.name: path.read_bytes() for path in state_dir.folder.iterdir() if path.name != LOCK} == before


def test_forget_refuses_a_folder_that_is_not_a_state_directory_before_it_asks(tmp_path: Path) -> None:
    result = run("forget", "--state", tmp_path)
    assert about(result) == "device.toml"
    assert result.output == ""


@pytest.mark.parametrize("option", ["--certificate", "--revoked"])
def test_a_file_that_cannot_be_installed_is_named(state_dir: DeviceStateDir, tmp_path: Path, option: str) -> None:
    (tmp_path / "given").write_text("nothing of the kind")
    result = run("enrol", "--state", state_dir.folder, option, tmp_path / "given")
    assert isinstance(result.exception, TrustError)
    assert str(result.exception).startswith(f"{tmp_path / 'given'}: ")


@pytest.mark.parametrize("there", [True, False])
def test_a_state_directory_may_be_a_link_to_an_empty_folder(tmp_path: Path, anchors: TrustAnchors, there: bool) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "kitchen")
    if there:
        (tmp_path / "disk" / "kitchen").mkdir(parents=True)
    enrol(tmp_path / "link", "kitchen", DeviceSettings(base="some_base"), anchors, SystemEntropy())
    assert DeviceStateDir.open(tmp_path / "disk" / "kitchen").root() == DeviceStateDir.open(tmp_path / "link").root()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]
