"""The authority's folder: what is certified and revoked stays so, through kills and with two at work at once."""

import base64
import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from adapters import storage
from aggregation.entropy import SystemEntropy
from aggregation.errors import ConfigError, DataError, EdgeAdaptError, TrustError
from aggregation.pki import Authority, Root, certificates, requests
from aggregation.pki.identity import IdentityKey
from aggregation.pki.revocation import Reason
from coordinator.authority import store as module
from coordinator.authority.record import AuthorityRecord, Issued, Listed
from coordinator.authority.store import AuthorityStore
from coordinator.cli.authority import authority

ROOT = Path(__file__).resolve().parents[3]
PASSPHRASE = b"correct horse battery"
Run = Callable[..., Result]


def key() -> IdentityKey:
    return IdentityKey.generate(SystemEntropy())


@pytest.fixture
def office(tmp_path: Path) -> AuthorityStore:
    return AuthorityStore.found(tmp_path / "authority", "fleet", 3650, 30, None)


@pytest.fixture
def signer(office: AuthorityStore) -> Authority:
    return office.unlock(None)


def revoked_of(office: AuthorityStore) -> Any:
    return office.root.revocations((office.folder / "revoked.crl").read_bytes())


# The folder


def test_a_new_authority_has_a_key_for_its_owner_only_and_an_empty_list(tmp_path: Path) -> None:
    office = AuthorityStore.found(tmp_path / "authority", "fleet", 3650, 30, PASSPHRASE)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in office.folder.iterdir()}
    assert modes == {
        "authority.key": 0o600,
        "record.jsonl": 0o600,
        "record.lock": 0o644,
        "authority.pem": 0o644,
        "revoked.crl": 0o644,
    }
    assert stat.S_IMODE(office.folder.stat().st_mode) == 0o700
    assert office.encrypted
    assert b"PRIVATE" not in (office.folder / "authority.pem").read_bytes()
    assert (revoked_of(office).number, revoked_of(office).revoked) == (1, {})
    assert office.unlock(PASSPHRASE).root == office.root
    with pytest.raises(TrustError, match=r"authority\.key: the passphrase is wrong"):
        office.unlock(b"another passphrase")


def test_an_authority_is_never_made_over_something(tmp_path: Path, office: AuthorityStore) -> None:
    before = {path: path.read_bytes() for path in office.folder.iterdir()}
    with pytest.raises(ConfigError, match="is not an empty folder"):
        AuthorityStore.found(office.folder, "another", 10, 10, None)
    assert {path: path.read_bytes() for path in office.folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    made = AuthorityStore.found(tmp_path / "link", "another", 10, 10, None)
    assert AuthorityStore(tmp_path / "empty").root == made.root


def test_an_authority_is_not_made_in_the_place_of_the_folder_that_a_shell_is_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is the working directory"):
        AuthorityStore.found(Path(), "fleet", 10, 10, None)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_half_an_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuthorityStore, "sign_list", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        AuthorityStore.found(tmp_path / "authority", "fleet", 10, 10, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", 65 * "n", 33 * "ü"])
def test_a_name_that_no_certificate_can_bear_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="an authority's name has 1 to 64 bytes"):
        AuthorityStore.found(tmp_path / "new", name, 10, 10, None)
    assert list(tmp_path.iterdir()) == []
    AuthorityStore.found(tmp_path / "new", 32 * "ü", 10, 10, None)


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fewer than 12 characters"):
        AuthorityStore.found(tmp_path / "authority", "fleet", 10, 10, b"short")


def test_a_folder_that_is_no_authoritys_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "gone", tmp_path / "file"):
        with pytest.raises(ConfigError, match="is no authority's folder"):
            AuthorityStore(folder).unlock(None)
        with pytest.raises(ConfigError, match="is no authority's folder"):
            AuthorityStore(folder).certificates()


