"""A release is rolled out to a share of devices over HTTP, grows, shrinks and is taken back."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata, TargetFile, Targets

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError
from client.updates import ChannelSource, Updated, follow, update
from client.updates.channel import TARGETING, Targeting
from edgeadapt.formats.release import FLAGS, Rollout
from edgeadapt.releases.actions import Action
from edgeadapt.releases.history import audit_repository
from tests.client.updates.conftest import Handler, Place
from tests.support import refused
from tests.support.bundles import flip, stated
from tests.support.rollout import run

KEYS = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(2000)]


def chosen(rollout: Rollout, language: str | None = None, keys: list[str] = KEYS) -> set[str]:
    """The keys whose devices get the newest release."""
    return {key for key in keys if Targeting(key, language).release(rollout) == rollout.release}


@dataclass
class Device:
    """One that follows the stable channel."""

    bundle: Path

    @classmethod
    def of(cls, place: Place, name: str, key: str | None = None) -> "Device":
        folder = place.folder / name
        folder.mkdir()
        (folder / "trust.pem").write_bytes((place.device / "trust.pem").read_bytes())
        (place.folder / "root.json").write_bytes(place.repository.root())
        follow(folder / "bundle", ChannelSource(place.address, "stable"), place.folder / "root.json")
        if key is not None:
            Targeting(key).write(folder / "updates")
        return cls(folder / "bundle")

    def update(self, language: str | None = None) -> Updated:
        return update(self.bundle, language=language, entropy=SystemEntropy())

    @property
    def targeting(self) -> Path:
        return self.bundle.parent / "updates" / TARGETING

    @property
    def content(self) -> str:
        return stated(self.bundle).content


@pytest.fixture
def canary(place: Place) -> Place:
    """Stable has release 1; a better one is in the canary channel."""
    place.publish(1)
    place.publish(2, seed=5, channel="canary")
    return place


def stage(place: Place, share: int, languages: tuple[str, ...] = ()) -> None:
    place.repository.promote("canary", 1, "stable", (), share=share, languages=languages)


@pytest.fixture
def staged(canary: Place) -> Place:
    """Release 2 of stable is for half of the devices."""
    stage(canary, 50)
    return canary


IN = next(key for key in KEYS if Targeting(key).release(Rollout(2, 1, 10)) == 2)
OUT = next(key for key in KEYS if Targeting(key).release(Rollout(2, 1, 50)) == 1)


# --- who is in


def test_a_device_that_is_in_stays_in_as_the_share_grows() -> None:
    before: set[str] = set()
    for share in (0, 1, 10, 50, 99, 100):
        now = chosen(Rollout(2, 1, share))
        assert before <= now
        assert abs(len(now) - len(KEYS) * share / 100) < 4 * (len(KEYS) / 4) ** 0.5
        before = now
    assert before == set(KEYS)


def test_another_release_begins_with_other_devices() -> None:
    first, second = chosen(Rollout(2, 1, 20)), chosen(Rollout(3, 2, 20))
    assert len(first & second) < 0.3 * len(first)  # 0.2 if they are independent


def test_a_language_is_a_condition_and_the_share_is_of_its_devices() -> None:
    rollout = Rollout(2, 1, 30, ("de", "fr"))
    assert not chosen(rollout)
    assert not chosen(rollout, "en")
    assert chosen(rollout, "de") == chosen(rollout, "fr") == chosen(Rollout(2, 1, 30))


# --- the way of a release


def test_each_device_gets_its_release_and_says_why(staged: Place) -> None:
    one, other = Device.of(staged, "one", IN), Device.of(staged, "other", OUT)
    assert one.update().release.number == 2
    assert other.update().release.number == 1
    assert one.content != other.content
    shown = run("device", "update", "--bundle", other.bundle)
    assert "release 2 is for 50 % of devices, and this is not one of them" in shown
    row = json.loads(run("device", "update", "--bundle", one.bundle, "--json"))
    assert (row["release"], row["chosen"], row["changed"]) == (2, True, False)


def test_only_what_differs_is_kept_of_the_previous_release(staged: Place) -> None:
    kept = {path.parent.name for path in staged.repository.targets.folder.rglob("*") if "previous" in str(path)}
    assert kept >= {"previous-adapters"}
    assert "previous-base" not in kept


def test_the_share_grows_until_all_devices_have_it(staged: Place) -> None:
    other = Device.of(staged, "other", OUT)
    assert other.update().release.number == 1
    needed = next(share for share in count(51) if Targeting(OUT).release(Rollout(2, 1, share)) == 2)
    run("release", "rollout", staged.repository.folder, "stable", "--share", needed)
    assert other.update().release.number == 2
    run("release", "rollout", staged.repository.folder, "stable", "--share", 100)
    found = other.update()
    assert (found.changed, found.offer.rollout, found.offer.why) == (False, None, "for all devices")
    targets = staged.repository.metadata.load(Targets, "stable").targets
    assert not [path for path in targets if "previous" in path or FLAGS in path]
    assert Device.of(staged, "new").update().release.number == 2


def test_a_device_never_goes_back_when_the_share_shrinks(staged: Place) -> None:
    one = Device.of(staged, "one", IN)
    one.update()
    newest = one.content
    run("release", "rollout", staged.repository.folder, "stable", "--share", 0)
    found = one.update()
    assert (found.release.number, found.changed, one.content) == (2, False, newest)
    assert "does not go back" in found.offer.why
    assert Device.of(staged, "new", IN).update().release.number == 1


def test_a_rollout_by_language(canary: Place) -> None:
    stage(canary, 100, ("de",))
    one, other = Device.of(canary, "one", OUT), Device.of(canary, "other", OUT)
    assert one.update("de").release.number == 2
    assert one.update().release.number == 2  # it is noted
    assert other.update("en").release.number == 1
    assert "100 % of devices with language de" in run("release", "show", canary.repository.folder)
    key = json.loads(one.targeting.read_bytes())["key"]
    with refused(ConfigError, "language"):
        one.update("Deutsch")
    assert json.loads(one.targeting.read_bytes()) == {"key": key, "language": "de"}


def test_a_bad_canary_is_off_every_device_at_its_next_check(staged: Place) -> None:
    """A clock of check-ins: the rollback is after the one at 2, and at 3 no device has the bad release."""
    bad = stated(staged.made).content  # of what the last publication made: the canary
    devices = [Device.of(staged, f"device{number}", key) for number, key in enumerate((IN, *KEYS[:5], OUT))]
    folder, key = staged.repository.folder, staged.folder / "vendor.key"
    key.write_bytes(staged.vendor.to_pem())
    key.chmod(0o600)
    by_time = []
    for time in range(4):
        by_time.append([(device.update().changed, device.content == bad) for device in devices])
        if time == 2:
            run("release", "rollback", folder, "stable", "--to", 1, "--key", key)
    assert sum(has for _, has in by_time[0]) >= 1
    assert not all(has for _, has in by_time[0])
    assert [has for _, has in by_time[2]] == [has for _, has in by_time[0]]
    assert not any(has for _, has in by_time[3])
    assert all(changed for changed, _ in by_time[3])
    assert len({device.content for device in devices}) == 1
    assert {stated(device.bundle).version for device in devices} == {3}
    kinds = [record.action.kind for record in audit_repository(folder, None).records]
    assert kinds[-2:] == ["promote", "rollback"]


# --- privacy


def test_the_key_is_made_once_and_never_sent(staged: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []
    real = Handler.do_GET

    def noted(self: Any) -> None:
        sent.append(f"{self.path} {self.headers}")
        real(self)

    monkeypatch.setattr(Handler, "do_GET", noted, raising=False)
    device = Device.of(staged, "new")
    device.update()
    first = device.targeting.read_bytes()
    assert device.targeting.stat().st_mode & 0o777 == 0o600
    device.update()
    assert device.targeting.read_bytes() == first
    assert len(sent) > 4
    assert not [each for each in sent if json.loads(first)["key"] in each]
    other = Device.of(staged, "another")
    other.update()
    assert other.targeting.read_bytes() != first


def test_a_device_makes_no_key_before_a_rollout(canary: Place) -> None:
    device = Device.of(canary, "new")
    device.update()
    assert not device.targeting.exists()


# --- the log


def test_the_log_has_each_stage_and_the_audit_accounts_for_it(staged: Place) -> None:
    folder = staged.repository.folder
    run("release", "rollout", folder, "stable", "--share", 70, "--language", "fr", "--language", "de")
    run("release", "rollout", folder, "stable", "--share", 100)
    records = audit_repository(folder, None).records[-3:]
    assert [record.action.kind for record in records] == ["promote", "rollout", "rollout"]
    assert [record.action.release for record in records] == [2, 2, 2]
    stages = [record.action.rollout for record in records]
    assert stages == [Rollout(2, 1, 50), Rollout(2, 1, 70, ("de", "fr")), None]
    assert "for 70 % of devices with language de, fr" in run("audit", "show", folder)


def sign(place: Place, rollout: Rollout | None) -> None:
    """What a thief of the channel's key does: other flags in the current metadata."""
    metadata, repository = place.repository.metadata, place.repository
    path = metadata.path("stable", metadata.version("stable"))
    document = Metadata[Targets].from_bytes(path.read_bytes())
    name = f"stable/{FLAGS}"
    if rollout is None:
        del document.signed.targets[name]
    else:
        raw = rollout.encode()
        described = TargetFile.from_data(name, raw, ["sha256"])
        document.signed.targets[name] = described
        (repository.targets.folder / "stable" / f"{described.hashes['sha256']}.{FLAGS}").write_bytes(raw)
    (keyid,) = document.signatures
    document.sign(metadata.signers([keyid])[0])
    path.write_bytes(document.to_bytes())


