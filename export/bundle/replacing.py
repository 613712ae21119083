"""A folder that is only ever replaced whole: filled beside the old one, and then the two change places.

So a full disk or a kill leaves the old folder, at worst as ``.NAME.previous``, from where ``settled`` brings it back.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from adapters.storage import locked


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A folder to fill beside ``out``; takes its place if the block ends without an error.

    Raises:
        OSError: The folder cannot be written. What was in ``out`` is still there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        stage.chmod(0o755)
        yield stage
        _swap(out, stage)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def settled(out: Path) -> Iterator[Path]:
    """The full path of ``out``, for one process at a time, after ending what a killed call may have left half done.

    Others wait: two that fill their folders from the same old one would lose what the first has put in.

    Raises:
        OSError: The folder above cannot be read.
    """
    out = out.resolve()
    with locked(next(folder for folder in out.parents if folder.exists())):
        if (previous := _previous(out)).exists():
            if out.exists():  # killed after the exchange: the new folder is whole
                shutil.rmtree(previous)
            else:  # killed between its two steps
                previous.rename(out)
        yield out


def _previous(out: Path) -> Path:
    return out.parent / f".{out.name}.previous"


def _swap(out: Path, stage: Path) -> None:
    previous = _previous(out)
    existed = out.exists()
    if existed:
        out.rename(previous)
    try:
        stage.rename(out)
    except OSError:
        if existed:
            previous.rename(out)
        raise
    if existed:
        shutil.rmtree(previous, ignore_errors=True)


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put files under ``folder``, by their paths in it. Raises OSError, which names the file."""
    for name, blob in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be a second name of the old folder's file
        try:
            path.write_bytes(blob)
        except OSError as error:
            error.filename = error.filename or str(path)  # of a full disk Python does not say where
            raise


def link(source: Path, target: Path) -> None:
    """Give every file of ``source`` a second name below ``target``; copy where the file system has no links."""

    def link_or_copy(old: str, new: str) -> None:
        try:
            os.link(old, new)
        except OSError:
            shutil.copyfile(old, new)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)
