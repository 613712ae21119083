"""Failures of the registry's disk and database: each is an error of one line, and nothing that was stored is lost."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem
from sqlalchemy import create_engine, event
from sqlalchemy.exc import OperationalError

from aggregation.errors import ConfigError, DataError, EdgeAdaptError
from coordinator.registry import Registry, database
from edgeadapt.formats import files
from tests.support import refused

Reopen = Callable[[], Registry]
NO_SPACE = OSError(28, "No space left on device")


def one_line(error: BaseException) -> str:
    message = str(error)
    assert "\n" not in message
    return message


def fail(*_: object, **__: object) -> None:
    raise NO_SPACE


def disk_full_on_open(registry: Registry, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalFileSystem, "open", fail)


def disk_full_half_way_through_the_blob(registry: Registry, patch: pytest.MonkeyPatch) -> None:
    real = LocalFileSystem.open

    def half(self: LocalFileSystem, path: str, *args: Any, **kwargs: Any) -> Any:
        with real(self, path, *args, **kwargs) as file:
            file.write(b"half a")
        raise NO_SPACE

    patch.setattr(LocalFileSystem, "open", half)


def disk_full_on_syncing_the_blob(registry: Registry, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "fsync", fail)


def disk_full_on_moving_the_blob(registry: Registry, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(LocalFileSystem, "mv", fail)


def disk_full_in_the_database(registry: Registry, patch: pytest.MonkeyPatch) -> None:
    """SQLite's own full disk: the file may not grow by a page, and its pages are full."""
    registry.engine.dispose()

    def cap(connection: Any, _: object) -> None:
        connection.execute("PRAGMA max_page_count = 1")  # that is, no more than there are now

    event.listen(registry.engine, "connect", cap)


def database_fails_at(nth: int) -> Callable[[Registry, pytest.MonkeyPatch], None]:
    def install(registry: Registry, patch: pytest.MonkeyPatch) -> None:
        writes = 0

        def count(_c: object, _cursor: object, statement: str, *_: object) -> None:
            nonlocal writes
            writes += statement.startswith(("INSERT", "DELETE"))
            if writes == nth:
                raise OperationalError(statement, None, sqlite3.OperationalError("database or disk is full"))

        event.listen(registry.engine, "before_cursor_execute", count)

    install.__name__ = f"database_fails_at_write_{nth}"
    return install


def commit_fails(registry: Registry, patch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise OperationalError("COMMIT", None, sqlite3.OperationalError("database or disk is full"))

    event.listen(registry.engine, "commit", refuse)


@pytest.mark.parametrize(
    "install",
    [
        disk_full_on_open,
        disk_full_half_way_through_the_blob,
        disk_full_on_syncing_the_blob,
        disk_full_on_moving_the_blob,
        disk_full_in_the_database,
        *map(database_fails_at, (1, 2, 3, 4)),
        commit_fails,
    ],
    ids=lambda install: install.__name__,
)
def test_a_round_that_fails_at_any_step_leaves_all_as_it_was_and_can_be_repeated(
    install: Callable[[Registry, pytest.MonkeyPatch], None], reopen: Reopen, rounds: Any, tmp_path: Path
) -> None:
    registry = reopen()
    rounds.seed(registry)
    rounds.commit(registry, 1)
    before = rounds.snapshot(registry)

    with pytest.MonkeyPatch.context() as patch:
        install(registry, patch)
        caught: EdgeAdaptError | None = None
        while caught is None and len(before[1]) < 200:  # a capped database has room for a few
            try:
                rounds.commit(registry, len(before[1]) + 1)
            except EdgeAdaptError as error:
                caught = error
            else:
                before = rounds.snapshot(registry)
    assert caught is not None
    assert "nothing was changed" in one_line(caught)
    assert "full" in str(caught) or "No space left" in str(caught)
    assert not list((tmp_path / "blobs").glob("*.part"))

    again = reopen()
    assert rounds.snapshot(again) == before
    rounds.commit(again, len(before[1]) + 1)
    assert len(again.rounds()) == len(again.versions()) - 1 == len(before[1]) + 1


def test_a_partial_file_of_a_killed_write_is_replaced(reopen: Reopen, rounds: Any, tmp_path: Path) -> None:
    registry = reopen()
    rounds.seed(registry)
    part = tmp_path / "blobs" / f"{rounds.manifest(1).sha256}.safetensors.part"
    part.write_bytes(rounds.blob(1)[:10])
    rounds.commit(registry, 1)
    assert registry.blob(1) == rounds.blob(1)
    assert not part.exists()


def test_a_folder_that_cannot_be_created_is_named(tmp_path: Path, rounds: Any) -> None:
    (tmp_path / "file").touch()
    with refused(EdgeAdaptError, "database") as caught:
        Registry.open(f"sqlite:///{tmp_path}/file/sub/registry.db", str(tmp_path), [rounds.key.public])
    assert f"{tmp_path}/file/sub" in str(caught.value)
    with refused(EdgeAdaptError, "blobs") as caught:
        Registry.open(f"sqlite:///{tmp_path}/r.db", str(tmp_path / "file/blobs"), [rounds.key.public])
    assert f"{tmp_path}/file/blobs" in str(caught.value)


def test_a_read_only_database_is_named_and_keeps_what_it_had(reopen: Reopen, rounds: Any) -> None:
    registry = reopen()
    rounds.seed(registry)
    before = rounds.snapshot(registry)
    registry.engine.dispose()
    event.listen(registry.engine, "connect", lambda connection, _: connection.execute("PRAGMA query_only = ON"))
    with refused(EdgeAdaptError, "database"):
        rounds.commit(registry, 1)
    assert rounds.snapshot(reopen()) == before


def test_a_file_that_is_not_a_database_is_refused_and_not_touched(tmp_path: Path, reopen: Reopen) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(b"a shopping list, certainly no database " * 50)
    before = path.read_bytes()
    with refused(DataError, "database") as caught:
        reopen()
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_a_corrupt_database_is_refused(tmp_path: Path, reopen: Reopen, rounds: Any) -> None:
    registry = reopen()
    rounds.seed(registry)
    rounds.commit(registry, 1)
    registry.close()
    path = tmp_path / "registry.db"
    blob = path.read_bytes()
    path.write_bytes(blob[:4096] + b"\xff" * (len(blob) - 4096))
    with refused(DataError, "database"):
        reopen().versions()


def test_another_programs_database_is_refused_and_not_touched(tmp_path: Path, reopen: Reopen) -> None:
    path = tmp_path / "registry.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")
    connection.close()
    before = path.read_bytes()
    with refused(ConfigError, "database") as caught:
        reopen()
    assert "recipes" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("found", "remedy"), [("99", "update edgeadapt"), ("1", "edgeadapt coordinator upgrade")])
