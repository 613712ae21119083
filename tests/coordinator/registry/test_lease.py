"""Of several coordinators with one registry one leads, and a former leader changes nothing, whatever it believes."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Engine, text

from aggregation.errors import DataError, EdgeAdaptError, TrustError
from coordinator.registry import Leadership, Lease, Registry, TranscriptTable, leadership, lease
from tests.support import refused
from tests.support.gateway import wait_until
from tests.support.registry import Rounds

Reopen = Callable[[], Registry]
ROOT = Path(__file__).parents[3]


@pytest.fixture
def shared(reopen_postgresql: Reopen) -> Registry:
    return reopen_postgresql()


def expire(engine: Engine) -> None:
    with engine.begin() as connection:
        connection.execute(text("UPDATE edgeadapt_lease SET ends = clock_timestamp() - interval '1 s'"))


def taken(engine: Engine, name: str) -> Lease:
    found = Lease.take(engine, name)
    assert isinstance(found, Lease)
    return found


def test_one_leads_until_its_lease_ends_and_each_that_follows_has_the_next_epoch(shared: Registry) -> None:
    engine = shared.engine
    assert leadership(engine) is None
    assert taken(engine, "one").epoch == 1
    assert Lease.take(engine, "two") == Leadership(1, "one", in_force=True)
    expire(engine)
    assert leadership(engine) == Leadership(1, "one", in_force=False)
    assert taken(engine, "two").epoch == 2
    assert Lease.take(engine, "one") == Leadership(2, "two", in_force=True)


@pytest.mark.parametrize("led", [False, True])
def test_of_many_that_take_the_lease_at_once_one_leads(shared: Registry, reopen_postgresql: Reopen, led: bool) -> None:
    if led:
        taken(shared.engine, "before")
        expire(shared.engine)
    engines, start = [reopen_postgresql().engine for _ in range(4)], threading.Barrier(4)
    found = list[object]()

    def take(engine: Engine) -> None:
        start.wait()
        found.append(Lease.take(engine, "one of many"))

    threads = [threading.Thread(target=take, args=[engine]) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert sum(isinstance(each, Lease) for each in found) == 1


def test_a_former_leader_commits_nothing_and_learns_who_leads(
    shared: Registry, rounds: Rounds, reopen_postgresql: Reopen
) -> None:
    rounds.seed(shared)
    first = taken(shared.engine, "one")
    old = replace(shared, epoch=first.epoch)
    rounds.commit(old, 1)
    logs = TranscriptTable(shared.engine, first.epoch)
    logs.append(1, 0, b"begin")
    expire(shared.engine)
    second = taken(shared.engine, "two")
    before = rounds.snapshot(shared)
    writes: list[Callable[[], object]] = [
        lambda: rounds.commit(old, 2),
        lambda: old.record_round(rounds.aborted(2), rounds.key),
        lambda: rounds.commit(shared, 2),  # has no lease at all
        lambda: logs.append(1, 5, b"more"),
        first.renew,
    ]
    for write in writes:
        with refused(EdgeAdaptError, "lease", value=second.epoch) as caught:
            write()
        assert "two" in str(caught.value)
        assert "\n" not in str(caught.value)
    with refused(EdgeAdaptError, "lease", value=second.epoch):
        first.require()
    second.require()
    assert rounds.snapshot(shared) == before
    rounds.commit(replace(shared, epoch=second.epoch), 2)
    TranscriptTable(shared.engine, second.epoch).append(1, 5, b" and end")
    assert len(reopen_postgresql().rounds()) == 2


def test_a_lease_is_renewed_while_its_leader_works_and_ends_with_it(
    shared: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "RENEWAL", 0.02)
    own, renewed = taken(shared.engine, "one"), threading.Event()
    renew = Lease.renew

    def noted(each: Lease) -> None:
        renew(each)
        renewed.set()

    monkeypatch.setattr(Lease, "renew", noted)
    expire(shared.engine)
    with own.kept():
        assert renewed.wait(60)
        found = leadership(shared.engine)
        assert found is not None
        assert found.in_force
    assert leadership(shared.engine) == Leadership(1, "one", in_force=False)


def test_a_leader_that_stops_in_a_transaction_does_not_hold_the_lease(
    shared: Registry, reopen_postgresql: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "IDLE", 200)
    stopped = taken(reopen_postgresql().engine, "one")
    with stopped.engine.connect() as connection:
        connection.begin()
        lease.require_epoch(connection, stopped.epoch)  # holds the row
        expire_later = text("UPDATE edgeadapt_lease SET ends = clock_timestamp() - interval '1 s'")
        connection.execute(expire_later)
        # Nothing was committed, so the lease ends by itself only; the row is free again all the same.
        with shared.engine.begin() as other:
            other.exec_driver_sql("SET LOCAL lock_timeout = 60000")
            other.execute(expire_later)
        assert taken(shared.engine, "two").epoch == 2
        connection.invalidate()
    with refused(EdgeAdaptError, "lease"):
        stopped.renew()


def test_a_transaction_that_only_reads_may_be_idle(shared: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "IDLE", 200)
    taken(shared.engine, "one")
    with shared.engine.connect() as connection:
        assert connection.scalar(text("SHOW idle_in_transaction_session_timeout")) == "0"
        lease.require_epoch(connection, 1)
        assert connection.scalar(text("SHOW idle_in_transaction_session_timeout")) == "200ms"


def test_a_leader_whose_commit_takes_longer_than_its_lease_still_leads(
    reopen_postgresql: Reopen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own transaction holds the row, so no renewal passes while it works."""
    monkeypatch.setattr(lease, "LOCKED", 60_000)
    monkeypatch.setattr(lease, "IDLE", 60_000)
    own, other, looking = (reopen_postgresql().engine for _ in range(3))
    first = taken(own, "one")
    expire(own)
    found = list[object]()
    taking = threading.Thread(target=lambda: found.append(Lease.take(other, "two")))
    waits = text(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    with (
        looking.execution_options(isolation_level="AUTOCOMMIT").connect() as connection,
        lease.fenced(own, first.epoch),
    ):
        taking.start()
        wait_until(lambda: connection.scalar(waits))
    taking.join()
    assert found == [Leadership(1, "one", in_force=True)]
    first.renew()


def test_a_copy_of_the_transcript_follows_the_table(shared: Registry, tmp_path: Path) -> None:
    folder, table = tmp_path / "transcript", TranscriptTable(shared.engine)
    table.copy_to(folder)
    assert not folder.exists()
    table.append(1, 0, b"first")
    table.append(1, 5, b", second")
    table.offer_revocations(b"list", None)
    table.copy_to(folder)
    table.append(1, 13, b", third")
    table.append(2, 0, b"another")
    (folder / "session-000001.log").write_bytes(b"first, s")  # as after a kill while it was copied
    table.copy_to(folder)
    assert (folder / "session-000001.log").read_bytes() == b"first, second, third"
    assert (folder / "session-000002.log").read_bytes() == b"another"
    assert (folder / "revoked.crl").read_bytes() == b"list"
    (folder / "session-000002.log").write_bytes(bytes(9))  # as after a power cut
    with refused(TrustError, "transcript", value=2):
        table.copy_to(folder)
    table.copy_to(folder, whole=True)
    assert (folder / "session-000002.log").read_bytes() == b"another"
    (folder / "session-000002.log").write_bytes(bytes(7))  # the same, and then another session begins
    table.append(3, 0, b"later")
    table.copy_to(folder)
    assert (folder / "session-000002.log").read_bytes() == b"another"
    (folder / "session-000004.log").write_bytes(b"of nobody")
    with refused(TrustError, "transcript", value=4):
        table.copy_to(folder, whole=True)
    assert (folder / "session-000004.log").read_bytes() == b"of nobody"


def test_records_are_appended_once_and_large_ones_in_several_rows(
    shared: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coordinator.registry.transcripttable.LONGEST", 4)
    table = TranscriptTable(shared.engine)
    table.append(1, 0, b"0123456789")
    for start in (0, 5, 9, 11, 20):  # also where no row begins
        with refused(DataError, "transcript", value=1):
            table.append(1, start, b"other")
    with refused(DataError, "transcript", value=2):
        table.append(2, 1, b"other")
    table.copy_to(tmp_path)
    assert (tmp_path / "session-000001.log").read_bytes() == b"0123456789"


PAUSED = """
import sys
from dataclasses import replace
from pathlib import Path
from edgeadapt.formats.registrystores import postgresql_url
from aggregation.pki.identity import IdentityKey
from coordinator.registry import Lease, Registry
from tests.support.registry import Rounds
url, blobs, key = sys.argv[1:]
rounds = Rounds(IdentityKey.from_pem(Path(key).read_bytes()))
registry = Registry.open(postgresql_url(url), blobs, [rounds.key.public])
rounds.seed(registry)
own = Lease.take(registry.engine, "paused")
with own.kept():
    print("leads", flush=True)
    sys.stdin.readline()
    rounds.commit(replace(registry, epoch=own.epoch), 1)
"""


def test_a_process_that_was_stopped_through_a_takeover_fails_to_commit(
    postgresql: str, rounds: Rounds, shared: Registry, tmp_path: Path
) -> None:
    (tmp_path / "key.pem").write_bytes(rounds.key.to_pem())
    command = [sys.executable, "-c", PAUSED, postgresql, str(tmp_path / "blobs"), str(tmp_path / "key.pem")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "leads\n"
            os.kill(process.pid, signal.SIGSTOP)
            expire(shared.engine)
            second = taken(shared.engine, "second")
            os.kill(process.pid, signal.SIGCONT)
            _, errors = process.communicate("go\n", timeout=120)
        finally:
            process.kill()
    assert process.returncode == 1
    assert "second has taken over in epoch 2" in errors.splitlines()[-1]
    assert shared.rounds() == ()
    rounds.commit(replace(shared, epoch=second.epoch), 1)
