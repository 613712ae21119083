"""A disk of a few megabytes for one folder, which can really be full: a tmpfs, where this process may mount one."""

import errno
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SIZE = 64  # MiB
FILLER = "filler"
_CHUNK = 2**16  # bytes


def refused() -> str:
    """Why no disk can be mounted; empty if one can."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            _mount(Path(folder))
        except (OSError, subprocess.CalledProcessError):
            return "mount is refused (run it as root, or with 'unshare -rm' before the command)"
        _unmount(Path(folder))
    return ""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Move a folder to a disk of its own while the block runs. No process uses it before and after that."""
    aside = folder.with_name(f"{folder.name}.aside")
    folder.rename(aside)
    folder.mkdir(mode=0o700)
    try:
        _mount(folder)
    except (OSError, subprocess.CalledProcessError):
        folder.rmdir()
        aside.rename(folder)
        raise
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        shutil.rmtree(aside)
        yield
    finally:
        if not aside.exists():
            shutil.copytree(folder, aside)
        _unmount(folder)
        folder.rmdir()
        aside.rename(folder)


def fill(folder: Path) -> None:
    """Write until the disk of a folder is full. Raises OSError: it failed in another way."""
    size = _CHUNK
    with (folder / FILLER).open("wb", buffering=0) as file:
        while size:
            try:
                file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                size //= 2  # up to the last byte


def empty(folder: Path) -> None:
    (folder / FILLER).unlink()


def _mount(folder: Path) -> None:
    options = f"size={SIZE}m,mode=0700"
    _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder))


def _unmount(folder: Path) -> None:
    _run("umount", str(folder))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603
