"""Folders to work in, which nobody finds half done: deleted when they are no longer needed, whatever ends the process.

A killed process cannot delete its folder. Each folder therefore holds a lock, which the operating system releases with
its holder, and who makes the next folder in the same place deletes those whose lock is free.
"""

import os
import shutil
import stat
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir, mkdtemp

from filelock import FileLock, Timeout

HIDDEN = ".edgeadapt-"  # begins the name of a folder to work in
LOCK, CONTENT = "lock", "content"


class WorkFolder:
    """Is a new empty folder, deleted by ``close``, with the last reference to this object, or when the process ends.
    ``where`` holds it; None for the system's folder of temporary files."""

    def __init__(self, where: Path | None = None) -> None:
        where = where or Path(gettempdir())
        remove_abandoned(where)
        folder, lock = _claimed(where)
        self.path = folder / CONTENT
        self.path.mkdir()
        self._delete = weakref.finalize(self, _delete, folder, lock)

    def close(self) -> None:
        self._delete()


def remove_abandoned(where: Path) -> None:
    """Delete the folders to work in that killed processes left in ``where``. A folder without a lock is not deleted: it
    is not known to be one of these, or its maker is about to lock it."""
    with suppress(OSError):  # what cannot be read or deleted stays
        for folder in where.glob(f"{HIDDEN}*"):
            if _is_own(folder, stat.S_ISDIR) and _is_own(folder / LOCK, stat.S_ISREG):
                lock = FileLock(folder / LOCK, blocking=False)
                with suppress(Timeout, OSError), lock:
                    shutil.rmtree(folder, ignore_errors=True)


def _claimed(where: Path) -> tuple[Path, FileLock]:
    while True:
        folder = Path(mkdtemp(prefix=HIDDEN, dir=where))
        # Any thread may drop the last reference.
        lock = FileLock(folder / LOCK, thread_local=False)
        lock.acquire()
        if (folder / LOCK).exists():
            return folder, lock
        lock.release()  # another process had found the lock free, and deleted it


def _is_own(path: Path, is_kind: Callable[[int], bool]) -> bool:
    """Check that ``path`` is of a kind and belongs to this user. A link is not followed."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return is_kind(status.st_mode) and (os.name == "nt" or status.st_uid == os.getuid())


def _delete(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    lock.release()
