"""Files of a bundle: read or hashed within a limit, and found unchanged between the hash and the use.

A file that is mapped into memory cannot be used from the bytes that were hashed. What can be told is whether the name
still leads to the same file, of the same size and times, after it was loaded: its stamp. The time of the last change
(ctime) is set by the system at every write, and cannot be set back without setting the machine's clock.
"""

import hashlib
import os
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from stat import S_ISREG
from typing import Self

from aggregation.errors import DataError, TrustError


@dataclass(frozen=True, slots=True)
class Stamp:
    """Which file a name led to, and when that was last written."""

    device: int
    inode: int
    size: int
    modified: int  # nanoseconds
    changed: int  # nanoseconds

    @classmethod
    def of(cls, path: int | Path) -> Self:
        """The stamp of an open file, or of the one that ``path`` leads to."""
        found = os.stat(path)  # noqa: PTH116  # also takes the number of an open file
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@dataclass(frozen=True, slots=True)
class Hashed:
    """A file's digest (SHA-256, hex), and its stamp from before it was read."""

    path: Path
    digest: str
    stamp: Stamp

    def check(self) -> None:
        """Return if the name still leads to the very file that was hashed.

        Raises:
            TrustError: It was written, replaced or removed since.
        """
        try:
            same = Stamp.of(self.path) == self.stamp
        except FileNotFoundError:
            same = False
        if not same:
            raise TrustError(f"{self.path} changed while it was being loaded; try again, or fetch the bundle again")


def read(path: Path, limit: int) -> bytes:
    """The file, if it is not above ``limit`` bytes. More is refused before it is in memory.

    Raises:
        DataError: There is no such file, it is a pipe, folder or device, or it cannot be read.
        TrustError: It is above the limit.
    """
    with _open(path) as file:
        # No more room is asked for than the file takes: a small machine would refuse that of the limit.
        return file.read(_checked(path, Stamp.of(file.fileno()), limit).size)


def hashed(path: Path, limit: int) -> Hashed:
    """Hash a file without holding it in memory. Raises as ``read``."""
    with _open(path) as file:
        stamp = _checked(path, Stamp.of(file.fileno()), limit)
        return Hashed(path, hashlib.file_digest(file, "sha256").hexdigest(), stamp)


def _open(path: Path) -> BufferedReader:
    try:
        if not S_ISREG(path.stat().st_mode):  # a pipe would be waited for, and a device may have no end
            raise DataError(f"{path} is no regular file; fetch the bundle again")
        return path.open("rb")
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing; fetch the bundle again") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); fetch the bundle again") from error


def _checked(path: Path, stamp: Stamp, limit: int) -> Stamp:
    if stamp.size > limit:
        raise TrustError(f"{path} is above its limit of {limit} bytes; fetch the bundle again")
    return stamp
