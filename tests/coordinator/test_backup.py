"""A coordinator is copied while it runs, and restored on an empty machine with the same registry and a sound log."""

import json
import re
import shutil
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from coordinator.backup import RegistrySnapshot
from coordinator.cli import coordinator_group as coordinator
from coordinator.registry import Registry
from coordinator.settings import SETTINGS
from coordinator.statedir import KEY, PUBLIC_KEY, CoordinatorStateDir
from coordinator.transcripts import Recorder
from edgeadapt.auditing import AuditInput, AuditOptions
from edgeadapt.formats.keyfiles import NEXT_TLS_KEY, TLS_KEY, TLS_LOCK
from edgeadapt.formats.registryfiles import BLOBS, DATABASE, REGISTRY, RegistrySettings
from edgeadapt.formats.registrystores import is_local, postgresql_url
from tests.support import FleetOf


def call(*arguments: object) -> Result:
    return CliRunner().invoke(coordinator, [str(argument) for argument in arguments])


def made(*arguments: object) -> dict[str, Any]:
    done = call(*arguments, "--json")
    assert done.exception is None, done.exception
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def refusal(kind: type[EdgeAdaptError], about: str, *arguments: object) -> None:
    error = call(*arguments).exception
    assert type(error) is kind, error
    assert error.about == about, error
    assert "\n" not in str(error)


def digest_of(folder: Path) -> str:
    registry = CoordinatorStateDir.open(folder).registry
    try:
        return RegistrySnapshot.read(registry.engine).digest()
    finally:
        registry.close()


def audited(folder: Path, *, unfinished: bool) -> int:
    """The rounds of a coordinator whose audit finds nothing wrong."""
    checked = AuditInput.open(folder, AuditOptions())
    checked.require(checked.audit(unfinished=unfinished), unfinished=unfinished)
    return len(checked.records)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "coordinator"


@pytest.fixture
def fleet(kept: Path, app_fleet_of: FleetOf, tmp_path: Path) -> Path:
    """The state directory of a coordinator after two rounds."""
    if not kept.exists():
        done = app_fleet_of(3, rounds=2, aggregation__keep_masked_inputs=True)
        done.federate(done.grid())
        shutil.copytree(done.out / "coordinator", kept)
    return Path(shutil.copytree(kept, tmp_path / "fleet"))


