"""A rollback that was signed with the rollout is published by who has the snapshot's key alone, and only as signed."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Root, Targets
from tuf.ngclient._internal import trusted_metadata_set

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki.identity import IdentityKey
from coordinator.dashboard.view import ChannelsView
from edgeadapt.promotion.gates import GateSettings
from edgeadapt.releases.actions import Action
from edgeadapt.releases.history import audit_repository
from edgeadapt.releases.metadata import MAX_METADATA, ROLLBACK, ROOT, TOP
from edgeadapt.releases.prepared import RELEASE, Release
from edgeadapt.releases.repository import ChannelRepository
from edgeadapt.releases.rollback import note_evaluation, prepare, publish_prepared, roll_back
from edgeadapt.releases.verdict import JudgedEvaluation, verdict
from export.onnx.exported import ExportedBase
from tests.client.updates.conftest import NOW, Place, Source
from tests.support import refused
from tests.support.bundles import stated
from tests.support.rollout import run

MARGIN = 0.01


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, source: Source, exported: ExportedBase, vendor: IdentityKey
) -> Place:
    """Release 2 of stable is for all devices with language de; its rollback is prepared, and the device has it."""
    folder = tmp_path_factory.mktemp("made")
    repository = ChannelRepository.create(folder / "releases", SystemEntropy(), NOW)
    repository.protect("stable", on=False)
    place = place_in(folder, vendor, source, exported)
    place.device.mkdir()
    (place.device / "trust.pem").write_bytes(vendor.public.to_pem())
    place.publish(1)
    place.publish(2, seed=5, channel="canary")
    repository.promote("canary", 1, "stable", (), share=99)
    prepare(repository, "stable", vendor, MARGIN)
    repository.set_rollout("stable", 100, ("de",))
    place.follow()
    (place.device / "updates" / "targeting.json").write_text(json.dumps({"key": "0" * 32, "language": "de"}))
    assert place.update().release.number == 2
    return place


def place_in(folder: Path, vendor: IdentityKey, source: Source, exported: ExportedBase) -> Place:
    repository = ChannelRepository.open(folder / "releases", NOW)
    public = str(repository.folder / "public")
    return Place(folder, repository, public, vendor, source, exported, folder / "made" / "bundle", folder / "device")


def copy_of(place: Place, folder: Path) -> Place:
    return place_in(Path(shutil.copytree(place.folder, folder)), place.vendor, place.source, place.exported)


@pytest.fixture
def staged(made: Place, tmp_path: Path) -> Place:
    copied = copy_of(made, tmp_path / "place")
    copied.follow()
    return copied


def evaluation(place: Place, right: float = 0.2, before: float = 0.8, **changes: Any) -> JudgedEvaluation:
    newest, previous = place.repository.compared("stable", "global")
    metrics = {"deviation": 0.0, "accuracy_newest": right, "examples_newest": 128.0}
    metrics |= {"accuracy_previous": before, "examples_previous": 128.0}
    judged = verdict(metrics, changes.pop("margin", MARGIN))
    assert judged is not None
    found = JudgedEvaluation(3, "a" * 64, 8, "global", newest, previous, metrics, judged, judged.worse)
    return replace(found, **changes)


def only_the_snapshots_key(place: Place) -> ChannelRepository:
    """The repository on the machine that watches."""
    roles = {role: keys for role, _, _, keys in place.repository.metadata.roles()}
    for path in (place.repository.folder / "keys").iterdir():
        if path not in roles["snapshot"]:
            path.rename(place.folder / path.name)
    return place.repository


def records(place: Place) -> list[str]:
    return [record.action.kind for record in audit_repository(place.repository.folder, None).records]


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    row = json.loads(path.read_bytes())
    change(row)
    path.write_text(json.dumps(row))


# --- what it does


def test_the_dashboard_and_show_say_whether_a_rollback_is_prepared_and_what_an_evaluation_found(staged: Place) -> None:
    def shown() -> dict[str, Any]:
        row = view.look()["channels"]["stable"]
        assert isinstance(row, dict)
        return row

    def listed() -> dict[str, Any]:
        row = json.loads(run("release", "show", folder, "--json"))["prepared"]["stable"]
        assert isinstance(row, dict)
        return row

    folder, view = staged.repository.folder, ChannelsView(staged.repository.folder)
    assert shown()["prepared"] == {"again": 1, "margin": MARGIN}
    assert shown()["evaluation"] is None
    assert listed()["condition"]["again"] == 1
    assert "rollback to release 1: prepared" in run("release", "show", folder)

    path = staged.repository.prepared.path("stable")
    kept = path.read_bytes()
    path.unlink()
    assert (shown()["prepared"], listed()["condition"]) == (None, None)
    assert "release rollout" in shown()["unprepared"]
    assert "release rollout" in run("release", "show", folder)
    path.write_bytes(kept.replace(b'"margin', b'"Margin', 1))
    assert shown()["unprepared"].startswith(str(path))
    path.write_bytes(bytes(MAX_METADATA + 1))
    assert shown()["unprepared"].startswith(str(path))
    path.unlink()
    path.mkdir()  # a file that this user may not read gives such an error as well
    assert shown()["unprepared"] == f"cannot read {path}: Is a directory"
    path.rmdir()
    path.write_bytes(kept)
    assert shown()["prepared"] == {"again": 1, "margin": MARGIN}

    note_evaluation(staged.repository, "stable", evaluation(staged, right=0.8))
    found = shown()["evaluation"]
    assert (found["round"], found["worse"]) == (3, False)
    assert found["text"].startswith("not shown to be worse")
    publish_prepared(staged.repository, "stable", evaluation(staged))
    assert (shown()["kind"], shown()["evaluation"]["worse"], shown()["prepared"]) == ("rollback", True, None)


def test_the_snapshots_key_alone_takes_a_release_back_and_devices_have_the_one_before_at_their_next_check(
    staged: Place,
) -> None:
    bad, repository = stated(staged.bundle).content, only_the_snapshots_key(staged)
    assert not list((repository.folder / "public").rglob("prepared*"))
    made = publish_prepared(repository, "stable", evaluation(staged))
    assert (made.release.number, made.release.adapters) == (3, {"global": 3})
    found = staged.update()
    assert (found.release.number, found.changed, found.offer.rollout, staged.version()) == (3, True, None, 3)
    assert stated(staged.bundle).content != bad
    assert records(staged)[-2:] == ["rollout", "rollback"]
    assert not repository.prepared.path("stable").exists()


def test_after_it_the_channel_goes_on(staged: Place) -> None:
    publish_prepared(staged.repository, "stable", evaluation(staged))
    assert staged.update().release.number == 3
    staged.publish(4, seed=6)
    assert staged.update().release.number == 4
    audit_repository(staged.repository.folder, None)
    assert ROLLBACK not in staged.repository.metadata.load(Targets, "stable").unrecognized_fields


def test_one_evaluation_takes_back_one_release(staged: Place) -> None:
    judged = evaluation(staged)
    publish_prepared(staged.repository, "stable", judged)
    staged.publish(4, seed=5, channel="canary")  # the same adapter again
    staged.repository.promote("canary", 2, "stable", (), share=99)
    prepare(staged.repository, "stable", staged.vendor, MARGIN)
    assert evaluation(staged) == judged
    with refused(TrustError, "evaluation"):
        publish_prepared(staged.repository, "stable", judged)
    assert staged.repository.prepared.path("stable").exists()
    assert publish_prepared(staged.repository, "stable", replace(judged, round=4)).release.number == 5
    audit_repository(staged.repository.folder, None)


@pytest.mark.parametrize("what", ["renew", "renew all", "rotate snapshot", "rotate targets", "rollout"])
def test_each_change_prepares_it_anew(staged: Place, what: str) -> None:
    repository = staged.repository
    if what.startswith("renew"):
        repository.renew(everything="all" in what)
    elif what.startswith("rotate"):
        assert not repository.rotate(what.partition(" ")[2], SystemEntropy())
    else:
        repository.set_rollout("stable", 50)
    publish_prepared(only_the_snapshots_key(staged), "stable", evaluation(staged))
    assert staged.update().release.number == 3
    audit_repository(repository.folder, None)


def test_a_new_key_of_the_channel_signs_no_rollback_that_a_thief_of_the_old_one_wrote(staged: Place) -> None:
    repository = staged.repository
    ready = repository.prepared.read("stable")
    assert ready is not None
    signed, condition = ready[0].signed, ready[1]
    replace(condition, margin=0.0).put(signed)
    repository.prepared.write("stable", signed)  # with the old key
    said = run("release", "renew", repository.folder, "stable", "--new-key")
    assert "rollback of channel stable" in said
    assert "release rollout" in said
    assert repository.prepared.read("stable") is None
    with refused(ConfigError, "prepared"):
        publish_prepared(repository, "stable", evaluation(staged, margin=0.0))
    assert "rollback" not in run("release", "renew", repository.folder, "stable", "--new-key")
    prepare(repository, "stable", staged.vendor, MARGIN)
    assert publish_prepared(repository, "stable", evaluation(staged)).release.number == 3


def test_it_ends_with_the_rollout(staged: Place) -> None:
    judged = evaluation(staged)
    staged.repository.set_rollout("stable", 100)
    with refused(ConfigError, "prepared"):
        publish_prepared(staged.repository, "stable", judged)
    staged.publish(3, seed=6, channel="canary")
    staged.repository.promote("canary", 2, "stable", (), share=50)
    prepare(staged.repository, "stable", staged.vendor, MARGIN)
    roll_back(staged.repository, "stable", 1, staged.vendor)
    with refused(ConfigError, "prepared"):
        publish_prepared(staged.repository, "stable", judged)


# --- what is refused, and changes nothing


@pytest.fixture
def unchanged(staged: Place) -> Any:
    before = staged.repository.metadata.version("timestamp")
    yield staged
    assert staged.repository.metadata.version("timestamp") == before
    assert not staged.update().changed
    audit_repository(staged.repository.folder, None)


def test_one_that_is_out_of_date(staged: Place) -> None:
    path = staged.repository.prepared.path("stable")
    old = path.read_bytes()
    staged.repository.set_rollout("stable", 50)
    path.write_bytes(old)
    with refused(ConfigError, "prepared.version"):
        publish_prepared(staged.repository, "stable", evaluation(staged))
    assert not staged.update().changed


def test_one_that_was_used_already(staged: Place, tmp_path: Path) -> None:
    judged = evaluation(staged)
    kept = shutil.copytree(staged.repository.folder / "prepared", tmp_path / "kept")
    publish_prepared(staged.repository, "stable", judged)
    shutil.copytree(kept, staged.repository.folder / "prepared", dirs_exist_ok=True)
    with refused(ConfigError, "prepared.version"):
        publish_prepared(staged.repository, "stable", judged)
    assert staged.update().release.number == 3
    staged.publish(4, seed=6)
    shutil.copytree(kept, staged.repository.folder / "prepared", dirs_exist_ok=True)
    with refused(ConfigError, "prepared.version"):
        publish_prepared(staged.repository, "stable", judged)


def test_one_of_another_channel(unchanged: Place) -> None:
    repository = unchanged.repository
    (repository.folder / "prepared" / "canary.json").write_bytes(repository.prepared.path("stable").read_bytes())
    with refused(TrustError, "prepared"):
        publish_prepared(repository, "canary", evaluation(unchanged))


def test_one_that_expired(unchanged: Place) -> None:
    later = replace(unchanged.repository, now=NOW + timedelta(days=366))
    with refused(ConfigError, "prepared.expired"):
        publish_prepared(later, "stable", evaluation(unchanged))


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b"\xff", b"x" * (2**22 + 1)])
def test_one_that_is_damaged(unchanged: Place, content: bytes) -> None:
    unchanged.repository.prepared.path("stable").write_bytes(content)
    with refused(TrustError, "prepared"):
        publish_prepared(unchanged.repository, "stable", evaluation(unchanged))


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row["signed"].update({ROLLBACK: row["signed"][ROLLBACK].replace("0.01", "0.0")}),
        lambda row: row["signed"].pop(ROLLBACK),
        lambda row: row["signed"].update(version=row["signed"]["version"] + 1),
        lambda row: row["signed"]["targets"].popitem(),
        lambda row: row.update(signatures=[]),
        lambda row: row["signatures"][0].update(sig="00" * 64),
    ],
)
def test_one_that_was_altered(unchanged: Place, change: Callable[[dict[str, Any]], None]) -> None:
    edit(unchanged.repository.prepared.path("stable"), change)
    with refused(TrustError, "prepared"):
        publish_prepared(unchanged.repository, "stable", evaluation(unchanged))


@pytest.mark.parametrize("name", ["global.json", "release.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"x" * (2**21)])
def test_one_with_a_file_that_was_altered(unchanged: Place, name: str, content: bytes | None) -> None:
    (path,) = unchanged.repository.prepared.targets.folder.rglob(f"*.{name}")
    path.unlink() if content is None else path.write_bytes(content)
    with refused(TrustError, "prepared"):
        publish_prepared(unchanged.repository, "stable", evaluation(unchanged))


@pytest.mark.parametrize(
    "changes",
    [
        {"right": 0.79},  # not shown to be worse
        {"margin": 0.0},  # which is not the signed one
        {"newest": "b" * 64},
        {"adapter": "other"},
    ],
)
def test_a_verdict_for_which_it_was_not_prepared(unchanged: Place, changes: dict[str, Any]) -> None:
    with refused(TrustError, "evaluation"):
        publish_prepared(unchanged.repository, "stable", evaluation(unchanged, **changes))


def test_a_verdict_that_the_figures_do_not_give(unchanged: Place) -> None:
    with refused(DataError, "evaluation"):
        publish_prepared(unchanged.repository, "stable", replace(evaluation(unchanged, right=0.79), worse=True))


def test_a_key_that_devices_do_not_have_prepares_nothing(unchanged: Place) -> None:
    before = unchanged.repository.prepared.path("stable").read_bytes()
    with refused(TrustError, "--key"):
        prepare(unchanged.repository, "stable", IdentityKey.generate(SystemEntropy()), MARGIN)
    assert unchanged.repository.prepared.path("stable").read_bytes() == before


def test_without_a_rollout_there_is_nothing_to_prepare(staged: Place) -> None:
    with refused(ConfigError, "rollout"):
        prepare(staged.repository, "canary", staged.vendor, MARGIN)


def test_a_channel_that_does_not_exist_is_named(staged: Place) -> None:
    with refused(ConfigError, "channel"):
        staged.repository.compared("stabel", "global")


def test_a_kill_before_the_timestamp_leaves_it_ready(staged: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = evaluation(staged)
    with monkeypatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("edgeadapt.releases.metadata.RoleMetadata._log", killed)
        with pytest.raises(KeyboardInterrupt):
            publish_prepared(staged.repository, "stable", judged)
    assert not staged.update().changed
    publish_prepared(staged.repository, "stable", judged)
    assert staged.update().release.number == 3


# --- the log and the audit


def forged(staged: Place, action: Action, release: int = 3) -> None:
    """What a thief of the snapshot's key does: publish the prepared metadata under a record of his own."""
    repository = staged.repository
    current = repository.release("stable")
    assert current is not None
    ready = repository.prepared.accept("stable", current)
    for name, content in ready.files.items():
        repository.targets.write("stable", name, content)
    digest = ready.metadata.signed.targets["stable/release.json"].hashes["sha256"]
    action = replace(action, subject="stable", release=release, sha256=digest, adapters=dict(ready.release.adapters))
    repository.metadata.commit(action, {}, prepared={"stable": ready.metadata})


