"""Files and folders on disk: locked, read within a limit, and replaced whole or not at all.

A kill at any instant leaves the old content or the new one. A folder that replaces another one may be left as
``.NAME.previous`` by a kill between the two renames; ``locked_folder`` and ``restore`` bring it back. A power cut is
survived as well, except by what a simulation writes (``kill_safe``).

Folders of the cache are computed once and kept, each named by a digest of its source; complete or absent. Folders to
work in are deleted when they are no longer needed, whatever ends the process. A killed process cannot delete its
folder. Each folder therefore holds a lock, which the operating system releases with its holder, and who makes the next
folder in the same place deletes those whose lock is free."""

import errno
import hashlib
import os
import re
import shutil
import stat
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from pathlib import Path
from tempfile import gettempdir, mkdtemp, mkstemp
from typing import IO, BinaryIO

from filelock import FileLock, Timeout
from platformdirs import user_cache_path

from aggregation.errors import ConfigError, DataError, EdgeAdaptError

CACHE = "EDGEADAPT_CACHE"
PUBLIC, PRIVATE = 0o644, 0o600
PUBLIC_FOLDER, PRIVATE_FOLDER = 0o755, 0o700
LARGEST = 2**32  # bytes of a file that is read whole
LONGEST_LIST = 2**24  # bytes of a file of texts or labels
POLL = 0.02  # seconds between two attempts to take a lock
File = str | os.PathLike[str]  # how a caller of the public interface names a file or folder
_POWER_CUTS: ContextVar[bool] = ContextVar("power_cuts", default=True)  # whether to survive them
HIDDEN = ".edgeadapt-"  # begins the name of a folder to work in
LOCK, CONTENT = "lock", "content"
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO}  # a write fails so, whatever file it is to
_OF_RUST = re.compile(r"\(os error (\d+)\)")  # in errors of safetensors and tokenizers


def cache_folder() -> Path:
    """Return ``$EDGEADAPT_CACHE``, or the folder for a user's caches on this system."""
    named = os.environ.get(CACHE)
    return Path(named) if named else user_cache_path("edgeadapt", appauthor=False)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache; if it does not exist, ``make`` fills it first. It appears under its name
    only when it is complete, also if two processes make it at the same time. Raises ConfigError if the cache cannot be
    written."""
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        with staged(target) as stage:
            make(stage)
    except OSError as error:
        if not target.is_dir():  # else another process was faster, and its folder is as good
            reason = f"cannot write {target} ({error.strerror}): free some space, or set {CACHE} to another folder"
            raise ConfigError(reason, about=CACHE) from error
    return target


@contextmanager
def kill_safe() -> Iterator[None]:
    """Do not wait for the disk while the block runs, in this thread: for a simulation, which writes much. Writes
    survive a kill of the process as ever; a power cut may lose the last seconds."""
    token = _POWER_CUTS.set(False)
    try:
        yield
    finally:
        _POWER_CUTS.reset(token)


def read(path: Path, limit: int = LARGEST) -> bytes:
    """Read a file. Raises DataError, before it reads, above ``limit`` bytes and for a device or pipe without an end."""
    with opened(path, limit) as (file, size):
        return file.read(size)  # and not what is appended meanwhile


def file_sha256(path: Path) -> str:
    """Hash a file's content (SHA-256, hex), read in pieces. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(path: Path, limit: int = LARGEST) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file to read from, with its size in bytes. Raises as ``read``."""
    mode = path.stat().st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a folder raises its own error
        raise DataError(f"{path} is a device or a pipe: give a file", about=path.name)
    with path.open("rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > limit:
            reason = f"{path} has {size} bytes, more than the limit of {limit}: replace it by the right file"
            raise DataError(reason, about=path.name)
        yield file, size


def read_lines(path: Path, what: str) -> tuple[str, ...]:
    """Read the lines of a UTF-8 file that are not blank, without the byte order mark of Windows' editors. ``what`` says
    what a line is, for a message. Raises ConfigError: there is no such file; DataError: it is not UTF-8, too large, has
    no line, or is a device or a pipe."""
    try:
        text = read(path, LONGEST_LIST).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"there is no file {path}", about=path.name) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", about=path.name) from error
    rows = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not rows:
        raise DataError(f"{path} is empty: it must hold one {what} a line", about=path.name)
    return rows


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError that says that a disk is full or not to be written: Python names none where a write
    fails. Libraries in Rust raise errors of their own, which become such an OSError."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK and error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        code = _OF_RUST.search(str(error))
        if isinstance(error, EdgeAdaptError) or code is None or int(code[1]) not in _DISK:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error