def test_key_and_certificate_of_two_authorities_do_not_make_one(office: AuthorityStore, tmp_path: Path) -> None:
    other = AuthorityStore.found(tmp_path / "other", "fleet", 10, 10, None)
    (office.folder / "authority.key").write_bytes((other.folder / "authority.key").read_bytes())
    with pytest.raises(TrustError, match="do not belong together"):
        office.unlock(None)


# Certificates


def test_a_certificate_is_good_from_now_for_its_days_and_in_the_record(
    office: AuthorityStore, signer: Authority
) -> None:
    mine = key()
    der = office.issue(signer, "kitchen", mine.public, 10)
    now = datetime.now(UTC)
    assert office.root.verify(der, now) == ("kitchen", mine.public)
    for at in (now - timedelta(hours=2), now + timedelta(days=10, minutes=1)):
        with pytest.raises(TrustError, match="not valid at"):
            office.root.verify(der, at)
    ((issued, how),) = office.certificates()
    assert (issued.name, issued.key, how) == ("kitchen", mine.public.key_id, "valid")
    assert base64.b64decode(issued.certificate) == der


def test_serials_are_random(office: AuthorityStore, signer: Authority) -> None:
    mine = key()
    for _ in range(3):
        office.issue(signer, "kitchen", mine.public, 10)
    serials = [int(issued.serial, 16) for issued, _ in office.certificates()]
    assert len(set(serials)) == 3
    assert all(serial.bit_length() > 100 for serial in serials)


def test_a_device_renews_with_its_own_key_and_no_other(office: AuthorityStore, signer: Authority) -> None:
    mine, other = key(), key()
    office.issue(signer, "kitchen", mine.public, 10)
    office.issue(signer, "kitchen", mine.public, 20)
    with pytest.raises(ConfigError, match=r"kitchen has a certificate with another key .* revoke it first"):
        office.issue(signer, "kitchen", other.public, 10)
    with pytest.raises(ConfigError, match=f"the key {mine.public.key_id} is that of kitchen"):
        office.issue(signer, "garage", mine.public, 10)
    office.revoke(signer, "kitchen", Reason.KEY_COMPROMISE, 30)
    with pytest.raises(ConfigError, match="was revoked: the device must make a new one"):
        office.issue(signer, "kitchen", mine.public, 10)
    office.issue(signer, "kitchen", other.public, 10)


def test_an_expired_name_may_be_given_to_another_key(
    office: AuthorityStore, signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.issue(signer, "kitchen", key().public, 1)
    later = datetime.now(UTC).replace(microsecond=0) + timedelta(days=2)
    monkeypatch.setattr(module, "_now", lambda: later)
    assert [how for _, how in office.certificates()] == ["expired"]
    office.issue(signer, "kitchen", key().public, 1)


def test_no_certificate_outlasts_its_authority(office: AuthorityStore, signer: Authority) -> None:
    with pytest.raises(ConfigError, match="the authority itself ends on"):
        office.issue(signer, "kitchen", key().public, 3651)


@pytest.mark.parametrize("name", ["", "a b", "../a", "a" * 65])
def test_a_name_that_no_device_can_have_is_refused(office: AuthorityStore, signer: Authority, name: str) -> None:
    with pytest.raises(ConfigError, match="does not match"):
        office.issue(signer, name, key().public, 10)
    assert office.certificates() == ()


# Revocations


def test_what_is_revoked_is_refused_and_listed_for_good(office: AuthorityStore, signer: Authority) -> None:
    kitchen, garage = (office.issue(signer, name, key().public, 10) for name in ("kitchen", "garage"))
    (gone,) = office.revoke(signer, "kitchen", Reason.KEY_COMPROMISE, 30)
    listed = revoked_of(office)
    assert (listed.number, {f"{serial:x}" for serial in listed.revoked}) == (2, {gone.serial})
    root = office.root.with_revocations(listed.der)
    assert root.verify(garage)[0] == "garage"
    with pytest.raises(TrustError, match="kitchen is revoked"):
        root.verify(kitchen)
    office.revoke(signer, "garage", Reason.UNSPECIFIED, 30)
    assert len(revoked_of(office).revoked) == 2
    assert [how for _, how in office.certificates()] == ["revoked (keyCompromise)", "revoked (unspecified)"]


def test_a_name_revokes_all_its_certificates_and_a_serial_one(office: AuthorityStore, signer: Authority) -> None:
    mine = key()
    for _ in range(3):
        office.issue(signer, "kitchen", mine.public, 10)
    serial = office.certificates()[1][0].serial
    spelled = ":".join(serial[i : i + 2] for i in range(0, len(serial), 2)).upper()
    assert [each.serial for each in office.revoke(signer, spelled, Reason.SUPERSEDED, 30)] == [serial]
    assert len(office.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)) == 2
    assert office.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30) == ()
    assert revoked_of(office).number == 4