def test_a_rollback_without_an_evaluation_is_found(staged: Place) -> None:
    forged(staged, Action("rollback", again=1))
    with refused(TrustError, "evaluation"):
        audit_repository(staged.repository.folder, None)
    staged.repository.renew(everything=True)  # also after the channel went on
    with refused(TrustError, "evaluation"):
        audit_repository(staged.repository.folder, None)


def test_a_second_rollback_for_one_evaluation_is_found(staged: Place) -> None:
    judged = evaluation(staged)
    publish_prepared(staged.repository, "stable", judged)
    staged.publish(4, seed=5, channel="canary")
    staged.repository.promote("canary", 2, "stable", (), share=99)
    prepare(staged.repository, "stable", staged.vendor, MARGIN)
    audit_repository(staged.repository.folder, None)
    forged(staged, Action("rollback", again=3, evaluation=judged), release=5)
    with refused(TrustError, "evaluation"):
        audit_repository(staged.repository.folder, None)


def test_prepared_metadata_under_another_name_are_found(staged: Place) -> None:
    judged = evaluation(staged)
    forged(staged, Action("promote", evaluation=judged))
    with refused(TrustError, "rollback"):
        audit_repository(staged.repository.folder, None)


@pytest.mark.parametrize("changes", [{"right": 0.79}, {"margin": 0.0}, {"newest": "b" * 64}])
def test_a_rollback_whose_evaluation_does_not_meet_the_signed_condition_is_found(
    staged: Place, changes: dict[str, Any]
) -> None:
    forged(staged, Action("rollback", again=1, evaluation=evaluation(staged, **changes)))
    with refused(TrustError, "evaluation"):
        audit_repository(staged.repository.folder, None)


