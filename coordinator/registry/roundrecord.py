"""The record of a round, which the registry keeps with the version that the round produced."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Self

from sqlalchemy import Row

from adapters.manifest import VersionManifest
from aggregation.errors import DataError


@dataclass(frozen=True, slots=True)
class RoundRecord:
    """What happened in one round. Bytes are totals over all devices.

    A device that drops out after its masked input arrived is among the survivors too: its update is in the sum.
    """

    round: int
    survivors: tuple[str, ...]  # devices whose updates are in the sum
    dropped: dict[str, str]  # device that did not finish the round → the step at which it dropped out
    aborted: str | None  # why, if the round ended without a sum
    bytes_up: int
    bytes_down: int
    seconds: float  # wall time of the round
    metrics: dict[str, float]
    version: int | None  # that the round produced

    def __post_init__(self) -> None:
        for name, value in {"seconds": self.seconds, **self.metrics}.items():
            if not math.isfinite(value):
                raise DataError(
                    f"round {self.round}: {name!r} is {value}, which no record can hold", about=name, value=value
                )
        if self.aborted is not None and self.version is not None:
            raise DataError(
                f"round {self.round} cannot be aborted and have produced version {self.version}",
                about="version",
                value=self.version,
            )

    def require_agreement(self, manifest: VersionManifest) -> None:
        """Return if the manifest is that of the version which this round produced.

        Raises:
            DataError: It is not.
        """
        mine = (self.round, self.version, self.survivors)
        if mine != (manifest.round, manifest.version, manifest.survivors):
            raise DataError(
                f"the record of round {self.round} and the manifest of its version contradict each other",
                about="record",
            )

    def to_row(self) -> dict[str, Any]:
        """The row that the database stores."""
        # Plain numbers: a database driver would store NumPy's as opaque bytes.
        numbers = {"bytes_up": int(self.bytes_up), "bytes_down": int(self.bytes_down), "seconds": float(self.seconds)}
        return {**asdict(self), **numbers, "metrics": {k: float(v) for k, v in self.metrics.items()}}

    @classmethod
    def of_row(cls, row: Row[Any]) -> Self:
        """The record that a row holds.

        Raises:
            TypeError, ValueError, DataError: The row is damaged.
        """
        return cls(**{**row._mapping, "survivors": tuple(row.survivors)})
