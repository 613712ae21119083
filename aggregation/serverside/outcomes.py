"""How a round ends: with the sum of its survivors, or without one and a reason. Never with another sum."""

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from aggregation import checks
from aggregation.errors import ProtocolError
from aggregation.spec import SessionSpec

if TYPE_CHECKING:
    from aggregation.serverside.established import Established


class AbortReason(Enum):
    """Why a round ended without a sum."""

    TOO_FEW = "too-few"  # devices left, at any step
    UNRECOVERABLE = "unrecoverable"  # wrong shares, and too few good ones left
    OUT_OF_RANGE = "out-of-range"  # a sum that honest survivors cannot have
    SESSION_OVER = "session-over"  # no round left in the session


@dataclass(frozen=True, slots=True)
class RoundAborted:
    """A round that revealed nothing. ``session`` is where the next round begins; none before a session stands."""

    reason: AbortReason
    detail: str
    session: "Established | None"
    blamed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoundResult:
    """A round's sum.

    Args:
        round: Its number in the session, from 1.
        values: Segment name → sum over the survivors, shape ``(segment.size,)``.
        survivors: Whose contributions are in the sum.
        dropped: Who was in the plan and is not in the sum.
        blamed: Who sent or dealt a share that was found to be wrong.
        digest: SHA-256 of the summed vector, packed as it would travel.
    """

    round: int
    values: dict[str, NDArray[np.float64]]
    survivors: tuple[str, ...]
    dropped: tuple[str, ...]
    blamed: tuple[str, ...]
    digest: bytes


def too_few(spec: SessionSpec, count: int, what: str, session: "Established | None") -> RoundAborted | None:
    """The end of a round with fewer than its session takes, or nothing where there are enough."""
    try:
        checks.large_enough(spec, count, what)
    except ProtocolError as error:
        return RoundAborted(AbortReason.TOO_FEW, str(error), session)
    return None