def test_a_verdict_that_its_figures_do_not_give_is_found(staged: Place) -> None:
    judged = evaluation(staged)
    worse = replace(judged, metrics={**judged.metrics, "accuracy_newest": 0.79})
    forged(staged, Action("rollback", again=1, evaluation=worse))
    with refused(TrustError, "evaluation"):
        audit_repository(staged.repository.folder, None)


@pytest.mark.parametrize("figure", ["deviation", "examples_newest", "examples_previous"])
def test_a_figure_that_no_evaluation_can_have_is_found(staged: Place, figure: str) -> None:
    judged = evaluation(staged)
    note_evaluation(staged.repository, "stable", replace(judged, metrics={**judged.metrics, figure: 1e300}))
    with refused(TrustError, "metrics"):
        audit_repository(staged.repository.folder, None)


def test_an_audit_does_not_take_history_from_which_the_condition_was_taken_out(staged: Place) -> None:
    forged(staged, Action("rollback", again=1))
    metadata = staged.repository.metadata
    path = metadata.path("stable", metadata.version("stable"))
    staged.repository.renew(everything=True)
    document = Metadata[Targets].from_bytes(path.read_bytes())
    document.signed.unrecognized_fields.pop(ROLLBACK)
    path.write_bytes(document.to_bytes())
    with refused(TrustError, "stable"):
        audit_repository(staged.repository.folder, None)


