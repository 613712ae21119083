"""A file is the old one or the new one, whatever happens in between."""

import os
from pathlib import Path

import pytest

from adapters import storage
from aggregation.errors import DataError
from coordinator.authority.store import AuthorityStore


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


def test_the_name_is_on_the_disk_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(tmp_path, monkeypatch)
    storage.replace(tmp_path / "list", b"new")
    assert seen == [["list"]]


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    storage.replace(tmp_path / "list", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        storage.replace(tmp_path / "list", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"list": b"old"}


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_the_file_has_its_mode_whatever_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        storage.replace(tmp_path / "file", b"", mode)
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode


def test_what_need_not_end_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "link"):
        with pytest.raises(DataError, match=f"{name} is a device or a pipe: give a file"):
            storage.read(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        storage.read(tmp_path)


def test_a_new_authority_outlives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(tmp_path, monkeypatch)
    AuthorityStore.found(tmp_path / "authority", "fleet", 365, 30, b"a long passphrase")
    assert ["authority"] in seen
