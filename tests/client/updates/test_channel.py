"""A device follows a channel of a real repository over HTTP; every attack that TUF is for leaves the bundle in use."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner
from tuf.api.metadata import Metadata, Targets

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from client.updates import ChannelSource, follow
from edgeadapt.formats.bundle import adapter_names, adapter_path, manifest_path
from edgeadapt.formats.keyfiles import make_key
from edgeadapt.formats.release import MAX_ADAPTERS, Release
from edgeadapt.program import cli
from edgeadapt.releases.actions import Action, GateResult
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.releases.rollback import roll_back
from export.bundle.write import write_bundle
from export.onnx.exported import ExportedBase
from tests.client.updates.conftest import NOW, Place
from tests.support import refused
from tests.support.bundles import flip, resign, stated


def metadata(place: Place) -> Path:
    return place.folder / "releases" / "public" / "metadata"


def stays(place: Place, kind: type[EdgeAdaptError], word: str) -> None:
    """An update is refused, and the bundle in use answers."""
    with pytest.raises(kind, match=word):
        place.update()
    assert place.version() == 1


# --- what works


def test_a_device_gets_each_release_and_fetches_only_what_is_new(following: Place) -> None:
    assert not following.update().changed
    following.publish(2, seed=5)
    found = following.update()
    assert (found.release.number, found.changed, following.version()) == (2, True, 2)
    new = (adapter_path("global"), manifest_path("global"))
    assert found.fetched == sum((following.bundle / path).stat().st_size for path in new)


def test_an_adapter_that_the_release_withdrew_is_deleted_though_nothing_is_new(place: Place) -> None:
    both = [place.source(name, 0, 1) for name in ("global", "other")]
    for sources in (both, both[:1]):
        shutil.rmtree(place.made, ignore_errors=True)
        write_bundle(place.made, place.exported, sources, key=place.vendor)
        place.repository.publish("stable", place.made, [place.vendor.public])
        place.follow()
        assert place.update().changed
        assert adapter_names(place.bundle) == [one.name for one in sources]
        assert not place.update().changed


def test_a_release_goes_through_the_canary_to_stable(following: Place) -> None:
    following.publish(2, seed=5, channel="canary")
    assert not following.update().changed
    following.repository.promote("canary", 1, "stable", ())
    assert following.update().release.number == 2
    assert following.version() == 2


def test_a_rollback_brings_the_old_content_back_under_a_new_version(following: Place, vendor: IdentityKey) -> None:
    before = stated(following.bundle)
    following.publish(2, seed=5)
    following.update()
    following.version()  # the device has used it: it would refuse version 1 now
    roll_back(following.repository, "stable", 1, vendor)
    following.update()
    assert following.version() == 3
    assert stated(following.bundle).content == before.content


def test_private_adapters_stay_and_are_never_published(
    following: Place, household: IdentityKey, with_anna: Path
) -> None:
    for path in (manifest_path("anna"), adapter_path("anna")):
        shutil.copyfile(with_anna / path, following.bundle / path)
    following.publish(2, seed=5)
    following.update()
    assert adapter_names(following.bundle) == ["anna", "global"]
    resign(following.bundle, following.vendor, "global", version=3)
    found = following.repository.publish("stable", following.bundle, [following.vendor.public, household.public])
    assert found.private == ("anna",)
    assert not [path for path in following.repository.targets.folder.rglob("*") if "anna" in path.name]


def test_a_private_adapter_for_another_base_is_set_aside(
    following: Place, exported_int8: ExportedBase, household: IdentityKey, with_anna: Path
) -> None:
    for path in (manifest_path("anna"), adapter_path("anna")):
        shutil.copyfile(with_anna / path, following.bundle / path)
    resign(following.bundle, household, "anna", base_digest="0" * 64)
    following.publish(2, seed=5, exported=exported_int8)
    private = (following.bundle / manifest_path("anna")).read_bytes()
    (aside,) = following.update().set_aside
    assert aside.read_bytes() == private
    assert adapter_names(following.bundle) == ["global"]
    assert (aside.parent / adapter_path("anna").name).is_file()


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "stable"])
def test_devices_follow_a_rotated_key(following: Place, role: str) -> None:
    old = {path.name for path in (following.folder / "releases" / "keys").iterdir()}
    following.repository.rotate(role, SystemEntropy())
    assert len({path.name for path in (following.folder / "releases" / "keys").iterdir()} - old) == 1
    following.publish(2, seed=5)
    assert following.update().release.number == 2


def test_an_update_that_was_killed_goes_on_with_what_it_has(following: Place) -> None:
    following.publish(2, seed=5)
    code = (
        "import os, signal, sys; from pathlib import Path; from aggregation.entropy import SystemEntropy;"
        "from client.updates import update; seen = [];"
        "note = lambda *file: (seen.append(file), len(seen) == 2 and os.kill(os.getpid(), 9));"
        "update(Path(sys.argv[1]), None, note, entropy=SystemEntropy())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(following.bundle)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert following.version() == 1
    found = following.update()
    assert following.version() == 2
    sizes = [(following.bundle / path).stat().st_size for path in (adapter_path("global"), manifest_path("global"))]
    assert found.fetched in sizes  # one of the two new files was there already


# --- attacks, by the names of the TUF specification


def test_rollback_attack(following: Place) -> None:
    old = following.folder / "old"
    shutil.copytree(metadata(following), old)
    following.publish(2, seed=5)
    following.update()
    shutil.rmtree(metadata(following))
    shutil.copytree(old, metadata(following))
    with refused(TrustError, "repository.version"):
        following.update()
    assert following.version() == 2


def test_freeze_attack(place: Place) -> None:
    place.repository = ChannelRepository(place.repository.folder, NOW - timedelta(days=8))
    place.publish(1)
    place.follow()
    with refused(TrustError, "repository.expired"):
        place.update()
    assert not place.bundle.exists()
    ChannelRepository(place.repository.folder, NOW).renew()
    assert place.update().release.number == 1


def test_mix_and_match_attack(following: Place) -> None:
    """Metadata of the channel from another state of the repository, under the name of the current one."""
    following.publish(2, seed=5)
    newest = max(metadata(following).glob("*.stable.json"), key=lambda path: int(path.name.split(".")[0]))
    shutil.copyfile(metadata(following) / "2.stable.json", newest)
    stays(following, TrustError, "stays")


def test_endless_data_attack(following: Place) -> None:
    following.publish(2, seed=5)
    digest = stated(following.made).sha256
    (path,) = following.repository.targets.folder.rglob(f"{digest}.*")
    path.write_bytes(path.read_bytes() + bytes(2**20))
    stays(following, TrustError, "a file is not what the repository has signed")


def test_arbitrary_software_attack(following: Place) -> None:
    following.publish(2, seed=5)
    (path,) = following.repository.targets.folder.rglob(f"{stated(following.made).sha256}.*")
    flip(path, 0.5)
    stays(following, TrustError, "a file is not what the repository has signed")


@pytest.mark.parametrize("role", ["timestamp", "3.snapshot", "2.stable"])
def test_metadata_that_nobody_signed(following: Place, role: str) -> None:
    shutil.rmtree(following.device / "updates" / "metadata")  # a device that has accepted nothing yet
    path = metadata(following) / f"{role}.json"
    content = json.loads(path.read_bytes())
    content["signed"]["expires"] = "2100-01-01T00:00:00Z"
    path.write_text(json.dumps(content))
    stays(following, TrustError, "stays")


def test_a_channel_cannot_sign_for_another_one(following: Place) -> None:
    """A stolen canary key: a file that it signs under the name of stable is not looked at."""
    repository = following.repository
    following.publish(2, seed=5, channel="canary")
    signed = repository.metadata.load(Targets, "canary")
    for path in list(signed.targets):
        signed.targets[path.replace("canary/", "stable/")] = signed.targets[path]
    repository.metadata.commit(Action("publish", "canary"), {"canary": signed})
    assert not following.update().changed
    assert following.version() == 1


def test_a_repository_of_another_vendor(following: Place) -> None:
    other = ChannelRepository.create(following.folder / "other", SystemEntropy(), NOW)
    shutil.rmtree(following.repository.folder / "public")
    shutil.copytree(other.folder / "public", following.repository.folder / "public")
    stays(following, TrustError, "not signed as its root demands|older than it was|one state")
    (following.folder / "other.json").write_bytes(other.root())
    with pytest.raises(ConfigError, match="another root"):
        follow(following.bundle, ChannelSource(following.address, "stable"), following.folder / "other.json")


def test_a_release_whose_bundle_the_vendor_did_not_sign(
    following: Place, household: IdentityKey, tmp_path: Path
) -> None:
    """Whoever has the channel's key, and not the vendor's, cannot bring an adapter to a device."""
    stranger = IdentityKey.generate(SystemEntropy())
    write_bundle(following.made, following.exported, [following.source("global", seed=5)], key=stranger)
    resign(following.made, stranger, version=2)
    following.repository.publish("stable", following.made, [stranger.public])
    with refused(TrustError, "keyid"):
        following.update()
    assert following.version() == 1


# --- bad input and bad luck


def test_a_release_that_devices_would_refuse_is_not_published(following: Place) -> None:
    with pytest.raises(ConfigError, match="under the version 2 or later"):
        following.publish(1, seed=5)
    assert not following.update().changed


def test_a_full_disk_leaves_the_bundle_in_use(following: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    following.publish(2, seed=5)

    def full(old: object, new: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(new))

    with monkeypatch.context() as patch:
        patch.setattr("edgeadapt.formats.storage.link_or_copy", full)
        with pytest.raises(OSError, match="No space"):
            following.update()
    assert following.version() == 1
    assert following.update().changed


def test_a_server_that_is_down(following: Place) -> None:
    shutil.rmtree(following.repository.folder / "public")
    stays(following, ConfigError, "cannot be read")


@pytest.mark.parametrize(
    ("repository", "channel", "word"),
    [
        ("ftp://example.org", "stable", "neither"),
        ("nowhere", "stable", "neither"),
        ("http://x", "Root", "not the name"),
    ],
)
def test_a_source_that_cannot_be_one(place: Place, repository: str, channel: str, word: str) -> None:
    (place.folder / "root.json").write_bytes(place.repository.root())
    with pytest.raises(ConfigError, match=word):
        follow(place.bundle, ChannelSource(repository, channel), place.folder / "root.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"signed": 1}'])
def test_a_damaged_root_is_not_pinned(place: Place, content: bytes) -> None:
    (place.folder / "root.json").write_bytes(content)
    with pytest.raises((TrustError, DataError)):
        follow(place.bundle, ChannelSource(place.address, "stable"), place.folder / "root.json")
    with pytest.raises(ConfigError, match="follows no channel"):
        place.update()


def test_a_root_that_is_altered_is_not_pinned(place: Place) -> None:
    content = json.loads(place.repository.root())
    content["signed"]["expires"] = "2100-01-01T00:00:00Z"
    (place.folder / "root.json").write_text(json.dumps(content))
    with pytest.raises(TrustError, match="not a root that its own keys have signed"):
        follow(place.bundle, ChannelSource(place.address, "stable"), place.folder / "root.json")


@pytest.mark.parametrize(
    "path", ["../trust.pem", "base/../../x", "/etc/passwd", "base/.hidden", "adapters/a/b", "base/", "other/x"]
)
def test_a_release_names_no_file_outside_of_a_bundle(path: str) -> None:
    good = Release(1, "now", {"base/manifest.json": "0" * 64}, {"global": 1})
    assert Release.decode(good.encode()) == good
    raw = good.encode().replace(b"base/manifest.json", path.encode())
    with refused(TrustError, "release.json"):
        Release.decode(raw)


def test_a_release_has_at_most_so_many_adapters() -> None:
    good = Release(1, "now", {"base/manifest.json": "0" * 64}, {f"a{number}": 1 for number in range(MAX_ADAPTERS)})
    assert Release.decode(good.encode()) == good
    with refused(TrustError, "release.json"):
        Release.decode(replace(good, adapters={**good.adapters, "one-more": 1}).encode())


def test_a_key_that_is_kept_elsewhere_is_named(following: Place) -> None:
    (keys,) = [keys for role, _, _, keys in following.repository.metadata.roles() if role == "stable"]
    away = keys[0].rename(following.folder / "away.pem")
    before = sorted(path.name for path in metadata(following).iterdir())
    with pytest.raises(ConfigError, match="bring the key back"):
        following.publish(2, seed=5)
    assert sorted(path.name for path in metadata(following).iterdir()) == before
    following.repository.renew()  # needs the keys of snapshot and timestamp only
    away.rename(keys[0])
    following.publish(2, seed=5)
    assert following.update().changed


# --- the commands


def test_the_commands_from_a_repository_to_a_device(place: Place, tmp_path: Path) -> None:
    key, public = make_key(tmp_path / "vendor.key", SystemEntropy())
    write_bundle(place.made, place.exported, [place.source("global")], key=key)

    def run(*words: object) -> str:
        found = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.output

    mine = tmp_path / "mine"
    run("release", "init", mine)
    run("release", "publish", mine, "canary", "--bundle", place.made, "--trust", public)
    passed = GateResult("size of global", True, 1.0, 2.0, "1 byte")
    ChannelRepository.open(mine, NOW).promote("canary", 1, "stable", [passed])
    run("release", "renew", mine, "stable", "--new-key")
    run("release", "renew", mine, "--all")
    assert json.loads(run("release", "show", mine, "--json"))["channels"]["stable"]["number"] == 1
    assert "release 1" in run("release", "show", mine)
    (place.device / "trust.pem").write_bytes(public.read_bytes())
    words = ("device", "update", "--bundle", place.bundle)
    shown = run(*words, "--repository", mine / "public", "--channel", "stable", "--root", mine / "root.json")
    assert "stable, release 1" in shown
    assert "already there" in run(*words)
    assert json.loads(run(*words, "--json"))["changed"] is False
    assert Metadata.from_file(str(mine / "root.json")).signed.version == 2
    done = [each["action"] for each in json.loads(run("audit", "verify", mine, "--json"))["actions"]]
    assert [each["kind"] for each in done] == ["init", "publish", "promote", "rotate", "renew"]
    assert (done[1]["subject"], done[1]["release"], done[2]["source"]) == ("canary", 1, "canary")


def test_a_release_that_was_put_in_the_place_of_the_one_in_the_log(following: Place) -> None:
    """Whoever has the channel's key alone replaces the file of a release: the log states its digest."""
    following.publish(2, seed=5)
    place = following.repository.metadata
    path = place.path("stable", place.version("stable"))
    document = Metadata[Targets].from_bytes(path.read_bytes())
    document.signed.targets["stable/release.json"].hashes["sha256"] = "0" * 64
    (keyid,) = document.signatures
    document.sign(place.signers([keyid])[0])
    path.write_bytes(document.to_bytes())
    with refused(TrustError, "stable"):
        audit_repository(following.repository.folder, None)
