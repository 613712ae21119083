"""Folders to work in are deleted when they are not needed, and those of killed processes by whoever comes next."""

import gc
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from aggregation.errors import ConfigError
from edgeadapt.formats import storage
from edgeadapt.formats.storage import CACHE, HIDDEN, LOCK, WorkFolder, cache_folder, cached, remove_abandoned
from tests.support import refused

FILL = """
import sys
from pathlib import Path
from edgeadapt.formats.storage import WorkFolder
work = WorkFolder(Path(sys.argv[1]))
(work.path / "weights").write_bytes(bytes(1000))
print("filled", flush=True)
sys.stdin.read()
"""


@contextmanager
def filling(where: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has filled a folder to work in, and keeps it."""
    command = [sys.executable, "-c", FILL, str(where)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "filled\n"
            yield process
        finally:
            process.kill()


def hidden(where: Path) -> list[Path]:
    return sorted(where.glob(f"{HIDDEN}*"))


def close(work: list[WorkFolder]) -> None:
    work[0].close()


def drop(work: list[WorkFolder]) -> None:
    work.clear()
    gc.collect()


@pytest.mark.parametrize("end", [close, drop])
def test_a_folder_is_deleted_when_it_is_not_needed(tmp_path: Path, end: Callable[[list[WorkFolder]], None]) -> None:
    work = [WorkFolder(tmp_path)]
    (work[0].path / "file").write_bytes(b"x")
    assert len(hidden(tmp_path)) == 1
    end(work)
    assert hidden(tmp_path) == []


def test_a_folder_is_deleted_when_its_process_ends(tmp_path: Path) -> None:
    with filling(tmp_path) as process:
        process.communicate()  # closes its input
    assert process.returncode == 0
    assert hidden(tmp_path) == []


def test_the_next_folder_replaces_that_of_a_killed_process_and_of_no_other(tmp_path: Path) -> None:
    with filling(tmp_path) as alive:
        [kept] = hidden(tmp_path)
        with filling(tmp_path) as process:
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert len(hidden(tmp_path)) == 2
        mine = WorkFolder(tmp_path)
        assert hidden(tmp_path) == sorted([kept, mine.path.parent])
        assert (kept / "content" / "weights").stat().st_size == 1000
        remove_abandoned(tmp_path)  # not one's own either
        assert mine.path.is_dir()
        alive.kill()
    mine.close()


def test_what_a_killed_process_left_goes_with_the_next_folder_that_is_written_there(tmp_path: Path) -> None:
    with filling(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
    with storage.new_folder(tmp_path / "out") as stage:
        (stage / "file").write_bytes(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_is_not_known_to_be_abandoned_stays(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (tmp_path / f"{HIDDEN}unlocked").mkdir()
    (tmp_path / f"{HIDDEN}link").symlink_to(elsewhere)
    (tmp_path / f"{HIDDEN}lock-is-a-link").mkdir()
    (tmp_path / f"{HIDDEN}lock-is-a-link" / LOCK).symlink_to(elsewhere / LOCK)
    (tmp_path / f"{HIDDEN}file").touch()
    before = hidden(tmp_path)
    remove_abandoned(tmp_path)
    assert hidden(tmp_path) == before
    assert (elsewhere / LOCK).exists()


def test_a_folder_that_is_deleted_while_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked: list[Path] = []

    class Late(FileLock):  # another process locks first, and deletes
        def acquire(self, *given: Any, **named: Any) -> Any:
            proxy = super().acquire(*given, **named)
            locked.append(Path(self.lock_file).parent)
            if len(locked) == 1:
                shutil.rmtree(locked[0])
            return proxy

    monkeypatch.setattr(storage, "FileLock", Late)
    work = WorkFolder(tmp_path)
    assert len(locked) == 2
    assert hidden(tmp_path) == [work.path.parent] == locked[1:]


# The folder of the cache


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_is_made_once(cache: Path) -> None:
    calls: list[Path] = []

    def make(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("x")

    assert cached("a", make) == cached("a", make) == cache / "a"
    assert len(calls) == 1
    assert (cache / "a" / "file").read_text() == "x"


def test_a_failure_leaves_nothing_and_the_next_call_tries_again(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with refused(ConfigError, CACHE, value=str(cache / "a")) as caught:
        cached("a", fail)
    assert "No space left on device" in str(caught.value)
    assert list(cache.iterdir()) == []
    assert cached("a", lambda folder: None) == cache / "a"


def test_the_slower_of_two_processes_uses_the_folder_of_the_faster(cache: Path) -> None:
    def slow(folder: Path) -> None:
        cached("a", lambda inner: (inner / "file").write_text("first") and None)
        (folder / "file").write_text("second")

    assert (cached("a", slow) / "file").read_text() == "first"
    assert [path.name for path in cache.iterdir()] == ["a"]


def test_a_cache_that_cannot_be_written_is_named(cache: Path) -> None:
    cache.write_text("a file")
    with refused(ConfigError, CACHE):
        cached("a", lambda folder: None)


def test_without_the_variable_it_is_the_systems_folder_for_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(CACHE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder().is_relative_to(tmp_path)
    assert "edgeadapt" in cache_folder().parts
