"""The authority's folder, its certificates and its revocation lists."""

import base64
import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import edgeadapt
from aggregation.errors import ConfigError, DataError, TrustError
from aggregation.pki import Authority, revocation
from aggregation.pki.certificates import load
from aggregation.pki.requests import request
from aggregation.pki.revocation import Reason
from edgeadapt.authority import AuthorityRecord, AuthorityStore, CertificateIssued, ListSigned
from edgeadapt.authority.record import CertificateRevoked
from edgeadapt.formats import storage
from edgeadapt.formats.gateway.invitation import ENROLMENT
from edgeadapt.formats.gateway.invitation import key as invitation_key
from edgeadapt.formats.gateway.messages import RENEWAL_TAG
from tests.support import refused
from tests.support.authority import PASSPHRASE, new_key, newest_list

# The folder


def test_a_new_authority_has_a_key_for_its_owner_only_and_an_empty_list(tmp_path: Path) -> None:
    store = AuthorityStore.create(tmp_path / "authority", "fleet", 3650, 30, PASSPHRASE)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in store.folder.iterdir()}
    del modes["record.lock"]
    assert modes == {"authority.key": 0o600, "record.jsonl": 0o600, "authority.pem": 0o644, "revoked.crl": 0o644}
    assert stat.S_IMODE(store.folder.stat().st_mode) == 0o700
    assert store.encrypted
    assert b"PRIVATE" not in (store.folder / "authority.pem").read_bytes()
    assert (newest_list(store).number, newest_list(store).revoked) == (1, {})
    assert store.unlock(PASSPHRASE).root == store.root
    with refused(TrustError, "key.passphrase") as caught:
        store.unlock(b"another passphrase")
    assert str(caught.value).startswith(f"{store.folder / 'authority.key'}: ")


def test_an_authority_never_replaces_files(tmp_path: Path, store: AuthorityStore) -> None:
    before = {path: path.read_bytes() for path in store.folder.iterdir()}
    with refused(ConfigError, store.folder.name):
        AuthorityStore.create(store.folder, "another", 10, 10, None)
    assert {path: path.read_bytes() for path in store.folder.iterdir()} == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    created = AuthorityStore.create(tmp_path / "link", "another", 10, 10, None)
    assert AuthorityStore(tmp_path / "empty").root == created.root


