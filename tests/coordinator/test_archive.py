"""An archive that was made to do harm: signed by a key of its own, and refused all the same."""

import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from aggregation.entropy import SystemEntropy
from aggregation.errors import DataError, EdgeAdaptError, TrustError
from aggregation.pki.identity import IdentityKey
from coordinator import backup
from coordinator.backup import ArchiveFile, BackupManifest
from edgeadapt.formats.registryfiles import PUBLIC_KEY

KEY = IdentityKey.generate(SystemEntropy())
MODES = {r"[a-z]+\.txt": 0o644}


def quiet(done: int, total: int) -> None:
    pass


def manifest(sums: str) -> BackupManifest:
    return BackupManifest(sums, "0" * 64, None, 0)


def file(name: str, content: bytes = b"text", mode: int = 0o644) -> ArchiveFile:
    return ArchiveFile(name, len(content), lambda: content, mode)


def extracted(made: Path, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    backup.extract(made, folder, KEY.public, MODES, quiet)
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != PUBLIC_KEY}


def test_what_was_put_in_comes_out(tmp_path: Path) -> None:
    contents = {"a.txt": b"", "b.txt": b"x" * 512, "c.txt": bytes(513)}
    backup.write_archive(tmp_path / "a.tar", [file(*each) for each in contents.items()], manifest, KEY, quiet)
    assert extracted(tmp_path / "a.tar", tmp_path / "out") == contents


@pytest.mark.parametrize("name", ["../b.txt", "/b.txt", "b.txt/c.txt", "b.TXT", "..", "b.txt.exe"])
def test_a_name_that_no_coordinator_has_is_refused(tmp_path: Path, name: str) -> None:
    backup.write_archive(tmp_path / "a.tar", [file("a.txt"), file(name)], manifest, KEY, quiet)
    with pytest.raises(DataError) as caught:
        extracted(tmp_path / "a.tar", tmp_path / "out")
    assert caught.value.about == name
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "out"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE])
def test_a_link_or_a_device_is_refused(tmp_path: Path, kind: bytes) -> None:
    backup.write_archive(tmp_path / "a.tar", [file("a.txt", b"")], manifest, KEY, quiet)
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as listed:
        (info,) = [each for each in listed if each.name == "a.txt"]
    info.type, info.linkname = kind, "/etc/passwd"
    raw[info.offset : info.offset + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(TrustError):
        extracted(tmp_path / "a.tar", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [PUBLIC_KEY]


@pytest.mark.parametrize("size", [2**62, -1, 2**28 + 1])
def test_a_size_above_the_limit_is_refused_before_it_is_read(tmp_path: Path, size: int) -> None:
    backup.write_archive(tmp_path / "a.tar", [file("a.txt")], manifest, KEY, quiet)
    raw = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(tmp_path / "a.tar") as listed:
        (info,) = [each for each in listed if each.name == backup.SUMS]
    info.size = size
    raw[info.offset : info.offset + 512] = info.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(raw)
    with pytest.raises(TrustError):
        extracted(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("content", [b"", b"not an archive at all", bytes(10240)], ids=["empty", "text", "zeros"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError):
        extracted(tmp_path / "a.tar", tmp_path / "out")


def test_a_file_that_changes_meanwhile_ends_the_copy(tmp_path: Path) -> None:
    contents = iter([b"one", b"two"])
    changing = replace(file("a.txt", b"one"), read=lambda: next(contents))
    with pytest.raises(EdgeAdaptError) as caught:
        backup.write_archive(tmp_path / "a.tar", [changing], manifest, KEY, quiet)
    assert caught.value.about == "a.txt"
