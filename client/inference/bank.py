"""Brings the adapters of a channel's release that a device does not hold when they are asked for. ``client.updates``
fetches and verifies an adapter, and deletes others by the times of their files, which ``note`` sets."""

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from threading import Lock, Thread
from time import time_ns
from typing import cast

from cachetools import TTLCache

from aggregation.entropy import SystemEntropy
from aggregation.errors import EdgeAdaptError
from edgeadapt.formats.bundle import adapter_path, manifest_path
from edgeadapt.formats.release import RELEASE, Release
from edgeadapt.formats.storage import restore

log = logging.getLogger("edgeadapt.device")
RETRY = 60.0  # seconds until an adapter that could not be fetched is tried again
Update = Callable[..., object]  # ``client.updates.update``, which imports this package


class AdapterBank:
    """Brings adapters into ``bundle``, one at a time. Threads may share it."""

    def __init__(self, bundle: Path, trust: Path, update: Update | None) -> None:
        """``trust``: the pinned keys. ``update``: None if nothing is to be fetched."""
        self._bundle, self._trust, self._update, self._noted = bundle, trust, update, ""
        self._fetching, self._failed = Lock(), cast("TTLCache[str, Exception]", TTLCache(64, RETRY))

    def versions(self) -> Mapping[str, int]:
        """List the adapters of the release: name → version; none unless the device keeps a part of one."""
        with suppress(OSError):
            status = (self._bundle / RELEASE).stat()
            return _versions(self._bundle, status.st_ino, status.st_mtime_ns) if self._update else {}
        return {}

    def has(self, name: str) -> bool:
        """Whether an adapter is in the bundle. Raises ConfigError: no adapter can have this name."""
        restore(self._bundle)  # or wait while it is replaced
        return (self._bundle / manifest_path(name)).exists()

    def note(self, names: Iterable[str]) -> None:
        for name in names:
            if name != self._noted and self.versions():
                self._noted = name
                with suppress(OSError):  # it is in memory only, or the bundle cannot be written
                    os.utime(self._bundle / adapter_path(name), ns=(time_ns(), time_ns()))

    def bring(self, name: str) -> None:
        """Fetch an adapter of ``versions`` that the bundle lacks. Raises as ``Update``; again for ``RETRY`` seconds."""
        if not self.has(name) and name in self.versions():
            with self._fetching:
                self._fetch(name)

    def bring_later(self, name: str) -> None:
        """Do as ``bring`` in the background, unless an adapter is on its way or could not be fetched a short time ago.
        A process that ends does not wait for it, and the bundle stays whole."""
        if name in self.versions() and self._fetching.acquire(blocking=False):
            Thread(target=self._quietly, args=(name,), daemon=True).start()

    def wait(self) -> None:
        """Wait for what ``bring_later`` began."""
        with self._fetching:
            pass

    def _quietly(self, name: str) -> None:
        try:
            if not self._failed:
                self._fetch(name)
        except (EdgeAdaptError, OSError) as error:
            log.warning("adapter %s is not here yet: %s", name, error)
        finally:
            self._fetching.release()

    def _fetch(self, name: str) -> None:
        if failure := self._failed.get(name):
            raise failure.with_traceback(None)
        try:
            if self._update and not self.has(name):  # another thread may have been faster
                self._update(self._bundle, self._trust, wanted=name, entropy=SystemEntropy())
        except (EdgeAdaptError, OSError) as error:
            self._failed[name] = error
            raise


@lru_cache(maxsize=4)
def _versions(bundle: Path, *_: int) -> Mapping[str, int]:
    release = Release.held(bundle)
    return release.adapters if release else {}