def test_an_authority_does_not_replace_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(ConfigError, tmp_path.name):
        AuthorityStore.create(Path(), "fleet", 10, 10, None)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_no_part_of_an_authority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AuthorityStore, "sign_list", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        AuthorityStore.create(tmp_path / "authority", "fleet", 10, 10, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", 65 * "n", 33 * "ü"], ids=["empty", "too long", "too many bytes"])
def test_a_name_that_no_certificate_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with refused(ConfigError, "authority.name"):
        AuthorityStore.create(tmp_path / "new", name, 10, 10, None)
    assert list(tmp_path.iterdir()) == []
    AuthorityStore.create(tmp_path / "new", 32 * "ü", 10, 10, None)


def test_a_short_passphrase_is_refused(tmp_path: Path) -> None:
    with refused(ConfigError, "passphrase"):
        AuthorityStore.create(tmp_path / "authority", "fleet", 10, 10, b"short")


@pytest.mark.parametrize("name", ["authority.key", "authority.pem", "record.jsonl"])
def test_a_pipe_in_an_authoritys_folder_is_refused_unread(store: AuthorityStore, name: str) -> None:
    (store.folder / name).unlink()
    os.mkfifo(store.folder / name)
    with refused(DataError, name):
        store.certificates() if name == "record.jsonl" else store.unlock(None)


@pytest.mark.parametrize("name", [".", "missing", "file"])
def test_a_folder_without_an_authority_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    store = AuthorityStore(tmp_path / name)
    with refused(ConfigError, "authority.key", value=str(store.folder)):
        store.unlock(None)
    with refused(ConfigError, "record.jsonl", value=str(store.folder)):
        store.certificates()


def test_key_and_certificate_of_two_authorities_are_refused(store: AuthorityStore, tmp_path: Path) -> None:
    other = AuthorityStore.create(tmp_path / "other", "fleet", 10, 10, None)
    (store.folder / "authority.key").write_bytes((other.folder / "authority.key").read_bytes())
    with refused(TrustError, "authority.key"):
        store.unlock(None)


# Certificates


def test_a_certificate_is_valid_from_now_on_for_its_days_and_is_recorded(
    store: AuthorityStore, signer: Authority
) -> None:
    mine = new_key()
    der = store.issue(signer, "kitchen", mine.public, 10)
    now = datetime.now(UTC)
    assert store.root.verify(der, now) == ("kitchen", mine.public)
    for at in (now - timedelta(hours=2), now + timedelta(days=10, minutes=1)):
        with refused(TrustError, "certificate.validity", value="kitchen"):
            store.root.verify(der, at)
    ((issued, status),) = store.certificates()
    assert (issued.name, issued.key, status) == ("kitchen", mine.public.key_id, "valid")
    assert base64.b64decode(issued.certificate) == der


def test_serials_are_random(store: AuthorityStore, signer: Authority) -> None:
    mine = new_key()
    for _ in range(3):
        store.issue(signer, "kitchen", mine.public, 10)
    serials = [int(issued.serial, 16) for issued, _ in store.certificates()]
    assert len(set(serials)) == 3
    assert all(serial.bit_length() > 100 for serial in serials)


def test_a_device_renews_with_its_own_key_and_no_other(store: AuthorityStore, signer: Authority) -> None:
    mine, other = new_key(), new_key()
    store.issue(signer, "kitchen", mine.public, 10)
    store.issue(signer, "kitchen", mine.public, 20)
    with refused(ConfigError, "name.key", value=mine.public.key_id):
        store.issue(signer, "kitchen", other.public, 10)
    with refused(ConfigError, "key.name", value="kitchen"):
        store.issue(signer, "garage", mine.public, 10)
    store.revoke(signer, "kitchen", Reason.KEY_COMPROMISE, 30)
    with refused(ConfigError, "key.revoked", value=mine.public.key_id):
        store.issue(signer, "kitchen", mine.public, 10)
    store.issue(signer, "kitchen", other.public, 10)


def test_an_expired_name_may_be_given_to_another_key(store: AuthorityStore, signer: Authority) -> None:
    store.issue(signer, "kitchen", new_key().public, 1)
    later = replace(store, clock=lambda: store.clock() + timedelta(days=2))
    assert [status for _, status in later.certificates()] == ["expired"]
    later.issue(signer, "kitchen", new_key().public, 1)


def test_no_certificate_outlasts_its_authority(store: AuthorityStore, signer: Authority) -> None:
    with refused(ConfigError, "--days"):
        store.issue(signer, "kitchen", new_key().public, 3651)


# Revocations


def test_a_revoked_certificate_is_refused_and_stays_listed(store: AuthorityStore, signer: Authority) -> None:
    kitchen, garage = (store.issue(signer, name, new_key().public, 10) for name in ("kitchen", "garage"))
    (gone,) = store.revoke(signer, "kitchen", Reason.KEY_COMPROMISE, 30)
    listed = newest_list(store)
    assert (listed.number, {f"{serial:x}" for serial in listed.revoked}) == (2, {gone.serial})
    root = store.root.with_revocations(listed.der)
    assert root.verify(garage)[0] == "garage"
    with refused(TrustError, "certificate.revoked", value="kitchen"):
        root.verify(kitchen)
    store.revoke(signer, "garage", Reason.UNSPECIFIED, 30)
    assert len(newest_list(store).revoked) == 2
    assert [status for _, status in store.certificates()] == ["revoked (keyCompromise)", "revoked (unspecified)"]


def test_a_name_revokes_all_its_certificates_and_a_serial_one(store: AuthorityStore, signer: Authority) -> None:
    mine = new_key()
    for _ in range(3):
        store.issue(signer, "kitchen", mine.public, 10)
    serial = store.certificates()[1][0].serial
    spelled = ":".join(serial[i : i + 2] for i in range(0, len(serial), 2)).upper()
    assert [each.serial for each in store.revoke(signer, spelled, Reason.SUPERSEDED, 30)] == [serial]
    assert len(store.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)) == 2
    assert store.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30) == ()
    assert newest_list(store).number == 4


def test_a_certificate_that_was_never_issued_cannot_be_revoked(store: AuthorityStore, signer: Authority) -> None:
    with refused(ConfigError, "certificate", value="attic"):
        store.revoke(signer, "attic", Reason.UNSPECIFIED, 30)
    assert newest_list(store).number == 1