def test_what_was_never_issued_cannot_be_revoked(office: AuthorityStore, signer: Authority) -> None:
    with pytest.raises(ConfigError, match="no certificate is of the name or serial attic"):
        office.revoke(signer, "attic", Reason.UNSPECIFIED, 30)
    assert revoked_of(office).number == 1


def test_a_fresh_list_has_a_higher_number_and_the_same_revocations(office: AuthorityStore, signer: Authority) -> None:
    office.issue(signer, "kitchen", key().public, 10)
    office.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)
    before = revoked_of(office)
    assert office.sign_list(signer, 60) == 3
    after = revoked_of(office).newer_than(before)
    assert after.revoked == before.revoked
    assert after.next_update - after.this_update == timedelta(days=60)


def test_a_kill_between_record_and_list_uses_no_number_twice(
    office: AuthorityStore, signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    office.issue(signer, "kitchen", key().public, 10)
    with monkeypatch.context() as killed:
        killed.setattr(storage, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            office.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)
    assert revoked_of(office).number == 1
    assert office.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30) == ()
    assert (revoked_of(office).number, len(revoked_of(office).revoked)) == (3, 1)


# The record


def test_half_a_line_at_the_end_did_not_happen(office: AuthorityStore, signer: Authority) -> None:
    office.issue(signer, "kitchen", key().public, 10)
    path = office.folder / "record.jsonl"
    whole = path.read_bytes()
    office.issue(signer, "garage", key().public, 10)
    for cut in range(len(whole) + 1, len(path.read_bytes())):
        torn = path.read_bytes()[:cut]
        assert len(AuthorityRecord(path)._events(torn)) == 2
    os.truncate(path, len(whole) + 40)
    assert [issued.name for issued, _ in office.certificates()] == ["kitchen"]
    office.issue(signer, "attic", key().public, 10)
    assert [issued.name for issued, _ in office.certificates()] == ["kitchen", "attic"]
    assert path.read_bytes().startswith(whole)
    os.truncate(path, path.stat().st_size - 1)  # a longer line than the next one
    office.sign_list(signer, 30)
    assert [json.loads(line)["event"] for line in path.read_bytes().splitlines()] == ["listed", "issued", "listed"]


@pytest.mark.parametrize("line", ["{}", '{"event": "issued"}', '{"event": "other", "at": "2026-01-01T00:00:00Z"}', "x"])
def test_a_damaged_line_is_named_and_nothing_is_written_behind_it(
    office: AuthorityStore, signer: Authority, line: str
) -> None:
    path = office.folder / "record.jsonl"
    with path.open("a") as file:
        file.write(line + "\n")
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"record\.jsonl, line 2 is damaged") as caught:
        office.issue(signer, "kitchen", key().public, 10)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [[], [0], [0, 1], [0, 1, 3], [0, 1, 2]])
