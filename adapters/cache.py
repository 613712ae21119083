"""Folders that are made once and kept: each under the digest of what it was made from, whole or not there."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from aggregation.errors import ConfigError

VARIABLE = "EDGEADAPT_CACHE"


def cache_folder() -> Path:
    """``$EDGEADAPT_CACHE``, or the place for a user's caches on this system."""
    if named := os.environ.get(VARIABLE):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "edgeadapt" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "edgeadapt"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeadapt"


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of the cache; if it is not there, ``make`` fills it first.

    It appears under its name only when it is whole, also if two processes make it at the same moment.

    Raises:
        ConfigError: The cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=target.parent))
    except OSError as error:
        raise ConfigError(f"cannot write to {target.parent} ({error.strerror}); set {VARIABLE} to a folder") from error
    try:
        make(stage)
        stage.chmod(0o755)
        _take_place(stage, target)
    except OSError as error:
        raise ConfigError(f"cannot fill {target} ({error.strerror}); free some space or set {VARIABLE}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return target


def _take_place(stage: Path, target: Path) -> None:
    try:
        stage.rename(target)
    except OSError:
        if not target.is_dir():  # another process was faster, and its folder is as good
            raise