def test_a_verdict_after_which_a_release_stays_is_in_the_log(staged: Place) -> None:
    note_evaluation(staged.repository, "stable", evaluation(staged, right=0.79))
    action = audit_repository(staged.repository.folder, None).records[-1].action
    assert (action.kind, action.release, action.evaluation) == ("evaluate", 2, evaluation(staged, right=0.79))
    note_evaluation(staged.repository, "stable", replace(evaluation(staged, right=0.79), worse=True))
    with refused(TrustError, "evaluation"):
        audit_repository(staged.repository.folder, None)


# --- the commands


def test_rollout_prepares_it_and_says_so(staged: Place) -> None:
    folder, key = staged.repository.folder, staged.folder / "vendor.key"
    key.write_bytes(staged.vendor.to_pem())
    key.chmod(0o600)
    other = staged.folder / "other.key"
    other.write_bytes(IdentityKey.generate(SystemEntropy()).to_pem())
    other.chmod(0o600)
    (folder / "gates.toml").write_text(GateSettings.parse({"accuracy": {"margin": 0.05}}, "test").to_toml())
    staged.repository.prepared.discard("stable")
    assert "rollback: not prepared" in run("release", "rollout", folder, "stable", "--share", 30)
    with refused(TrustError, "--key"):
        run("release", "rollout", folder, "stable", "--share", 40, "--key", other)
    assert staged.repository.rollout("stable").share == 30  # type: ignore[union-attr]
    assert "rollback to release 1: prepared" in run("release", "rollout", folder, "stable", "--share", 40, "--key", key)
    row = json.loads(run("release", "rollout", folder, "stable", "--share", 50, "--json"))
    assert (row["prepared"]["again"], row["prepared"]["margin"]) == (1, 0.05)
    publish_prepared(staged.repository, "stable", evaluation(staged, margin=0.05))
    shown = run("audit", "show", folder)
    assert "release 3 as 1 was" in shown
    assert "after round 3, 8 survivors: worse" in shown
    assert "by hand" not in shown


def test_an_audit_names_a_rollback_by_hand(staged: Place) -> None:
    roll_back(staged.repository, "stable", 1, staged.vendor)
    assert "by hand, to release 3: no evaluation asked for it" in run("audit", "verify", staged.repository.folder)


# One that was never published, in the hands of a thief of the snapshot's key, years later


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
    return copy_of(staged, tmp_path / "stolen").repository


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
