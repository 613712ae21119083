"""What a session agrees on: everything in the offer but the cohort. Checked against itself when it is made.

Whether a device accepts a spec is the device's own ``policy``; this file only refuses what contradicts itself.
"""

import math
import re
from dataclasses import dataclass
from enum import Enum

from aggregation import graph
from aggregation.errors import ConfigError
from aggregation.vector import VectorSpec

MAX_ROUNDS = 1024
CORRUPT_FRACTION = 0.1  # of a cohort that a device's default policy supposes to side with the coordinator
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Adversary(Enum):
    """What the coordinator is held capable of."""

    ACTIVE = "active"  # lies about anything; the consistency round is run
    HONEST_BUT_CURIOUS = "honest-but-curious"  # follows the protocol and looks at what it gets


def default_threshold(devices: int) -> int:
    """The least ``t`` with ``2 t > n + corrupt``: no two disjoint sets of answers can open both kinds of secret.

    With two sets of ``t`` answers, ``2 t - n`` devices or more are in both; more of them than are corrupt means that
    an honest one is, and an honest one answers once (Bonawitz et al. 2017, section 6.2).
    """
    if devices < 3:
        raise ConfigError(f"secure aggregation needs 3 devices or more, not {devices}")
    return graph.quorum(devices, CORRUPT_FRACTION)


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """Parameters of a session.

    Args:
        rounds: Rounds that the session's key material serves, 1 or more.
        threshold: Shares that open a secret; answers without which a round ends.
        minimum_survivors: Contributions below which a sum is not opened, ``threshold`` or more.
        degree: Neighbours of a device in the masking graph; the cohort less one is the complete graph.
        vector: Layout, fixed point and ring of a contribution.
        clip_norm: L2 bound on a device's update before it is weighted, in weight units.
        weight_cap: Largest weight of one device, in examples.
        privacy: Noise mechanism; ``"none"`` is the only one so far.
        base_digest: SHA-256 of the frozen base, 64 hex digits.
        layout_digest: SHA-256 of the adapter's layout, 64 hex digits.
        adversary: Whether the consistency round is run.

    Raises:
        ConfigError: A value is out of range or contradicts another.
    """

    rounds: int
    threshold: int
    minimum_survivors: int
    degree: int
    vector: VectorSpec
    clip_norm: float
    weight_cap: int
    privacy: str
    base_digest: str
    layout_digest: str
    adversary: Adversary

    def __post_init__(self) -> None:
        if not 1 <= self.rounds <= MAX_ROUNDS:
            raise ConfigError(f"rounds {self.rounds} is not between 1 and {MAX_ROUNDS}")
        if not 2 <= self.threshold <= self.degree + 1:
            raise ConfigError(f"threshold {self.threshold} is not between 2 and degree + 1 = {self.degree + 1}")
        if not self.threshold <= self.minimum_survivors <= self.vector.max_clients:
            raise ConfigError(
                f"minimum_survivors {self.minimum_survivors} is not between the threshold {self.threshold} "
                f"and max_clients {self.vector.max_clients}"
            )
        if self.degree >= self.vector.max_clients:
            raise ConfigError(f"degree {self.degree} is not below max_clients {self.vector.max_clients}")
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ConfigError(f"clip_norm {self.clip_norm} is not a positive number")
        if not 1 <= self.weight_cap <= 2**32:
            raise ConfigError(f"weight_cap {self.weight_cap} is not between 1 and 2^32")
        if self.privacy != "none":
            raise ConfigError(f"privacy {self.privacy!r} is not known; 'none' is the only choice")
        for name in ("base_digest", "layout_digest"):
            if not _DIGEST.fullmatch(getattr(self, name)):
                raise ConfigError(f"{name} is not a SHA-256 in 64 lower-case hex digits")

    @property
    def quorum(self) -> int:
        """Agreements without which a device opens nothing of a round, in an active session.

        On the complete graph the threshold is more than half of everyone already, so that two survivor sets cannot
        both have it. On a sparse one it is that of a neighbourhood, and as many must agree as a sum is of at least.
        """
        complete = self.degree == self.vector.max_clients - 1
        return self.threshold if complete else self.minimum_survivors