def test_a_restored_coordinator_is_the_one_that_was_copied(fleet: Path, tmp_path: Path) -> None:
    assert call("tls-request", fleet).exit_code == 0
    shutil.copy(fleet / TLS_KEY, fleet / NEXT_TLS_KEY)
    copied = made("backup", fleet, "--out", tmp_path / "copy.tar", "--keys")
    assert stat.S_IMODE((tmp_path / "copy.tar").stat().st_mode) == 0o600
    restored = made("restore", tmp_path / "other", "--archive", tmp_path / "copy.tar")
    assert {**copied, "state": restored["state"]} == {**restored, "archive": copied["archive"]}
    assert (restored["version"], restored["round"], restored["registry"]) == (2, 2, digest_of(fleet))
    assert digest_of(tmp_path / "other") == digest_of(fleet)
    assert audited(tmp_path / "other", unfinished=False) == 2
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) == 0o700
    for name in (KEY, TLS_KEY, NEXT_TLS_KEY):
        assert stat.S_IMODE((tmp_path / "other" / name).stat().st_mode) == 0o600
    left = {str(path.relative_to(fleet)) for path in fleet.rglob("*") if path.is_file()}
    left -= {DATABASE, "run.json", "run.lock", TLS_LOCK}
    assert [name for name in left if (tmp_path / "other" / name).read_bytes() != (fleet / name).read_bytes()] == []
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_equal_coordinators_give_equal_archives_that_tar_reads(fleet: Path, tmp_path: Path) -> None:
    made("backup", fleet, "--out", tmp_path / "1.tar")
    made("backup", shutil.copytree(fleet, tmp_path / "again"), "--out", tmp_path / "2.tar")
    assert (tmp_path / "1.tar").read_bytes() == (tmp_path / "2.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as archive:
        names = archive.getnames()
    assert names[:3] == ["coordinator.pem", "backup.json", "SHA256SUMS"]
    assert {"registry.db", "transcript/session-000001.log", "federation.toml"} < set(names)


@pytest.mark.parametrize("text", ["rounds = [", "unknown = 1\n", "rounds = -1\n", "\0"])
def test_settings_that_are_not_valid_are_copied_as_they_are(fleet: Path, tmp_path: Path, text: str) -> None:
    (fleet / SETTINGS).write_text(text)
    done = call("backup", fleet, "--out", tmp_path / "copy.tar", "--keys")
    assert (done.exit_code, done.exception) == (0, None)
    assert call("restore", tmp_path / "other", "--archive", tmp_path / "copy.tar").exit_code == 0
    assert (tmp_path / "other" / SETTINGS).read_text() == text
    assert isinstance(call("status", tmp_path / "other").exception, ConfigError)
    (tmp_path / "other" / SETTINGS).write_text("")
    assert audited(tmp_path / "other", unfinished=False) == 2


def test_without_keys_no_secret_is_copied_and_the_key_is_asked_for(fleet: Path, tmp_path: Path) -> None:
    call("tls-request", fleet)
    archive = tmp_path / "copy.tar"
    made("backup", fleet, "--out", archive)
    assert b"PRIVATE" not in archive.read_bytes()
    refusal(ConfigError, KEY, "restore", tmp_path / "other", "--archive", archive)
    other = tmp_path / "other.pem"
    other.write_bytes(IdentityKey.generate(SystemEntropy()).to_pem())
    refusal(TrustError, PUBLIC_KEY, "restore", tmp_path / "other", "--archive", archive, "--key", other)
    public = tmp_path / "public.pem"
    public.write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    refusal(TrustError, PUBLIC_KEY, "restore", tmp_path / "other", "--archive", archive, "--coordinator", public)
    assert not (tmp_path / "other").exists()
    made("restore", tmp_path / "other", "--archive", archive, "--key", fleet / KEY)
    assert digest_of(tmp_path / "other") == digest_of(fleet)


def test_what_is_there_is_not_replaced(fleet: Path, tmp_path: Path) -> None:
    archive = tmp_path / "copy.tar"
    made("backup", fleet, "--out", archive, "--keys")
    before = archive.read_bytes()
    refusal(ConfigError, archive.name, "backup", fleet, "--out", archive)
    assert archive.read_bytes() == before
    refusal(ConfigError, fleet.name, "restore", fleet, "--archive", archive)
    assert audited(fleet, unfinished=False) == 2


def test_a_damaged_archive_restores_nothing(fleet: Path, tmp_path: Path) -> None:
    archive, target = tmp_path / "copy.tar", tmp_path / "other"
    made("backup", fleet, "--out", archive, "--keys")
    raw = archive.read_bytes()
    damaged = {f"first {size}": raw[:size] for size in (0, 1, 511, 512, 2000, len(raw) // 2, len(raw) - 1)}
    damaged["longer"] = raw + b"\0"
    damaged["twice"] = raw + raw
    damaged |= {f"byte {at}": raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :] for at in range(100, len(raw), 9973)}
    with tarfile.open(archive) as listed:
        headers = [each.offset for each in listed] + [each.offset_data for each in listed if each.size]
    damaged |= {f"at {at}": raw[:at] + bytes([raw[at] ^ 2]) + raw[at + 1 :] for at in headers}
    for what, content in damaged.items():
        archive.write_bytes(content)
        error = call("restore", target, "--archive", archive, "--key", fleet / KEY).exception
        assert isinstance(error, (DataError, TrustError)), (what, error)
        assert "\n" not in str(error)
        assert not target.exists(), what
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_coordinator_that_contradicts_itself_is_not_copied(fleet: Path, tmp_path: Path) -> None:
    (log,) = (fleet / "transcript").glob("*.log")
    raw = log.read_bytes()
    log.write_bytes(raw[: len(raw) // 2])
    refusal(TrustError, "transcript", "backup", fleet, "--out", tmp_path / "copy.tar")
    log.write_bytes(raw)
    (blob, *_) = (fleet / BLOBS).iterdir()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    refusal(TrustError, "blob", "backup", fleet, "--out", tmp_path / "copy.tar")
    assert not (tmp_path / "copy.tar").exists()


def test_a_log_that_went_on_after_the_registry_was_read_is_cut(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RegistrySnapshot.read(CoordinatorStateDir.open(fleet).registry.engine)
    versions, rounds, optimizer = whole.rows
    for done in (0, 1):
        known = {versions: whole.rows[versions][: done + 1], rounds: whole.rows[rounds][:done]}
        early = RegistrySnapshot({**known, optimizer: whole.rows[optimizer] if done > 1 else ()})
        with monkeypatch.context() as patch:
            patch.setattr(RegistrySnapshot, "read", lambda engine, early=early: early)
            found = made("backup", fleet, "--out", tmp_path / f"{done}.tar", "--keys")
        assert (found["version"], found["round"]) == (done, done)
        made("restore", tmp_path / f"{done}", "--archive", tmp_path / f"{done}.tar")
        assert audited(tmp_path / f"{done}", unfinished=True) == done
        opened = CoordinatorStateDir.open(tmp_path / f"{done}")
        opened.transcripts.finish()
        assert audited(tmp_path / f"{done}", unfinished=False) == done
        opened.registry.close()


@pytest.mark.slow
def test_a_copy_at_any_instant_goes_on_where_it_was(
    app_fleet_of: FleetOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Devices included: what they have seen of the log is in it."""
    fleet = app_fleet_of(3, rounds=2)
    folder, write, commit = fleet.out / "coordinator", Recorder.write, Registry.commit_round
    copies = list[Path]()

    def copy() -> None:
        copies.append(tmp_path / f"copy-{len(copies)}")
        made("backup", folder, "--out", copies[-1].with_suffix(".tar"), "--keys")
        shutil.copytree(fleet.out, copies[-1])

    def writing(self: Recorder, records: bytes, *, sync: bool = False) -> None:
        write(self, records, sync=sync)
        if sync and len(records) > 1:
            copy()

    def committing(self: Registry, *args: Any) -> Any:
        done = commit(self, *args)
        copy()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "write", writing)
        patch.setattr(Registry, "commit_round", committing)
        fleet.federate(fleet.grid())
    seen = set[int]()
    for each in copies:
        found = made("restore", tmp_path / f"{each.name}-restored", "--archive", each.with_suffix(".tar"))
        assert digest_of(each / "coordinator") == found["registry"]
        seen.add(audited(tmp_path / f"{each.name}-restored", unfinished=True))
    assert seen == {0, 1, 2}
    for each in (copies[2], copies[len(copies) // 2], copies[-3]):
        shutil.rmtree(fleet.out)
        shutil.copytree(each, fleet.out)
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / f"{each.name}-restored", folder)
        assert [record.version for record in fleet.federate(fleet.grid())] == [1, 2]
        assert audited(folder, unfinished=False) == 2


def test_a_registry_moves_between_postgresql_and_files(
    fleet: Path, tmp_path: Path, postgresql: str, bucket: str
) -> None:
    archive = tmp_path / "copy.tar"
    copied = made("backup", fleet, "--out", archive, "--keys")
    stores = ("--database", postgresql, "--blobs", bucket)
    made("restore", tmp_path / "remote", "--archive", archive, *stores)
    assert RegistrySettings.of(tmp_path / "remote") == RegistrySettings(database=postgresql, blobs=bucket)
    assert not any((tmp_path / "remote" / name).exists() for name in (DATABASE, BLOBS))
    assert digest_of(tmp_path / "remote") == copied["registry"]
    assert audited(tmp_path / "remote", unfinished=False) == 2
    refusal(ConfigError, "database", "restore", tmp_path / "again", "--archive", archive, *stores)
    assert not (tmp_path / "again").exists()
    back = made("backup", tmp_path / "remote", "--out", tmp_path / "back.tar", "--keys")
    assert back["registry"] == copied["registry"]
    made("restore", tmp_path / "local", "--archive", tmp_path / "back.tar")
    assert not (tmp_path / "local" / REGISTRY).exists()
    assert digest_of(tmp_path / "local") == copied["registry"]
    assert audited(tmp_path / "local", unfinished=False) == 2


@pytest.fixture
def leader(fleet: Path, tmp_path: Path, postgresql: str) -> Path:
    """The state directory of that coordinator with its registry in PostgreSQL, and its adapters in a shared folder."""
    assert call("tls-request", fleet).exit_code == 0
    made("backup", fleet, "--out", tmp_path / "copy.tar", "--keys")
    stores = ("--database", postgresql, "--blobs", tmp_path / "shared")
    made("restore", tmp_path / "leader", "--archive", tmp_path / "copy.tar", *stores)
    return tmp_path / "leader"


def test_a_standby_has_all_that_its_leader_has_and_no_registry_of_its_own(leader: Path, tmp_path: Path) -> None:
    archive, standby, pinned = tmp_path / "standby.tar", tmp_path / "standby", leader / PUBLIC_KEY
    copied = made("backup", leader, "--out", archive, "--standby", "--keys")
    assert (copied["version"], copied["round"], copied["registry"]) == (2, 2, None)
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with tarfile.open(archive) as listed:
        assert not [name for name in listed.getnames() if name.startswith(("registry.db", "blobs", "transcript"))]
    restored = made("restore", standby, "--archive", archive, "--coordinator", pinned)
    assert {**copied, "state": restored["state"]} == {**restored, "archive": copied["archive"]}
    assert stat.S_IMODE(standby.stat().st_mode) == 0o700
    assert [stat.S_IMODE((standby / name).stat().st_mode) for name in (KEY, TLS_KEY)] == [0o600, 0o600]
    assert digest_of(standby) == digest_of(leader)
    assert audited(standby, unfinished=False) == 2  # the log came from the database
    again = made("backup", standby, "--out", tmp_path / "again.tar", "--standby", "--keys")
    assert {**again, "archive": copied["archive"]} == copied
    assert (tmp_path / "again.tar").read_bytes() == archive.read_bytes()
    refusal(ConfigError, standby.name, "restore", standby, "--archive", archive, "--coordinator", pinned)
    refusal(ConfigError, archive.name, "backup", leader, "--out", archive, "--standby")


def test_a_standby_without_keys_gets_them_in_another_way(leader: Path, tmp_path: Path) -> None:
    archive = tmp_path / "standby.tar"
    made("backup", leader, "--out", archive, "--standby")
    assert b"PRIVATE" not in archive.read_bytes()
    refusal(
        ConfigError, KEY, "restore", tmp_path / "standby", "--archive", archive, "--coordinator", leader / PUBLIC_KEY
    )
    made("restore", tmp_path / "standby", "--archive", archive, "--key", leader / KEY)
    assert digest_of(tmp_path / "standby") == digest_of(leader)
    assert not (tmp_path / "standby" / TLS_KEY).exists()


def test_a_registry_that_no_other_machine_reaches_gets_no_standby(
    leader: Path, fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # some are folders there
    archive, stores = tmp_path / "standby.tar", RegistrySettings.of(leader)
    refusal(ConfigError, REGISTRY, "backup", fleet, "--out", archive, "--standby", "--keys")
    for blobs in ("", "shared", "s3", "file://shared", "memory://shared", "local://shared", "file:///shared"):
        (leader / REGISTRY).write_text(RegistrySettings(database=stores.database, blobs=blobs).to_toml())
        refusal(ConfigError, "blobs", "backup", leader, "--out", archive, "--standby", "--keys")
    assert not archive.exists()


def test_a_standby_trusts_no_archive_by_itself_and_no_other_database(
    leader: Path, tmp_path: Path, postgresql_server: Any, postgresql: str
) -> None:
    archive, standby, pinned = tmp_path / "standby.tar", tmp_path / "standby", leader / PUBLIC_KEY
    made("backup", leader, "--out", archive, "--standby", "--keys")
    restore = ("restore", standby, "--archive", archive)
    refusal(ConfigError, "--coordinator", *restore)
    refusal(ConfigError, "--database", *restore, "--coordinator", pinned, "--blobs", tmp_path / "own")
    other = tmp_path / "other.pem"
    other.write_bytes(IdentityKey.generate(SystemEntropy()).public.to_pem())
    refusal(TrustError, PUBLIC_KEY, *restore, "--coordinator", other)
    raw = archive.read_bytes()
    for size in (0, 1, 511, 2000, len(raw) - 1):
        (tmp_path / "damaged.tar").write_bytes(raw[:size])
        refusal(DataError, "damaged.tar", "restore", standby, "--archive", tmp_path / "damaged.tar")
    at = raw.index(b"postgresql://")
    (tmp_path / "damaged.tar").write_bytes(raw[:at] + b"P" + raw[at + 1 :])
    refusal(TrustError, REGISTRY, "restore", standby, "--archive", tmp_path / "damaged.tar", "--coordinator", pinned)

    (name,) = re.findall(r"/(registry\d+)\?", postgresql)
    for table in ("versions", "rounds", "optimizer"):  # another database under that address
        postgresql_server.run(name, f"TRUNCATE edgeadapt_{table}")
    refusal(DataError, "database", *restore, "--coordinator", pinned)
    postgresql_server.run(name, "DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    refusal(DataError, "database", *restore, "--coordinator", pinned)
    assert postgresql_server.run(name, "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'") == "0"
    assert not standby.exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("mounted", [False, True], ids=["no folder", "an empty folder"])
def test_a_standby_without_the_shared_folder_says_so_and_makes_none(
    leader: Path, tmp_path: Path, mounted: bool
) -> None:
    archive, standby, shared = tmp_path / "standby.tar", tmp_path / "standby", tmp_path / "shared"
    made("backup", leader, "--out", archive, "--standby", "--keys")
    shared.rename(tmp_path / "away")
    if mounted:
        shared.mkdir()
    restore = ("restore", standby, "--archive", archive, "--coordinator", leader / PUBLIC_KEY)
    refusal(DataError, "blobs", *restore)
    assert "is the folder mounted" in str(call(*restore).exception)
    assert (shared.exists(), standby.exists()) == (mounted, False)
    assert not mounted or not [*shared.iterdir()]


def test_a_database_at_an_address_of_this_machine_is_named_in_one_line(leader: Path, tmp_path: Path) -> None:
    """It may be a proxy, on both machines."""
    assert "of this machine" not in call("backup", leader, "--out", tmp_path / "copy-2.tar").stderr
    done = call("backup", leader, "--out", tmp_path / "standby.tar", "--standby")
    assert [line for line in done.stderr.splitlines() if "postgresql://" in line and "of this machine" in line]
    assert is_local(postgresql_url("postgresql://fleet@localhost/fleet"))
    assert not is_local(postgresql_url("postgresql://fleet@db.example/fleet"))
