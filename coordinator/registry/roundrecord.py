"""The record of a round: what the registry keeps of it beside the version that came of it."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

from sqlalchemy import Row

from adapters.manifest import VersionManifest
from aggregation.errors import DataError


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What happened in one round. Bytes are totals over all devices.

    A device may be in ``survivors`` and in ``dropped``: lost after its masked input had arrived, it still counts.
    """

    round: int
    survivors: tuple[str, ...]  # devices whose updates are in the sum
    dropped: dict[str, str]  # device → step at which it was lost
    aborted: str | None  # why, if the round ended without a sum
    bytes_up: int
    bytes_down: int
    seconds: float  # wall time of the round
    metrics: dict[str, float]
    version: int | None  # that came of it

    def __post_init__(self) -> None:
        for name, value in {"seconds": self.seconds, **self.metrics}.items():
            if not math.isfinite(value):
                raise DataError(f"round {self.round}: {name!r} is {value}, which no record can hold")
        if self.aborted is not None and self.version is not None:
            raise DataError(f"round {self.round} is said to be aborted and to have made version {self.version}")

    def require_agreement(self, manifest: VersionManifest) -> None:
        """Return if the manifest is of the version that came of this round.

        Raises:
            DataError: It is not.
        """
        said = (self.round, self.version, self.survivors)
        if said != (manifest.round, manifest.version, manifest.survivors):
            raise DataError(f"the record of round {self.round} and the manifest of its version contradict each other")

    def to_row(self) -> dict[str, Any]:
        """As the database keeps it."""
        # Plain numbers: a database driver would store NumPy's as opaque bytes.
        numbers = {"bytes_up": int(self.bytes_up), "bytes_down": int(self.bytes_down), "seconds": float(self.seconds)}
        return {**asdict(self), **numbers, "metrics": {k: float(v) for k, v in self.metrics.items()}}

    @classmethod
    def of_row(cls, row: Row[Any]) -> Self:
        """As the database kept it.

        Raises:
            TypeError, ValueError, DataError: The row is damaged.
        """
        return cls(**{**row._mapping, "survivors": tuple(row.survivors)})