def test_a_list_too_long_for_its_readers_revokes_nothing_and_leaves_the_authority_able_to_sign(
    store: AuthorityStore, signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = new_key()
    for _ in range(20):
        store.issue(signer, "kitchen", mine.public, 10)
    serial = store.certificates()[0][0].serial
    monkeypatch.setattr(revocation, "MAX_REVOCATIONS", 300)
    with refused(TrustError, "revocations.size"):
        store.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)
    assert {status for _, status in store.certificates()} == {"valid"}
    assert store.sign_list(signer, 30) == 2
    assert [each.serial for each in store.revoke(signer, serial, Reason.UNSPECIFIED, 30)] == [serial]
    assert len(newest_list(store).revoked) == 1


def test_a_new_list_has_a_higher_number_and_the_same_revocations(store: AuthorityStore, signer: Authority) -> None:
    store.issue(signer, "kitchen", new_key().public, 10)
    store.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)
    before = newest_list(store)
    assert store.sign_list(signer, 60) == 3
    after = newest_list(store).newer_than(before)
    assert after.revoked == before.revoked
    assert after.next_update - after.this_update == timedelta(days=60)


def test_a_certificate_that_has_expired_leaves_the_list_after_one_more(
    store: AuthorityStore, signer: Authority
) -> None:
    """RFC 5280, section 3.3; a day later, for readers whose clock is behind."""
    mine = new_key()
    store.issue(signer, "kitchen", mine.public, 10)
    store.issue(signer, "garage", new_key().public, 100)
    for name in ("kitchen", "garage"):
        store.revoke(signer, name, Reason.KEY_COMPROMISE, 30)
    kitchen, garage = (each for each, _ in store.certificates())

    def listed(days: float) -> list[bool]:
        """Whether each is on a list that is signed so many days after the first one has ended."""
        later = replace(store, clock=lambda: kitchen.not_after + timedelta(days))
        number = later.sign_list(signer, 30)
        newest = newest_list(store)
        assert newest.number == number
        assert not newest.revoked or newest.revoked[int(garage.serial, 16)].reason is Reason.KEY_COMPROMISE
        return [int(each.serial, 16) in newest.revoked for each in (kitchen, garage)]

    assert [listed(days) for days in (-1, 0, 0.9, 1)] == [[True, True]] * 4
    assert [listed(days) for days in (1.1, 1.2, 50)] == [[True, True], [False, True], [False, True]]
    status = {each.name: status for each, status in replace(store, clock=lambda: kitchen.not_after).certificates()}
    assert status["kitchen"] == "revoked (keyCompromise)"
    with refused(ConfigError, "key.revoked"):
        store.issue(signer, "kitchen", mine.public, 10)


def test_a_clock_that_ran_ahead_takes_no_revocation_off_later_lists(store: AuthorityStore, signer: Authority) -> None:
    """A reader refuses a list dated in the future, and the ones after it must have what it lacked."""
    begin = store.clock()
    store.issue(signer, "kitchen", new_key().public, 100)
    store.revoke(signer, "kitchen", Reason.KEY_COMPROMISE, 30)
    revoked = newest_list(store).revoked

    def listed(days: float) -> object:
        """What a list has that is signed so many days from now."""
        later = replace(store, clock=lambda: begin + timedelta(days))
        later.sign_list(signer, 30)
        return newest_list(store).revoked

    assert [listed(days) for days in (365, 366)] == [revoked, {}]
    with refused(TrustError, "revocations.this-update"):
        newest_list(store).require_fresh(store.clock())
    assert [listed(days) for days in (0, 1, 50, 101, 101.1)] == [revoked] * 5
    assert listed(101.2) == {}


def test_a_revocation_of_a_certificate_that_the_record_lacks_stays_on_the_list(
    store: AuthorityStore, signer: Authority
) -> None:
    revoked = CertificateRevoked(at=store.clock(), serial="ab", reason=Reason.SUPERSEDED)
    with (store.folder / "record.jsonl").open("a") as record:
        record.write(revoked.model_dump_json() + "\n")
    assert [store.sign_list(signer, 30) for _ in range(2)] == [2, 3]
    assert list(newest_list(store).revoked) == [0xAB]


def test_a_kill_between_record_and_list_uses_no_number_twice(
    store: AuthorityStore, signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.issue(signer, "kitchen", new_key().public, 10)
    with monkeypatch.context() as killed:
        killed.setattr(storage, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)
    assert newest_list(store).number == 1
    assert store.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30) == ()
    assert (newest_list(store).number, len(newest_list(store).revoked)) == (3, 1)


