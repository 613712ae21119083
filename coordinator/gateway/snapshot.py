"""What a gateway says about itself, in a file that the dashboard reads: numbers, and no device's name."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgeadapt.formats import jsontext, storage

FILE = "gateway.json"  # in the coordinator's state directory, while a gateway serves it
EVERY = 1.0  # seconds
MAX_SNAPSHOT = 2**16  # bytes


@dataclass(frozen=True, slots=True)
class GatewaySnapshot:
    """A gateway at one moment.

    Attributes:
        versions: Version of edgeadapt, as devices state it → how many of the connected have it.
        check_ins: Outcome → check-ins since the start: ``admitted``, ``early`` (before their window), ``paced`` (too
            many at once), ``full``.
    """

    address: str  # ``HOST:PORT``
    devices: int = 0  # devices that are connected, or may come back
    requests: int = 0  # requests without an answer yet
    versions: Mapping[str, int] = field(default_factory=dict)
    check_ins: Mapping[str, int] = field(default_factory=dict)


@contextmanager
def written(folder: Path, snapshot: Callable[[], GatewaySnapshot]) -> Iterator[None]:
    """Keep the file of a state directory up to date while the block runs."""
    path, over = folder / FILE, threading.Event()

    def write() -> None:
        last = None
        while True:
            if (now := snapshot()) != last:
                with suppress(OSError):  # a full disk ends no round
                    storage.replace(path, json.dumps(asdict(now)).encode(), storage.PUBLIC)
                    last = now
            if over.wait(EVERY):
                return

    writer = threading.Thread(target=write, name="gateway snapshot", daemon=True)
    writer.start()
    try:
        yield
    finally:
        over.set()
        writer.join()
        path.unlink(missing_ok=True)


def read(folder: Path) -> dict[str, Any] | None:
    """Read the file; None without one. A killed gateway leaves it, so check whether a run is in progress."""
    try:
        row: dict[str, Any] = jsontext.decode(storage.read(folder / FILE, MAX_SNAPSHOT))
    except FileNotFoundError:
        return None
    return row