@pytest.mark.parametrize("rollout", [Rollout(2, 1, 90), Rollout(2, 1, 50, ("de",)), None])
def test_flags_that_the_log_does_not_state(staged: Place, rollout: Rollout | None) -> None:
    audit_repository(staged.repository.folder, None)
    sign(staged, rollout)
    with refused(TrustError, "stable"):
        audit_repository(staged.repository.folder, None)


# --- attacks and bad input


@pytest.mark.parametrize("rollout", [Rollout(3, 1, 50), Rollout(1, 1, 50)])
def test_flags_of_another_release(staged: Place, rollout: Rollout) -> None:
    sign(staged, rollout)
    with refused(TrustError, FLAGS):
        Device.of(staged, "new", OUT).update()


def test_flags_that_name_another_previous_release(staged: Place) -> None:
    sign(staged, Rollout(2, 0, 50))
    with refused(TrustError, FLAGS):
        Device.of(staged, "new", OUT).update()


def test_flags_that_were_altered_on_the_way(staged: Place) -> None:
    (path,) = staged.repository.targets.folder.rglob(f"*.{FLAGS}")
    flip(path, 0.5)
    device = Device.of(staged, "new", IN)
    with refused(TrustError, "repository.file"):
        device.update()
    assert not device.bundle.exists()


