"""The states of a device's texts below the layers that it trains, kept from one process to the next, encrypted. They
say almost what the texts say. So only those of the texts of the last training are kept, and ``edgeadapt device forget``
deletes them. States of another base, and a file that cannot be read, are computed again."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Self

import numpy as np

from aggregation import sealed, wire
from aggregation.errors import EdgeAdaptError
from edgeadapt.bases.states import StateCache
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.storage import read, replace

MAX_STATES = 2**25  # bytes of the states of all texts: 1,500 texts of 14 tokens at a width of 384
MAX_TEXTS = 2**16
MAX_FILE = 2**26  # bytes
_DIGEST = wire.text("[0-9a-f]{64}")
log = logging.getLogger("edgeadapt.device")


@dataclass(frozen=True, slots=True)
class KeptStates(sealed.SealedRecord):
    MAGIC: ClassVar[bytes] = b"edgeadapt/states/1\x00"

    source: Annotated[str, wire.text(r"[0-9a-f/]{1,256}")]  # ``StateCache.source``
    width: Annotated[int, wire.uint(32)]
    # Digest of tokens → float32, little-endian.
    states: Annotated[Mapping[str, bytes], wire.mapping(_DIGEST, wire.blob(MAX_STATES), MAX_TEXTS)] = field(repr=False)

    @classmethod
    def of(cls, source: str, states: Tensors) -> Self:
        width = next(iter(states.values())).shape[1]
        return cls(source, width, {key: value.astype("<f4").tobytes() for key, value in states.items()})

    def tensors(self) -> Tensors:
        return {key: np.frombuffer(raw, "<f4").reshape(-1, self.width) for key, raw in self.states.items()}


@dataclass(frozen=True, slots=True)
class StatesFile:
    path: Path
    key: bytes = field(repr=False)

    def load(self, cache: StateCache) -> None:
        try:
            kept = KeptStates.open(read(self.path, MAX_FILE), self.key)
            cache.begin(kept.tensors() if kept.source == cache.source else {})
        except FileNotFoundError:
            cache.begin({})
        except EdgeAdaptError as error:
            log.warning("%s is computed again: %s", self.path.name, error, extra={"about": self.path.name})
            cache.begin({})

    def save(self, cache: StateCache) -> None:
        """Replace the file by the states that were used since ``load``, atomically; if that fails, there is none."""
        self.path.unlink(missing_ok=True)
        if states := cache.used(MAX_STATES):
            try:
                replace(self.path, KeptStates.of(cache.source, states).seal(self.key))
            except (OSError, EdgeAdaptError) as error:  # a full disk, say
                log.warning("%s is not kept: %s", self.path.name, error, extra={"about": self.path.name})