@contextmanager
def _naming_final(stage: Path, out: Path) -> Iterator[None]:
    """Name files as ``naming`` does, and those of a folder that is deleted by the names that they would have had."""
    try:
        with naming(out):
            yield
    except OSError as error:
        name = Path(os.fsdecode(error.filename2 or error.filename or "."))
        if error.errno not in _DISK or not name.is_relative_to(stage):
            raise
        raise OSError(error.errno, error.strerror, str(out / name.relative_to(stage))) from error


def replace(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write a file atomically and durably: after the return it survives a power cut. After an OSError the old file is
    unchanged, and no temporary file is left."""
    descriptor, name = mkstemp(dir=path.parent, prefix=f".{path.name}.")
    stage = Path(name)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(content)
            stage.chmod(mode)
            flush(file)
        stage.replace(path)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise
    sync(path.parent)


def create(path: Path, content: bytes, mode: int = PRIVATE) -> None:
    """Write a new file durably; never replace one, but raise FileExistsError. Any other OSError names the file, of
    which no part is left."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with naming(path), os.fdopen(descriptor, "wb") as file:
            file.write(content)
            flush(file)
    except BaseException:
        path.unlink()  # a partial file could never be written again
        raise


def flush(file: IO[bytes]) -> None:
    """Make what was written to ``file`` survive a power cut (see ``kill_safe``)."""
    file.flush()
    if _POWER_CUTS.get():
        os.fsync(file.fileno())


def sync(folder: Path) -> None:
    if os.name == "nt" or not _POWER_CUTS.get():  # Windows opens no folders, and writes names through
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(lock: Path, *, timeout: float = -1) -> Iterator[None]:
    """Hold the lock file ``lock``, which is created and kept; one holder at a time among all processes and threads.

    The operating system releases the lock when its holder is killed. ``timeout`` is in seconds; -1 waits forever.
    Raises ConfigError: a link, a folder, a device or a pipe is there. The target of a link is not touched;
    TimeoutError: another holder has it; OSError: the file cannot be created."""
    _require_own_file(lock)
    with FileLock(lock, timeout=timeout, poll_interval=POLL):  # follows no symbolic link that appears only now, either
        yield


@contextmanager
def locked_or(refusal: EdgeAdaptError, lock: Path, *, timeout: float = 0) -> Iterator[None]:
    """Hold a lock file as ``locked`` does, or raise ``refusal`` if another holder has it after ``timeout``."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock, timeout=timeout))
        except TimeoutError:
            raise refusal from None
        yield


def is_locked(lock: Path) -> bool:
    """Whether somebody holds a lock file, which is neither created nor written. The check shares it for a moment.
    Raises as ``locked``."""
    _require_own_file(lock)
    try:
        import fcntl
    except ImportError:  # Windows
        return _is_taken(lock)
    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _is_taken(lock: Path) -> bool:
    try:
        with locked(lock, timeout=0) if lock.exists() else nullcontext():
            return False
    except TimeoutError:
        return True


def _require_own_file(lock: Path) -> None:
    """Check that ``lock`` is missing, or a file with this one name: older versions of filelock empty what they lock."""
    try:
        status = lock.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
        raise ConfigError(f"{lock} is a link, a folder or a device instead of a lock: remove it", about=lock.name)


def real(path: Path) -> Path:
    """Resolve symbolic links to the full path, whether or not something is there. Raises DataError for a circle."""
    try:
        return path.resolve()
    except RuntimeError as error:  # until Python 3.12
        raise DataError(f"{path} is a symbolic link that leads to itself: remove it", about=path.name) from error


@contextmanager
def locked_folder(out: Path) -> Iterator[Path]:
    """Hold the lock of the folder ``out``, and yield its full path. The lock file is ``.NAME.lock`` next to ``out``. If
    a killed process left ``staged`` half done, that is repaired. Raises ConfigError if no lock file can be created
    there."""
    out = real(out)
    above = next(folder for folder in out.parents if folder.exists())
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(above / f".{out.name}.lock"))
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(f"cannot write to {above} ({reason}): name another place", about=out.name) from error
        _repair(out)
        yield out


def restore(out: Path) -> None:
    """Bring back the folder ``out`` if a kill left it as ``.NAME.previous``. Raises as ``locked_folder``."""
    if not out.exists() and _previous(real(out)).exists():
        with locked_folder(out):
            pass


@contextmanager
def staged(out: Path, *, mode: int = PUBLIC_FOLDER, replaces: bool = False) -> Iterator[Path]:
    """Yield an empty folder to fill, which becomes ``out`` if the block ends without an error. Unless ``replaces``,
    ``out`` is missing or empty at the end of the block; with it, hold ``locked_folder(out)``. It is unchanged after an
    OSError, which names files of the yielded folder by their paths in ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with closing(WorkFolder(out.parent)) as work:
        stage = work.path
        stage.chmod(mode)
        with _naming_final(stage, out):
            yield stage
        if replaces and out.exists():
            _exchange(stage, out)
        else:
            stage.replace(out)
    sync(out.parent)


@contextmanager
def new_folder(out: Path, *, mode: int = PUBLIC_FOLDER) -> Iterator[Path]:
    """Yield an empty folder, as ``staged`` does, for one that must not hold anything yet. Raises ConfigError if ``out``
    exists and is not an empty folder, or is the working directory."""
    place = real(out)  # where a link leads
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ConfigError(f"{out} exists and is not an empty folder: name a new one", about=place.name)
    if place == Path.cwd():  # it is replaced by another folder, and a shell would stay in the deleted one
        raise ConfigError(f"{place} is the working directory: name a new folder", about=place.name)
    with staged(place, mode=mode) as stage:
        yield stage


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files under ``folder``, by their paths in it. Raises OSError, which names the file."""
    for name, blob in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a hard link to a file of the old folder
        with naming(path):
            path.write_bytes(blob)


def link_files(source: Path, target: Path) -> None:
    """Hard-link every file of ``source`` under ``target``; copy where the file system has no hard links. Raises the
    first OSError, as on a full disk."""
    if source.is_dir():
        # Not shutil.copytree, whose error lists every file that could not be copied.
        for folder, _, names in os.walk(source, topdown=False, onerror=_raise, followlinks=True):
            into = target / Path(folder).relative_to(source)
            into.mkdir(parents=True, exist_ok=True)
            for name in names:
                link_or_copy(Path(folder) / name, into / name)
            shutil.copymode(folder, into)


def link_or_copy(old: str | Path, new: str | Path) -> None:
    """Make ``new`` a hard link to the file ``old``, or a copy where the file system has no hard links."""
    try:
        os.link(old, new)
    except OSError:
        shutil.copyfile(old, new)


def _raise(error: OSError) -> None:
    raise error


def _previous(out: Path) -> Path:
    return out.parent / f".{out.name}.previous"


def _repair(out: Path) -> None:
    if (previous := _previous(out)).exists():
        if out.exists():  # killed after the second rename: the new folder is complete
            shutil.rmtree(previous)
        else:  # killed between the two renames
            previous.rename(out)


def _exchange(stage: Path, out: Path) -> None:
    previous = _previous(out)
    out.rename(previous)
    try:
        stage.rename(out)
    except OSError:
        previous.rename(out)
        raise
    shutil.rmtree(previous, ignore_errors=True)


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