def test_a_record_that_lacks_lines_brings_no_revoked_device_back(
    office: AuthorityStore, signer: Authority, kept: list[int]
) -> None:
    office.issue(signer, "kitchen", key().public, 10)
    office.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)
    path = office.folder / "record.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[number] for number in kept))
    for act in (
        lambda: office.sign_list(signer, 30),
        lambda: office.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30),
        lambda: office.issue(signer, "kitchen", key().public, 10),
    ):
        with pytest.raises(DataError, match=r"record\.jsonl lacks lines: .* take it from a backup"):
            act()
    assert path.read_bytes() == b"".join(lines[number] for number in kept)
    path.write_bytes(b"".join(lines))
    assert office.sign_list(signer, 30) == 3


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"x")])
def test_a_list_that_is_lost_or_damaged_is_signed_anew(
    office: AuthorityStore, signer: Authority, damage: Callable[[Path], object]
) -> None:
    damage(office.folder / "revoked.crl")
    assert office.sign_list(signer, 30) == 2
    assert revoked_of(office).number == 2


def test_nothing_is_handed_out_that_is_not_on_the_disk(
    office: AuthorityStore, signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        office.issue(signer, "kitchen", key().public, 10)


WORK = """
import sys
from pathlib import Path
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from coordinator.authority.store import AuthorityStore
office = AuthorityStore(Path(sys.argv[1]))
signer = office.unlock(None)
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    office.issue(signer, f"{sys.argv[2]}-{number}", IdentityKey.generate(SystemEntropy()).public, 10)
    office.sign_list(signer, 30)
    print(number, flush=True)
"""


def worker(office: AuthorityStore, name: str, count: int) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", WORK, str(office.folder), name, str(count)]
    started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_at_once_lose_nothing_and_use_no_number_twice(office: AuthorityStore) -> None:
    workers = [worker(office, name, 15) for name in ("a", "b")]
    for each in workers:
        go(each)
    for each in workers:
        each.communicate(timeout=60)
        assert each.returncode == 0
    events = AuthorityRecord(office.folder / "record.jsonl").read()
    names = [event.name for event in events if isinstance(event, Issued)]
    assert sorted(names) == sorted(f"{who}-{number}" for who in "ab" for number in range(15))
    assert [event.number for event in events if isinstance(event, Listed)] == list(range(1, 32))
    assert revoked_of(office).number == 31


def test_who_writes_waits_for_the_one_that_does(office: AuthorityStore) -> None:
    process = worker(office, "late", 1)
    with AuthorityRecord(office.folder / "record.jsonl").writing() as pen:
        go(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        pen.add(Listed(at=datetime.now(UTC), number=2, until=datetime.now(UTC)))
    process.communicate(timeout=60)
    events = AuthorityRecord(office.folder / "record.jsonl").read()
    assert [event.number for event in events if isinstance(event, Listed)] == [1, 2, 3]
    assert [issued.name for issued, _ in office.certificates()] == ["late-0"]


def test_a_kill_loses_nothing_that_was_handed_out(office: AuthorityStore) -> None:
    for turn in range(3):
        process = worker(office, f"turn{turn}", 10_000)
        go(process)
        assert process.stdout is not None
        told = [process.stdout.readline() for _ in range(3)]
        time.sleep(0.003 * turn)
        process.kill()
        told += process.communicate()[0].splitlines()
        names = {issued.name for issued, _ in office.certificates()}
        assert {f"turn{turn}-{number.strip()}" for number in told} <= names
        assert not [path.name for path in office.folder.iterdir() if path.suffix == ".torn"]
    office.issue(office.unlock(None), "after", key().public, 10)


# The commands


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(PASSPHRASE + b"\n")

    def call(*arguments: str, typed: str | None = None) -> Result:
        return CliRunner().invoke(authority, arguments, input=typed)

    return call


def ok(result: Result) -> str:
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def refused(result: Result, reason: str) -> None:
    assert isinstance(result.exception, EdgeAdaptError), (result.output, result.exception)
    assert reason in str(result.exception)


def test_from_init_to_revoke_by_command(run: Run, tmp_path: Path) -> None:
    mine = key()
    (tmp_path / "kitchen.csr").write_bytes(requests.request(mine, "kitchen"))
    (tmp_path / "garage.pub").write_bytes(key().public.to_pem())
    secret = ("--passphrase-file", "secret")
    assert AuthorityStore(tmp_path / "dir").folder.name in ok(run("init", "dir", *secret))
    said = ok(run("issue", "dir", "--request", "kitchen.csr", "--days", "7", "--out", "kitchen.pem", *secret))
    assert mine.public.key_id in said
    root = Root.from_pem((tmp_path / "dir" / "authority.pem").read_bytes())
    certificate = certificates.to_der((tmp_path / "kitchen.pem").read_bytes())
    assert root.verify(certificate, datetime.now(UTC))[0] == "kitchen"
    assert "BEGIN CERTIFICATE" in ok(run("issue", "dir", "--name", "garage", "--public-key", "garage.pub", *secret))
    assert "serial" in ok(run("revoke", "dir", "kitchen", "--reason", "keyCompromise", *secret))
    listed = json.loads(ok(run("list", "dir", "--json")))["certificates"]
    assert [(each["name"], each["status"]) for each in listed] == [
        ("kitchen", "revoked (keyCompromise)"),
        ("garage", "valid"),
    ]
    assert ok(run("list", "dir")).count("\n") == 2
    assert "revocation list 3" in ok(run("crl", "dir", "--list-days", "5", *secret))
    with pytest.raises(TrustError, match="revoked"):
        root.with_revocations((tmp_path / "dir" / "revoked.crl").read_bytes()).verify(certificate)


def test_the_passphrase_is_asked_for_and_never_shown(run: Run, tmp_path: Path) -> None:
    typed = PASSPHRASE.decode()
    assert typed not in ok(run("init", "dir", typed=f"{typed}\n{typed}\n"))
    assert typed not in ok(run("crl", "dir", typed=f"{typed}\n"))
    refused(run("crl", "dir", typed="something else\n"), "authority.key: the passphrase is wrong")
    assert typed.encode() not in b"".join(path.read_bytes() for path in (tmp_path / "dir").iterdir())


def test_a_key_without_a_passphrase_must_be_asked_for(run: Run) -> None:
    refused(run("init", "dir", typed=""), "nobody is there to type the passphrase: give --passphrase-file")
    ok(run("init", "dir", "--unencrypted"))
    ok(run("crl", "dir"))
    refused(run("init", "other", "--unencrypted", "--passphrase-file", "secret"), "contradict")


def test_what_is_asked_for_must_be_clear(run: Run, tmp_path: Path) -> None:
    ok(run("init", "dir", "--unencrypted"))
    (tmp_path / "kitchen.csr").write_bytes(requests.request(key(), "kitchen"))
    (tmp_path / "kitchen.pub").write_bytes(key().public.to_pem())
    refused(run("issue", "dir"), "give either --request or --public-key")
    refused(run("issue", "dir", "--request", "kitchen.csr", "--public-key", "kitchen.pub"), "give either")
    refused(run("issue", "dir", "--public-key", "kitchen.pub"), "--public-key needs --name")
    refused(run("issue", "dir", "--request", "kitchen.csr", "--out", "no/kitchen.pem"), "choose another --out")
    refused(run("issue", "dir", "--request", "kitchen.csr", "--name", "garage"), "is for kitchen, not for garage")
    refused(run("issue", "dir", "--request", "kitchen.pub"), "kitchen.pub: not a certificate request")
    refused(run("issue", "dir", "--name", "a", "--public-key", "kitchen.csr"), "kitchen.csr: not a public key")
    assert run("revoke", "dir", "kitchen", "--reason", "whim").exit_code == 2
    assert ok(run("list", "dir")) == ""


def test_a_file_without_an_end_is_not_waited_for(run: Run) -> None:
    refused(run("init", "dir", "--passphrase-file", "/dev/zero"), "more than 1023 bytes")
    ok(run("init", "dir", "--unencrypted"))
    refused(run("issue", "dir", "--request", "/dev/zero"), "/dev/zero")
    refused(run("issue", "dir", "--name", "garage", "--public-key", "/dev/zero"), "/dev/zero")
