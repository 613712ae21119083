"""Files of a home, replaced whole or not at all: the device's, the coordinator's, the authority's."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile

PUBLIC, PRIVATE = 0o644, 0o600


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


def sync(folder: Path) -> None:
    """The names in a folder outlive a power cut from here on."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
