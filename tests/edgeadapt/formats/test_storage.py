"""A file or a folder is the old one or the new one, whatever happens in between."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from aggregation.errors import ConfigError, DataError
from edgeadapt.authority import AuthorityStore
from edgeadapt.formats import storage
from tests.support import refused


def watched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The names in ``folder`` each time that the folder itself is written to the disk."""
    seen: list[list[str]] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if folder.exists() and os.path.samestat(os.fstat(descriptor), folder.stat()):
            seen.append(sorted(path.name for path in folder.iterdir()))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    return seen


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_name_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(tmp_path, monkeypatch)
    storage.replace(tmp_path / "list", b"new")
    assert seen == [["list"]]


def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.replace(tmp_path / "list", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.replace(tmp_path / "list", b"new")
    assert content(tmp_path) == {"list": b"old"}


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_file_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        storage.replace(tmp_path / "file", b"", mode)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_a_created_file_is_never_replaced(tmp_path: Path) -> None:
    storage.create(tmp_path / "key", b"first")
    with pytest.raises(FileExistsError):
        storage.create(tmp_path / "key", b"second")
    assert content(tmp_path) == {"key": b"first"}
    assert (tmp_path / "key").stat().st_mode & 0o777 == storage.PRIVATE


def test_a_full_disk_leaves_no_part_of_a_created_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space") as caught:
        storage.create(tmp_path / "key", b"first")
    assert caught.value.filename == str(tmp_path / "key")
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_and_a_device_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with refused(DataError, name):
            storage.read(tmp_path / name)
        with refused(DataError, name):
            storage.read_lines(tmp_path / name, "label")
    with pytest.raises(IsADirectoryError):
        storage.read(tmp_path)


def test_lines_are_read_without_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "labels").write_bytes(b"\xef\xbb\xbfLight\r\n\r\nLock\r\n")
    assert storage.read_lines(tmp_path / "labels", "label") == ("Light", "Lock")


def test_a_file_above_the_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert storage.read(tmp_path / "file", 5) == b"12345"
    with refused(DataError, "file", value=5):
        storage.read(tmp_path / "file", 4)


def test_a_new_authority_outlives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(tmp_path, monkeypatch)
    AuthorityStore.create(tmp_path / "authority", "fleet", 365, 30, b"a long passphrase")
    assert ["authority"] in seen


# --- locks


def test_a_lock_has_one_holder_among_threads(tmp_path: Path) -> None:
    inside: list[int] = []

    def work(number: int) -> None:
        for _ in range(5):
            with storage.locked(tmp_path / "lock"):
                inside.append(number)
                assert inside == [number]
                inside.remove(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside == []


def test_a_lock_that_is_held_can_be_refused_instead_of_awaited_and_a_kill_releases_it(tmp_path: Path) -> None:
    hold = "import sys, time; from pathlib import Path; from edgeadapt.formats.storage import locked\n"
    hold += "with locked(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path / "lock"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        with pytest.raises(TimeoutError), storage.locked(tmp_path / "lock", timeout=0):
            pass
        process.kill()
    with storage.locked(tmp_path / "lock", timeout=0):
        pass


@pytest.mark.parametrize("kind", ["link", "dangling", "hard link", "pipe", "folder"])
def test_what_is_no_file_of_its_own_is_no_lock_and_is_not_touched(tmp_path: Path, kind: str) -> None:
    lock, victim = tmp_path / "lock", tmp_path / "victim"
    victim.write_bytes(b"content")
    {
        "link": lambda: lock.symlink_to(victim),
        "dangling": lambda: lock.symlink_to(tmp_path / "created"),
        "hard link": lambda: lock.hardlink_to(victim),
        "pipe": lambda: os.mkfifo(lock),
        "folder": lock.mkdir,
    }[kind]()
    for timeout in (-1, 0):
        with refused(ConfigError, "lock"), storage.locked(lock, timeout=timeout):
            pass
    assert victim.read_bytes() == b"content"
    assert not (tmp_path / "created").exists()
    if kind in ("link", "dangling"):  # one that takes the file's place after the look at it is not followed either
        with pytest.raises(OSError, match="symbolic"), storage.FileLock(lock):
            pass


def test_no_module_imports_fcntl_so_that_windows_can_import_them() -> None:
    modules = "edgeadapt.formats.storage, client.inference.session, client.node.statedir, edgeadapt.authority.store"
    script = f"import sys, filelock; sys.modules['fcntl'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", script], check=True)


