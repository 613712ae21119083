"""The log of a repository of channels: what it says, and that it shows what somebody did to it. No bundle is needed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tuf.api.metadata import Metadata, Root, Snapshot, Targets

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from edgeadapt.formats.keyfiles import read_key
from edgeadapt.program import cli
from edgeadapt.releases.actions import HEAD, Action, ActionRecord, LogHead, action_path, digest_of
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.repository import ChannelRepository
from tests.support import refused

NOW = datetime(2026, 11, 27, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository in which six things were done."""
    folder = tmp_path_factory.mktemp("made") / "releases"
    repository = ChannelRepository.create(folder, SystemEntropy(), NOW)
    repository.add_channel("stable-de", SystemEntropy())
    repository.renew()
    repository.rotate("snapshot", SystemEntropy())
    repository.rotate("stable", SystemEntropy())
    repository.renew(everything=True)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "releases"))


def repository(folder: Path) -> ChannelRepository:
    return ChannelRepository.open(folder, NOW)


def records(folder: Path) -> tuple[ActionRecord, ...]:
    return audit_repository(folder, None).records


def found(folder: Path, about: str) -> None:
    with refused(TrustError, about):
        audit_repository(folder, None)


def rewrite(path: Path, key: IdentityKey, **changes: Any) -> bytes:
    """Sign a record again with other values."""
    raw = replace(ActionRecord.unverified(path.read_bytes()), **changes).sign(key)
    path.write_bytes(raw)
    return raw


def online(folder: Path) -> IdentityKey:
    """The key of snapshot and timestamp."""
    roles = {role: keys for role, _, _, keys in repository(folder).metadata.roles()}
    return read_key(roles["snapshot"][0])


# --- what it says


def test_everything_that_was_done_is_in_the_log_in_order(folder: Path) -> None:
    kinds = [(record.number, record.action.kind, record.action.subject) for record in records(folder)]
    assert kinds == [
        *((1, "init", None), (2, "add", "stable-de"), (3, "renew", None)),
        *((4, "rotate", "snapshot"), (5, "rotate", "stable"), (6, "renew", None)),
    ]
    assert {record.made for record in records(folder)} == {NOW.isoformat(timespec="seconds")}


def test_the_log_is_not_served(folder: Path) -> None:
    assert not list((folder / "public").rglob("*log*"))


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp", "canary"])
def test_the_log_goes_on_after_each_rotation(folder: Path, role: str) -> None:
    repository(folder).rotate(role, SystemEntropy())
    repository(folder).renew()
    assert [record.action.kind for record in records(folder)[-2:]] == ["rotate", "renew"]


def test_stable_is_protected_and_what_changes_that_needs_the_key_of_targets(folder: Path) -> None:
    assert repository(folder).protected == {"stable"}
    for off, protected in ((), {"stable", "stable-de"}), (("--off",), {"stable"}):
        done = CliRunner().invoke(cli, ["release", "protect", *off, str(folder), "stable-de"])
        assert done.exit_code == 0, done.output
        assert repository(folder).protected == protected
    repository(folder).rotate("stable", SystemEntropy())
    repository(folder).rotate("targets", SystemEntropy())
    assert repository(folder).protected == {"stable"}
    assert [(each.action.kind, each.action.subject) for each in records(folder)[6:8]] == [
        ("protect", "stable-de"),
        ("unprotect", "stable-de"),
    ]
    with refused(ConfigError, "channel"):
        repository(folder).protect("beta")
    roles = {role: keys for role, _, _, keys in repository(folder).metadata.roles()}
    roles["targets"][0].unlink()
    with refused(ConfigError, "keys"):
        repository(folder).protect("stable", on=False)
    assert repository(folder).protected == {"stable"}


def test_old_targets_that_say_that_a_channel_was_not_protected(folder: Path) -> None:
    place = repository(folder).metadata
    (path, *_) = sorted(place.place.glob("*.targets.json"))
    document = Metadata[Targets].from_bytes(path.read_bytes())
    document.signed.delegations.roles["stable"].unrecognized_fields.clear()  # type: ignore[union-attr,index]
    path.write_bytes(document.to_bytes())
    found(folder, "targets")


