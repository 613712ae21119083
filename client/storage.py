"""Private files on the device, replaced whole or not at all."""

import os
from pathlib import Path
from tempfile import NamedTemporaryFile


def replace(path: Path, content: bytes) -> None:
    """Write a file atomically, readable by its owner only; after a return it outlives a loss of power.

    Raises:
        OSError: The disk is full, say. The old file is as it was, and nothing lies beside it.
    """
    with NamedTemporaryFile(dir=path.parent, delete=False) as file:  # mode 0600
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name itself
    finally:
        os.close(folder)
