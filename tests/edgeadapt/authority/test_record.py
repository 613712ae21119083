"""The authority's record: no event is lost, through kills and with two processes that write at once."""

import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

import edgeadapt
from aggregation.errors import DataError
from aggregation.pki import Authority
from aggregation.pki.revocation import Reason
from edgeadapt.authority import AuthorityRecord, AuthorityStore, CertificateIssued, ListSigned
from tests.support import refused
from tests.support.authority import new_key, newest_list

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