def test_an_auditor_needs_no_key(folder: Path) -> None:
    shutil.rmtree(folder / "keys")
    assert len(records(folder)) == 6


def test_an_action_without_its_key_is_not_in_the_log(folder: Path) -> None:
    for path in (folder / "keys").iterdir():
        path.unlink()
    with refused(ConfigError, "keys"):
        repository(folder).renew()
    assert len(records(folder)) == 6


def test_verify_and_show_print_it(folder: Path) -> None:
    root = folder.parent / "root.json"
    root.write_bytes(repository(folder).root())
    done = CliRunner().invoke(cli, ["audit", "verify", str(folder), "--root", str(root)])
    assert (done.exit_code, done.output.count("\n")) == (0, 1), done.output
    assert "6 actions" in done.output
    shown = CliRunner().invoke(cli, ["audit", "show", str(folder)]).output
    assert "    4  2026-11-27T12:00:00+00:00  rotate snapshot\n" in shown
    assert "--root" in shown
    row = json.loads(CliRunner().invoke(cli, ["audit", "verify", str(folder), "--json"]).stdout)
    assert (row["ok"], row["pinned"], len(row["actions"])) == (True, False, 6)


def test_options_for_transcripts_are_refused(folder: Path) -> None:
    done = CliRunner().invoke(cli, ["audit", "verify", str(folder), "--registry", "fleet"])
    assert isinstance(done.exception, ConfigError)
    assert done.exception.about == "--registry"


def test_a_root_is_refused_for_transcripts(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["audit", "verify", str(tmp_path), "--root", "root.json"])
    assert isinstance(done.exception, ConfigError)


# --- kills: nothing is lost, and the next action goes on

KILLED = """
import os, sys
from datetime import UTC, datetime
from pathlib import Path
from edgeadapt.formats import storage
from aggregation.entropy import SystemEntropy
from edgeadapt.releases.repository import ChannelRepository

replaced, left = storage.replace, int(sys.argv[3])

def replace(path, content, *rest):
    global left
    if left == 0:
        os.kill(os.getpid(), 9)
    left -= 1
    replaced(path, content, *rest)

storage.replace = replace
repository = ChannelRepository.open(Path(sys.argv[1]), datetime(2026, 11, 27, 13, tzinfo=UTC))
repository.renew() if sys.argv[2] == "renew" else repository.rotate(sys.argv[2], SystemEntropy())
"""


@pytest.mark.parametrize(("what", "writes"), [("renew", 0), ("renew", 2), ("snapshot", 1)])
def test_an_action_that_was_killed_is_not_in_the_log(folder: Path, what: str, writes: int) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), what, str(writes)], check=False, env=environment)
    assert done.returncode == -9
    audited = audit_repository(folder, None)
    assert [record.action.kind for record in audited.records[5:]] == ["renew"]
    assert audited.unread == (() if writes == 0 else ("7.json",))
    repository(folder).renew()
    assert [record.number for record in records(folder)[5:]] == [6, 7]


def test_a_rotation_that_was_killed_after_its_root_is_ended_by_the_next_action(folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), "snapshot", "2"], check=False, env=environment)
    assert done.returncode == -9
    found(folder, "timestamp")  # the new root names another key than has signed
    repository(folder).renew()
    assert [record.action.kind for record in records(folder)[5:]] == ["renew", "renew"]


# --- attacks


