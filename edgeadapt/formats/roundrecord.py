"""The record of a round: a signed document, chained to the previous round's record.

It says how the round ended and where its ending stands in the log of its session. The coordinator writes the record
first and the ending second, from the record (``coordinator.transcripts``). So a start after a kill can add the ending
that is missing, and a log that lacks an ending which it once had is recognized.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, ClassVar

from pydantic import Field

from aggregation.errors import DataError, TrustError
from aggregation.pki.identity import PublicKey
from edgeadapt.formats.jsontext import Exact
from edgeadapt.formats.manifest import Count, Manifest, Sha256, VersionManifest

Time = Annotated[int, Field(ge=0, lt=2**32)]  # seconds since 1970, in UTC
INTERRUPTED = "interrupted"  # why a log aborts a round that was under way when the process ended; it has no record


@dataclass(frozen=True, slots=True)
class GroupRecord(Exact):
    """Describes a group: the devices in its sum, and its mean's distance from the combination, in weight units."""

    survivors: tuple[str, ...]
    distance: Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, slots=True)
class RoundRecord(Manifest):
    """Says what happened in one round. Bytes are totals over all devices.

    A device that drops out after its masked input arrived is among the survivors too: its update is in the sum. Raises
    DataError: a number is not finite, or the fields of a result are not all set where the round had one.
    """

    NAME: ClassVar[str] = "round-record"

    round: Count  # of the federation, from 1
    previous: Sha256 | None  # digest of the previous round's signed record; None for the first
    offer: Sha256  # digest of the session's offer
    plan: Sha256 | None  # digest of the plan; None if the round ended before it had one
    entries: Count  # in the session's log before the ending of the round
    root: Sha256  # of these entries
    survivors: tuple[str, ...]  # devices whose updates are in the sum
    dropped: dict[str, str]  # device that did not finish the round → the step at which it dropped out
    groups: tuple[GroupRecord, ...]  # with a sum of their own each; empty if the round had one sum
    blamed: tuple[str, ...]  # devices found to have dealt or revealed a wrong share
    reason: str | None  # as the log has it, if the round ended without a sum
    aborted: str | None  # the same for people
    spoiled: str | None  # why the sum, or that of a group, counts as zero: honest devices cannot have it
    sum: Sha256 | None  # of the unmasked vector, packed; with groups, of all of them (``aggregation.groups``)
    version: Count | None  # that the round produced
    adapter: Sha256 | None  # of that version's file
    optimizer: Sha256 | None  # of the server optimizer's state after the round; None if it has none
    bytes_up: Count
    bytes_down: Count
    seconds: float  # wall time of the round
    epsilon: float | None  # what all sums so far may have revealed, for the offer's delta; None: nothing bounds it
    metrics: dict[str, float]
    ended: Time | None = None  # as the log of the session tells the time; None in records of earlier versions

    def __post_init__(self) -> None:
        for name, value in {"seconds": self.seconds, "epsilon": self.epsilon or 0.0, **self.metrics}.items():
            if not math.isfinite(value):
                reason = f"round {self.round}: {name!r} is {value}, which no record can hold"
                raise DataError(reason, about=name)
        result = [value is not None for value in (self.version, self.adapter, self.sum)]
        if not all(result if self.aborted is None else [not each for each in result]) or (
            (self.reason is None) != (self.aborted is None)
            or (self.plan is None and self.version is not None)
            or (self.spoiled is not None and self.version is None)
        ):
            raise DataError(
                f"round {self.round} must either be aborted for a reason or have made a version from the sum of a plan",
                about="version",
            )

    def made(self, manifest: VersionManifest) -> bool:
        """Check whether the manifest is that of the version which this round produced."""
        mine = (self.round, self.plan, self.version, self.adapter, self.survivors)
        return mine == (manifest.round, manifest.plan, manifest.version, manifest.sha256, manifest.survivors)

    def require_agreement(self, manifest: VersionManifest) -> None:
        """Check that the manifest is that of the version which this round produced. Raises DataError."""
        if not self.made(manifest):
            reason = f"the record of round {self.round} and the manifest of its version contradict each other"
            raise DataError(reason, about="record")


def accept_chain(
    rows: Iterable[tuple[int, object]], trusted: Iterable[PublicKey], before: tuple[int, object] = (0, None)
) -> list[RoundRecord]:
    """Verify the records in rows of a registry: each signed, numbered without a gap and naming the previous one.

    Args:
        rows: Number of a round, and its signed record; in order.
        trusted: The keys that may have signed.
        before: Number of the round before these, and its signed record; (0, None) before the first.

    Raises TrustError: a record is missing, was altered, or stands in another place than it was signed for.
    """
    (last, signed), keys, records = before, list(trusted), list[RoundRecord]()
    for number, raw in rows:
        try:
            if not isinstance(raw, bytes):
                raise TrustError("it is not a signed document", about="record")
            record = RoundRecord.accept(raw, keys)
            previous = None if signed is None else digest_of(signed)
            if (record.round, record.round, record.previous) != (number, last + 1, previous):
                raise TrustError("it does not follow the record before it", about="record")
        except (DataError, TrustError) as error:
            text = f"the record of round {number} was altered ({error}): restore the registry from a copy"
            raise TrustError(text, about="record") from None
        records.append(record)
        last, signed = number, raw
    return records


def digest_of(signed: object) -> str:
    """Return the digest by which a record names the previous one (SHA-256, hex). Raises TrustError if it is not bytes,
    as a damaged column of a database may be."""
    if not isinstance(signed, bytes):
        raise TrustError("it is not a signed document", about="record")
    return sha256(signed).hexdigest()
