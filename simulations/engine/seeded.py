"""The secrets of sessions that follow from a scenario's seed, so that a simulated run can be repeated.

A device in the field draws them from the operating system when it joins. A simulated one has the file ``SEED`` in its
state directory, which no device in the field reads.
"""

from dataclasses import dataclass
from pathlib import Path

from adapters import storage
from aggregation.masks import KEY, derive
from client.node.statedir import DeviceStateDir

SEED = "simulation.seed"  # file


class SeededEntropy:
    """Entropy from a chain of keys: a draw takes at most 32 bytes, and replaces the key by its successor."""

    def __init__(self, key: bytes) -> None:
        self.key = key

    def bytes(self, n: int) -> bytes:
        """Return ``n`` bytes."""
        drawn = derive(self.key, b"edgeadapt/session-training/1")
        self.key = derive(self.key, b"edgeadapt/next-training/1")
        return drawn[:n]


@dataclass(frozen=True, slots=True)
class StoredEntropy:
    """``SeededEntropy`` whose key is in a file."""

    path: Path

    def bytes(self, n: int) -> bytes:
        """Return ``n`` bytes, and replace the key in the file."""
        chain = SeededEntropy(storage.read(self.path, KEY))
        drawn = chain.bytes(n)
        storage.replace(self.path, chain.key)
        return drawn


def open_state_dir(folder: Path) -> DeviceStateDir:
    """The state directory of a simulated device. Raises as ``DeviceStateDir.open``."""
    return DeviceStateDir(folder, DeviceStateDir.open(folder).settings, StoredEntropy(folder / SEED))