def test_a_registry_of_another_schema_is_refused_and_not_touched(
    tmp_path: Path, reopen: Reopen, rounds: Any, found: str, remedy: str
) -> None:
    registry = reopen()
    rounds.seed(registry)
    registry.close()
    path = tmp_path / "registry.db"
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE edgeadapt_schema SET version_num = ?", (found,))
        connection.execute("DROP TABLE edgeadapt_optimizer")
    connection.close()
    before = path.read_bytes()
    with refused(ConfigError, "database.schema", value=found) as caught:
        reopen()
    assert remedy in str(caught.value)
    assert path.read_bytes() == before


def test_the_deletion_of_a_journal_survives_a_power_cut(reopen: Reopen) -> None:
    """A journal that reappears would take back a committed round, and the log of the round contradict the registry."""
    with reopen().engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 3  # EXTRA


def test_a_locked_database_is_named_and_keeps_what_it_had(tmp_path: Path, reopen: Reopen, rounds: Any) -> None:
    registry = reopen()
    rounds.seed(registry)
    registry.engine.dispose()
    event.listen(registry.engine, "connect", lambda connection, _: connection.execute("PRAGMA busy_timeout = 1"))
    other = sqlite3.connect(tmp_path / "registry.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with refused(EdgeAdaptError, "database"):
        rounds.commit(registry, 1)
    other.execute("ROLLBACK")
    other.close()
    rounds.commit(registry, 1)


@pytest.mark.parametrize(
    ("database_url", "blob_url", "about"),
    [
        ("no url", "blobs", "database.url"),
        ("oracle+nosuchdriver://host/db", "blobs", "database.url"),
        ("nosuchdatabase://host/db", "blobs", "database.url"),
        ("sqlite://", "nosuchprotocol://bucket", "blobs.url"),
    ],
)
def test_addresses_that_are_not_usable_are_refused(
    database_url: str, blob_url: str, about: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(ConfigError, about):
        Registry.open(database_url, blob_url, [])


def test_a_database_password_appears_in_no_message(tmp_path: Path) -> None:
    engine = create_engine("sqlite:///" + str(tmp_path / "r.db"))
    engine.url = engine.url.set(username="me", password="hunter2")  # noqa: S106
    with refused(EdgeAdaptError, "database") as caught, database.explained(engine):
        raise OperationalError("SELECT 1", None, sqlite3.OperationalError("gone"))
    assert "hunter2" not in str(caught.value)


# A kill in a loop of commits


ROOT = Path(__file__).resolve().parents[3]
LOOP = """
import sys

from aggregation.pki.identity import IdentityKey
from coordinator.registry import Registry
from tests.support.registry import Rounds

folder, pem = sys.argv[1:]
rounds = Rounds(IdentityKey.from_pem(pem.encode()))
registry = Registry.open(f"sqlite:///{folder}/registry.db", f"{folder}/blobs", [rounds.key.public])
if registry.latest() is None:
    rounds.seed(registry)
number = len(registry.rounds())
while True:
    number += 1
    rounds.commit(registry, number)
    print(number, flush=True)
"""


def test_a_kill_in_a_loop_of_commits_loses_at_most_the_round_under_way(
    reopen: Callable[[], Registry], rounds: Any, tmp_path: Path
) -> None:
    confirmed = 0
    for _ in range(2):  # the second process goes on from what the killed one left
        confirmed = _run_and_kill(tmp_path, rounds, confirmed + 3)
        registry = reopen()
        done = len(registry.rounds())
        assert confirmed <= done <= confirmed + 1
        assert registry.rounds() == tuple(rounds.record(n) for n in range(1, done + 1))
        assert [version.manifest for version in registry.versions()] == [rounds.manifest(n) for n in range(done + 1)]
        for number in range(done + 1):
            assert registry.blob(number) == rounds.blob(number)
        assert (registry.optimizer_state()["first"] == done).all()
        registry.close()


def _run_and_kill(folder: Path, rounds: Any, until: int) -> int:
    """Kill the loop once it confirmed round ``until``; the last round that it confirmed."""
    command = [sys.executable, "-c", LOOP, str(folder), rounds.key.to_pem().decode()]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= until:
                break
        os.kill(process.pid, signal.SIGKILL)
        last = [int(line), *map(int, process.stdout.read().split())][-1]
    assert process.returncode == -signal.SIGKILL
    return last


# One flipped byte anywhere in a registry: reading notices it, or returns what was stored. What may change without
# notice is what no reader uses: SQLite's own format, its free space and its index of keys, and the key id in an
# envelope, which only names the key that an error message is about. The audit's half of this is
# tests/edgeadapt/auditing/test_flipped_bytes.py.
SEED, FLIPS, ROUNDS = 20261126, 250, 3


@pytest.fixture
def folder(tmp_path: Path, reopen: Callable[[], Registry], rounds: Any) -> Path:
    """The registry of a few rounds, of which the last one was aborted; closed."""
    registry = reopen()
    rounds.seed(registry)
    for number in range(1, ROUNDS):
        rounds.commit(registry, number)
    registry.record_round(rounds.aborted(ROUNDS), rounds.key)
    registry.close()
    return tmp_path


def read(folder: Path, rounds: Any) -> tuple[Any, ...]:
    """Everything that a coordinator relies on."""
    registry = Registry.open(f"sqlite:///{folder}/registry.db", str(folder / "blobs"), [rounds.key.public])
    try:
        head, state = registry.head(), registry.optimizer_state()
        versions = [version.manifest for version in registry.versions()]
        blobs = [registry.blob(manifest.version) for manifest in versions]
        return head.newest, head.round, files.encode(state), versions, blobs, registry.rounds()
    finally:
        registry.close()


def noticed(folder: Path, rounds: Any, sound: tuple[Any, ...]) -> bool:
    """Whether reading raises; if it does not, it must return what was stored."""
    try:
        found = read(folder, rounds)
    except EdgeAdaptError:
        return True
    assert found == sound
    return False


def flipped(path: Path, places: Sequence[int], seed: int = SEED) -> Iterator[int]:
    """Flip the byte at each place in turn; yields the place while it is flipped."""
    sound, generator = path.read_bytes(), random.Random(seed)  # noqa: S311
    for place in places:
        path.write_bytes(sound[:place] + bytes([sound[place] ^ generator.randrange(1, 256)]) + sound[place + 1 :])
        yield place
    path.write_bytes(sound)


def test_a_flipped_byte_in_the_database_is_noticed_or_changes_nothing(folder: Path, rounds: Any) -> None:
    sound, path = read(folder, rounds), folder / "registry.db"
    raw = path.read_bytes()
    places = random.Random(SEED).sample([at for at, byte in enumerate(raw) if byte], FLIPS)  # noqa: S311
    assert sum(noticed(folder, rounds, sound) for _ in flipped(path, places)) > FLIPS // 2


def test_every_flipped_byte_of_a_signed_document_or_a_state_is_noticed(folder: Path, rounds: Any) -> None:
    """Of each document every 40th byte is tried, and of the last optimizer state every third one."""
    sound, path = read(folder, rounds), folder / "registry.db"
    raw = path.read_bytes()
    signed = [rounds.manifest(n).sign(rounds.key) for n in range(ROUNDS)]
    signed += [rounds.record(n).sign(rounds.key) for n in range(1, ROUNDS)] + [rounds.aborted(ROUNDS).sign(rounds.key)]
    for document, step in [*((each, 40) for each in signed), (files.encode(rounds.state(ROUNDS - 1)), 3)]:
        start = raw.rindex(document)
        places = range(start, start + len(document), step)
        assert [at - start for at in flipped(path, places) if not noticed(folder, rounds, sound)] == []


def test_a_flipped_byte_in_a_blob_is_noticed(folder: Path, rounds: Any) -> None:
    sound = read(folder, rounds)
    for path in sorted((folder / "blobs").iterdir()):
        places = list(range(0, path.stat().st_size, 29))
        assert [at for at in flipped(path, places) if not noticed(folder, rounds, sound)] == []


def test_a_removed_blob_is_noticed(folder: Path, rounds: Any) -> None:
    sound = read(folder, rounds)
    for path in sorted((folder / "blobs").iterdir()):
        shutil.move(path, folder / "away")
        assert noticed(folder, rounds, sound)
        shutil.move(folder / "away", path)