def test_a_channel_cannot_roll_out_in_another_one(staged: Place) -> None:
    """A stolen canary key signs flags under the name of stable: they are not looked at."""
    repository = staged.repository
    signed = repository.metadata.load(Targets, "canary")
    raw = Rollout(2, 1, 100, ("en",)).encode()
    signed.targets[f"stable/{FLAGS}"] = TargetFile.from_data(f"stable/{FLAGS}", raw, ["sha256"])
    repository.metadata.commit(Action("publish", "canary"), {"canary": signed})
    assert Device.of(staged, "new", OUT).update().release.number == 1


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}", b"\xff", b'{"key": "00"}', b'{"key":"' + b"0" * 5000 + b'"}', b'{"key": 5}']
)
def test_a_damaged_key_is_named_and_the_bundle_stays(staged: Place, content: bytes) -> None:
    device = Device.of(staged, "one", IN)
    device.update()
    before = device.content
    device.targeting.write_bytes(content)
    with refused(DataError, TARGETING):
        device.update()
    assert device.content == before
    device.targeting.unlink()
    assert device.update().release.number == 2  # under another key, and it does not go back


def test_what_cannot_be_rolled_out_is_refused_and_changes_nothing(canary: Place) -> None:
    repository = canary.repository
    with refused(ConfigError, "rollout"):
        run("release", "rollout", repository.folder, "stable", "--share", 50)
    with refused(ConfigError, "share"):
        stage(canary, 101)
    with refused(ConfigError, "language"):
        stage(canary, 50, ("German",))
    repository.add_channel("beta", SystemEntropy())
    with refused(ConfigError, "rollout"):
        repository.promote("canary", 1, "beta", (), share=10)
    assert repository.release("beta") is None
    stage(canary, 10)
    before = repository.metadata.version("stable")
    canary.publish(3, seed=6, channel="canary")
    with refused(ConfigError, "rollout"):
        repository.promote("canary", 2, "stable", (), share=10)
    assert repository.metadata.version("stable") == before
    repository.promote("canary", 2, "stable", ())  # to all: the rollout of release 2 is over
    assert repository.rollout("stable") is None
    assert Device.of(canary, "new", OUT).update().release.number == 3


def test_a_killed_rollout_leaves_the_one_before(staged: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = staged.repository.folder

    def killed(*_: object) -> Iterator[None]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("edgeadapt.releases.metadata.RoleMetadata.commit", killed)
        with pytest.raises(KeyboardInterrupt):
            staged.repository.set_rollout("stable", 90)
    assert staged.repository.rollout("stable") == Rollout(2, 1, 50)
    audit_repository(folder, None)
    assert Device.of(staged, "new", IN).update().release.number == 2