def test_an_altered_record(folder: Path) -> None:
    raw = bytearray(action_path(folder, 3).read_bytes())
    raw[len(raw) // 2] ^= 1
    action_path(folder, 3).write_bytes(raw)
    found(folder, "log")


def test_a_record_that_the_snapshots_key_signed_again(folder: Path) -> None:
    """Who has the key, and not the snapshot's own signature over it, cannot rewrite what was done."""
    rewrite(action_path(folder, 6), online(folder), action=Action("add", "stable"))
    found(folder, "log")


@pytest.mark.parametrize("gone", ["6.json", "1.json", "*"])
def test_a_truncated_log(folder: Path, gone: str) -> None:
    for path in (folder / "log").glob(gone):
        path.unlink()
    found(folder, "log")


def test_a_log_that_was_cut_off_and_named_in_a_snapshot_of_nobody(folder: Path) -> None:
    path = sorted(
        (folder / "public" / "metadata").glob("*.snapshot.json"), key=lambda each: int(each.name.split(".")[0])
    )[-1]
    snapshot = Metadata[Snapshot].from_bytes(path.read_bytes())
    LogHead(5, digest_of(action_path(folder, 5).read_bytes())).put(snapshot.signed)
    path.write_bytes(snapshot.to_bytes())
    found(folder, "snapshot")


def test_reordered_records(folder: Path) -> None:
    first, second = (action_path(folder, number) for number in (2, 3))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    found(folder, "log")


@pytest.mark.parametrize("content", [b"", b"x" * (2**22 + 1), None])
def test_a_record_of_another_repository_or_none(folder: Path, tmp_path: Path, content: bytes | None) -> None:
    if content is None:
        ChannelRepository.create(tmp_path / "other", SystemEntropy(), NOW)
        content = action_path(tmp_path / "other", 1).read_bytes()
    action_path(folder, 1).write_bytes(content)
    found(folder, "log")


def _signed_by_hand(folder: Path, role: str, change: Callable[[Any], None]) -> None:
    """What a thief of a channel's key can do: sign new metadata of the role, past the program and its log."""
    metadata = repository(folder).metadata
    keys = {name: files for name, _, _, files in metadata.roles()}
    version = metadata.version(role)
    document = Metadata[Any].from_bytes(metadata.path(role, version).read_bytes())
    change(document.signed)
    document.sign(metadata.signers([document.signatures.copy().popitem()[0]])[0])
    assert keys[role]
    metadata.path(role, document.signed.version).write_bytes(document.to_bytes())


def test_metadata_that_a_thief_of_the_channels_key_signed_in_place(folder: Path) -> None:
    def other(signed: Targets) -> None:
        signed.version += 1

    _signed_by_hand(folder, "stable", other)
    metadata = repository(folder).metadata
    version = metadata.version("stable")
    shutil.copyfile(metadata.path("stable", version + 1), metadata.path("stable", version))
    found(folder, "stable")


def test_something_done_past_the_log_with_all_keys(folder: Path) -> None:
    """Whoever has the keys, and a program that keeps no log, leaves versions that the log does not account for."""
    before = repository(folder).metadata
    snapshot = before.load(Snapshot, "snapshot")
    head = dict(snapshot.unrecognized_fields[HEAD])
    repository(folder).renew()
    after = repository(folder).metadata
    path = after.path("snapshot", after.version("snapshot"))
    document = Metadata[Snapshot].from_bytes(path.read_bytes())
    document.signed.unrecognized_fields[HEAD] = head
    document.signatures.clear()
    roles = {role: keys for role, _, _, keys in after.roles()}
    document.sign(after.signers([roles["snapshot"][0].stem])[0])
    path.write_bytes(document.to_bytes())
    found(folder, "snapshot")


def test_a_repository_whose_roots_were_replaced(folder: Path, tmp_path: Path) -> None:
    pinned = tmp_path / "root.json"
    pinned.write_bytes(ChannelRepository.create(tmp_path / "other", SystemEntropy(), NOW).root())
    with refused(TrustError, "root"):
        audit_repository(folder, pinned)


def test_a_root_that_the_one_before_did_not_sign(folder: Path, tmp_path: Path) -> None:
    other = ChannelRepository.create(tmp_path / "other", SystemEntropy(), NOW).metadata
    place, number = repository(folder).metadata, repository(folder).metadata.version("root")
    forged = Metadata[Root].from_bytes(other.path("root", 1).read_bytes())
    forged.signed.version = number
    forged.sign(other.signers(forged.signed.roles["root"].keyids)[0])
    place.path("root", number).write_bytes(forged.to_bytes())
    found(folder, "root")


@pytest.mark.parametrize("name", ["timestamp.json", "1.root.json"])
def test_damaged_metadata(folder: Path, name: str) -> None:
    (folder / "public" / "metadata" / name).write_bytes(b"{")
    found(folder, name)


def test_a_damaged_head_of_the_log(folder: Path) -> None:
    with pytest.raises(EdgeAdaptError):
        LogHead.of(Snapshot(unrecognized_fields={HEAD: {"number": "6", "sha256": None}}))
