"""Files of a home, replaced whole or not at all and read within a limit: of a device, a coordinator, an authority."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from aggregation.errors import DataError

PUBLIC, PRIVATE = 0o644, 0o600
LARGEST = 2**32  # bytes of a file that is read whole


def replace(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write a file atomically, by default for its owner alone; after a return it outlives a power cut.

    Raises:
        OSError: The disk is full, say. The old file is as it was, and nothing lies beside it.
    """
    with NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    sync(path.parent)


def read(path: Path, limit: int = LARGEST) -> bytes:
    """A whole file.

    Raises:
        DataError: It is above the limit, in bytes, or a device or a pipe, which need not end. Nothing was read then.
        OSError: It cannot be read.
    """
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a folder says so itself, as it is opened
        raise DataError(f"{path} is a device or a pipe: give a file")
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            raise DataError(
                f"{path} has {size} bytes, above the limit of {limit}: it is not the file that belongs here"
            )
        return file.read()


def sync(folder: Path) -> None:
    """The names in a folder outlive a power cut from here on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One at a time, of all processes and threads that lock this folder: to read, change and replace a file in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # released by closing, also by a kill
        yield
    finally:
        os.close(descriptor)
