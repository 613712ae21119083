"""Folders that are computed once and kept, each named by a digest of its source; complete or absent."""

import os
from collections.abc import Callable
from pathlib import Path

from platformdirs import user_cache_path

from aggregation.errors import ConfigError
from edgeadapt.formats.storage import staged

VARIABLE = "EDGEADAPT_CACHE"


def cache_folder() -> Path:
    """Return ``$EDGEADAPT_CACHE``, or the folder for a user's caches on this system."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else user_cache_path("edgeadapt", appauthor=False)


def cached(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder ``name`` of the cache; if it does not exist, ``make`` fills it first.

    It appears under its name only when it is complete, also if two processes make it at the same time. Raises
    ConfigError if the cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        with staged(target) as stage:
            make(stage)
    except OSError as error:
        if not target.is_dir():  # else another process was faster, and its folder is as good
            reason = f"cannot write {target} ({error.strerror}): free some space, or set {VARIABLE} to another folder"
            raise ConfigError(reason, about=VARIABLE) from error
    return target