@pytest.mark.parametrize("content", [None, b"x"], ids=["missing", "damaged"])
def test_a_missing_or_damaged_list_is_signed_again(
    store: AuthorityStore, signer: Authority, content: bytes | None
) -> None:
    if content is None:
        (store.folder / "revoked.crl").unlink()
    else:
        (store.folder / "revoked.crl").write_bytes(content)
    assert store.sign_list(signer, 30) == 2
    assert newest_list(store).number == 2


# What is certified again


INVITED = invitation_key(bytes(range(16)))
DAYS = 30


class Device:
    """A device with a certificate of so many days."""

    def __init__(self, store: AuthorityStore, signer: Authority, days: float = DAYS) -> None:
        self.store, self.signer, self.identity = store, signer, new_key()
        store.invite("kitchen", INVITED.public, 1.0)
        asked = request(self.identity, "kitchen")
        signed = INVITED.public.raw, INVITED.sign(ENROLMENT, asked), asked
        self.held = store.redeem(signer, *signed, days=days, admit=lambda token: None)

    def renew(self, held: bytes, **after: float) -> bytes:
        now = self.store.clock() + timedelta(**after)
        store, signature = replace(self.store, clock=lambda: now), self.identity.sign(RENEWAL_TAG, held)
        return store.renew(self.signer, held, signature, days=DAYS, admit=lambda name: None)


def test_a_device_gets_the_certificate_that_it_has_until_that_has_half_of_its_validity_left(
    store: AuthorityStore, signer: Authority
) -> None:
    """It asks when a third is left: its clock may be a sixth of the validity ahead."""
    device = Device(store, signer)
    assert {device.renew(device.held, days=days) for days in (0, 14)} == {device.held}
    renewed = device.renew(device.held, days=16)
    assert renewed != device.held
    assert device.renew(device.held, days=25) == renewed  # an answer that did not arrive is given once more
    assert len(store.certificates()) == 2
    assert device.renew(renewed, days=40) not in (renewed, device.held)
    with refused(TrustError, "certificate.validity"):
        device.renew(device.held, days=31)


def test_the_last_renewals_end_with_the_authority_and_the_record_does_not_grow(
    store: AuthorityStore, signer: Authority
) -> None:
    device = Device(store, signer, 3645)
    renewed = device.renew(device.held, days=3640)
    assert load(renewed).not_valid_after_utc == store.root.not_after
    assert device.renew(renewed, days=3649) == renewed
    assert len(store.certificates()) == 2


@pytest.mark.parametrize("tls_key", ["null", '"0123456789abcdef"', None], ids=["page", "light device", "now"])
def test_an_invitation_that_was_used_before_is_for_its_key_still(
    store: AuthorityStore, signer: Authority, tls_key: str | None
) -> None:
    """Until 2026-12 the record had the TLS keys of light devices."""
    device, record = Device(store, signer), store.folder / "record.jsonl"
    text = record.read_text()
    assert ', "tls_key": null' in text
    record.write_text(text.replace(', "tls_key": null', f', "tls_key": {tls_key}' if tls_key else ""))
    asked = request(device.identity, "kitchen")
    signed = INVITED.public.raw, INVITED.sign(ENROLMENT, asked), asked
    assert store.redeem(signer, *signed, days=DAYS, admit=lambda token: None) == device.held


# The authority's record: no event is lost, through kills and with two processes that write at once.
ROOT = Path(edgeadapt.__file__).parents[1]


def record_of(store: AuthorityStore) -> AuthorityRecord:
    return AuthorityRecord(store.folder / "record.jsonl")


def test_an_incomplete_line_at_the_end_did_not_happen(store: AuthorityStore, signer: Authority) -> None:
    store.issue(signer, "kitchen", new_key().public, 10)
    path = record_of(store).path
    sound = path.read_bytes()
    store.issue(signer, "garage", new_key().public, 10)
    longer = path.read_bytes()
    for cut in range(len(sound) + 1, len(longer)):
        path.write_bytes(longer[:cut])
        assert len(record_of(store).read()) == 2
    os.truncate(path, len(sound) + 40)
    assert [issued.name for issued, _ in store.certificates()] == ["kitchen"]
    store.issue(signer, "attic", new_key().public, 10)
    assert [issued.name for issued, _ in store.certificates()] == ["kitchen", "attic"]
    assert path.read_bytes().startswith(sound)
    os.truncate(path, path.stat().st_size - 1)  # a longer line than the next one
    store.sign_list(signer, 30)
    assert [json.loads(line)["event"] for line in path.read_bytes().splitlines()] == ["list", "issued", "list"]