# --- folders


def test_a_staged_folder_appears_whole_and_with_its_mode(tmp_path: Path) -> None:
    out = tmp_path / "above" / "out"
    with storage.staged(out, mode=0o700) as stage:
        (stage / "file").write_bytes(b"new")
        assert not out.exists()
    assert content(tmp_path) == {"above/out/file": b"new"}
    assert out.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("replaces", [False, True])
def test_an_error_in_the_block_leaves_the_old_folder_and_no_stage(tmp_path: Path, replaces: bool) -> None:
    storage.write_files(tmp_path / "out", {"file": b"old"})

    def write() -> None:
        with storage.staged(tmp_path / "out", replaces=replaces) as stage:
            (stage / "file").write_bytes(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert content(tmp_path) == {"out/file": b"old"}


def test_a_folder_that_holds_files_is_replaced_only_if_that_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "out"
    storage.write_files(out, {"old": b"old"})
    with pytest.raises(OSError, match="not empty"), storage.staged(out) as stage:
        storage.write_files(stage, {"new": b"new"})
    assert content(tmp_path) == {"out/old": b"old"}
    with storage.staged(out, replaces=True) as stage:
        storage.write_files(stage, {"new": b"new"})
    assert content(tmp_path) == {"out/new": b"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_half_replaced_is_repaired(tmp_path: Path) -> None:
    out, previous = tmp_path / "out", tmp_path / ".out.previous"
    storage.write_files(previous, {"file": b"old"})  # killed between the two renames
    with storage.locked_folder(out) as whole:
        assert content(whole) == {"file": b"old"}
    storage.write_files(previous, {"file": b"older"})  # killed after the second
    with storage.locked_folder(out) as whole:
        assert content(whole) == {"file": b"old"}
    assert not previous.exists()


def test_a_new_folder_is_refused_where_files_are_and_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in ("", "file"):
        with refused(ConfigError, (tmp_path / name).name), storage.new_folder(tmp_path / name):
            pass
    with storage.new_folder(tmp_path / "empty") as stage:
        (stage / "inner").write_bytes(b"x")
    assert content(tmp_path / "empty") == {"inner": b"x"}
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with refused(ConfigError, "here"), storage.new_folder(tmp_path / "here"):
        pass
    assert (tmp_path / "here").is_dir()


def test_a_linked_copy_shares_no_file_with_its_source_once_it_is_written(tmp_path: Path) -> None:
    storage.write_files(tmp_path / "a", {"sub/file": b"old", "other": b"same"})
    storage.link_files(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "other").samefile(tmp_path / "b" / "other")
    storage.write_files(tmp_path / "b", {"sub/file": b"new"})
    assert content(tmp_path / "a") == {"sub/file": b"old", "other": b"same"}
    assert content(tmp_path / "b") == {"sub/file": b"new", "other": b"same"}


def test_a_copy_without_hard_links_that_fills_the_disk_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_files(tmp_path / "a", {"sub/one": b"1", "sub/two": b"2", "three": b"3"})
    (tmp_path / "a" / "sub").chmod(0o700)
    monkeypatch.setattr(os, "link", lambda *_: full(0))
    storage.link_files(tmp_path / "a", tmp_path / "b")
    assert content(tmp_path / "b") == content(tmp_path / "a")
    assert (tmp_path / "b" / "sub").stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr("edgeadapt.formats.storage.shutil.copyfile", lambda *_: full(0))
    with pytest.raises(OSError, match="No space") as caught:
        storage.link_files(tmp_path / "a", tmp_path / "c")
    assert caught.value.strerror == "No space left on device"
    storage.link_files(tmp_path / "none", tmp_path / "d")
    assert not (tmp_path / "d").exists()