@pytest.mark.parametrize("line", ["{}", '{"event": "issued"}', '{"event": "other", "at": "2026-01-01T00:00:00Z"}', "x"])
def test_a_damaged_line_is_named_and_nothing_is_written_after_it(
    store: AuthorityStore, signer: Authority, line: str
) -> None:
    path = record_of(store).path
    with path.open("a") as file:
        file.write(line + "\n")
    before = path.read_bytes()
    with refused(DataError, "record.jsonl", value=2) as caught:
        store.issue(signer, "kitchen", new_key().public, 10)
    assert str(caught.value).startswith(f"{path}, line 2 is damaged")
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [[], [0], [0, 1], [0, 1, 3], [0, 1, 2]])
def test_a_record_that_lacks_lines_reinstates_no_revoked_device(
    store: AuthorityStore, signer: Authority, kept: list[int]
) -> None:
    store.issue(signer, "kitchen", new_key().public, 10)
    store.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30)
    path = record_of(store).path
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[number] for number in kept))
    for act in (
        lambda: store.sign_list(signer, 30),
        lambda: store.revoke(signer, "kitchen", Reason.UNSPECIFIED, 30),
        lambda: store.issue(signer, "kitchen", new_key().public, 10),
    ):
        with refused(DataError, "record.jsonl") as caught:
            act()
        assert "restore it from a backup" in str(caught.value)
    assert path.read_bytes() == b"".join(lines[number] for number in kept)
    path.write_bytes(b"".join(lines))
    assert store.sign_list(signer, 30) == 3


def test_nothing_is_handed_out_before_it_is_on_the_disk(
    store: AuthorityStore, signer: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        store.issue(signer, "kitchen", new_key().public, 10)


WORK = """
import sys
from pathlib import Path
from aggregation.entropy import SystemEntropy
from aggregation.pki.identity import IdentityKey
from edgeadapt.authority import AuthorityStore
store = AuthorityStore(Path(sys.argv[1]))
signer = store.unlock(None)
print("ready", flush=True)
sys.stdin.readline()
for number in range(int(sys.argv[3])):
    store.issue(signer, f"{sys.argv[2]}-{number}", IdentityKey.generate(SystemEntropy()).public, 10)
    store.sign_list(signer, 30)
    print(number, flush=True)
"""


def worker(store: AuthorityStore, name: str, count: int) -> "subprocess.Popen[str]":
    """A process that issues ``count`` certificates after ``go``."""
    command = [sys.executable, "-c", WORK, str(store.folder), name, str(count)]
    started = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def go(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def test_two_processes_at_once_lose_nothing_and_use_no_number_twice(store: AuthorityStore) -> None:
    workers = [worker(store, name, 15) for name in ("a", "b")]
    for each in workers:
        go(each)
    for each in workers:
        each.communicate(timeout=60)
        assert each.returncode == 0
    events = record_of(store).read()
    names = [event.name for event in events if isinstance(event, CertificateIssued)]
    assert sorted(names) == sorted(f"{worker}-{number}" for worker in "ab" for number in range(15))
    assert [event.number for event in events if isinstance(event, ListSigned)] == list(range(1, 32))
    assert newest_list(store).number == 31


def test_a_writer_waits_for_the_one_before_it(store: AuthorityStore) -> None:
    process = worker(store, "late", 1)
    with record_of(store).writing() as writer:
        go(process)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=1)
        writer.add(ListSigned(at=datetime.now(UTC), number=2, next_update=datetime.now(UTC)))
    process.communicate(timeout=60)
    events = record_of(store).read()
    assert [event.number for event in events if isinstance(event, ListSigned)] == [1, 2, 3]
    assert [issued.name for issued, _ in store.certificates()] == ["late-0"]


def test_a_kill_loses_nothing_that_was_handed_out(store: AuthorityStore) -> None:
    for attempt in range(3):
        process = worker(store, f"attempt{attempt}", 10_000)
        go(process)
        assert process.stdout is not None
        printed = [process.stdout.readline() for _ in range(3)]
        time.sleep(0.003 * attempt)
        process.kill()
        printed += process.communicate()[0].splitlines()
        names = {issued.name for issued, _ in store.certificates()}
        assert {f"attempt{attempt}-{number.strip()}" for number in printed} <= names
        assert not [path.name for path in store.folder.iterdir() if path.suffix == ".torn"]
    store.issue(store.unlock(None), "after", new_key().public, 10)
