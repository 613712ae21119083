"""The parameters of a session: everything in the offer except the cohort. Contradictions are refused at construction.
Whether a device accepts a spec is decided by its own ``policy``."""

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import Annotated

from aggregation import wire
from aggregation.errors import ConfigError, check_fields
from aggregation.privacy.accounting import Mechanism, NoisySum, Spent
from aggregation.privacy.noise import norm_squared
from aggregation.vector import VectorSpec

MAX_ROUNDS = 1024
CORRUPT_FRACTION = 0.1  # of a cohort that a device's default policy assumes to collude with the coordinator
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


class Adversary(Enum):
    ACTIVE = "active"  # lies about anything; the consistency check is run
    HONEST_BUT_CURIOUS = "honest-but-curious"  # follows the protocol and learns what it can from its messages


COUNTS = "counts"  # segment of the right answers that an evaluation counts; a device demands noise in it (``policy``)
OBSERVED = "observed"  # segment of what devices answered, in which it demands as much
CELLS = "cells"  # segment of what devices' texts are about, in which it demands as much


@dataclass(frozen=True, slots=True)
class Privacy:
    """Differential privacy of a session: each device adds noise to its vector, as much as the segment says. Raises
    ConfigError: ``delta`` is out of range."""

    mechanism: Annotated[Mechanism, wire.choice(Mechanism)]  # distribution of the noise
    honest: wire.Uint32  # devices whose noise counts in the smallest sum, 1 or more: the others may be corrupt
    delta: wire.Real  # the δ of the coordinator's account, between 0 and 1

    def __post_init__(self) -> None:
        check_fields(self, "spec.privacy.", [("delta", 0 < self.delta < 1, "between 0 and 1")], "privacy.")


@dataclass(frozen=True, slots=True)
class Grouping:
    """Several sums a round, each over a group of the devices (``groups``). ``count``: of groups, 2 or more.
    ``minimum``: contributions of a group below which no sum of the round is unmasked; and consistency signatures of the
    group that a device requires. Raises ConfigError: a number is below 2."""

    count: wire.Uint32
    minimum: wire.Uint32

    def __post_init__(self) -> None:
        ranges = (("count", self.count >= 2, "2 or more"), ("minimum", self.minimum >= 2, "2 or more"))
        check_fields(self, "spec.grouping.", ranges, "grouping.")


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """Parameters of a session. Raises ConfigError: a value is out of range or contradicts another."""

    rounds: wire.Uint32  # rounds that the session's keys serve, 1 to ``MAX_ROUNDS``
    # Shares that reconstruct a secret, and answers without which a round aborts; 2 to ``degree + 1``.
    threshold: wire.Uint32
    minimum_survivors: wire.Uint32  # contributions below which a sum is not unmasked, ``threshold`` or more
    degree: wire.Uint32  # neighbors of a device in the masking graph; the cohort size less one is the complete graph
    vector: Annotated[VectorSpec, wire.record(VectorSpec)]  # layout, fixed-point format and ring of a contribution
    clip_norm: wire.Real  # L2 bound on a device's update before it is weighted, in weight units
    # Largest weight of one device, in examples; 1 with noise, where every device has the weight 1.
    weight_cap: wire.Uint64
    # Of the noise that devices add. None: they add none, and nothing bounds what a sum says about one.
    privacy: Annotated[Privacy | None, wire.optional(wire.record(Privacy))]
    base_digest: wire.HexDigest  # of the frozen base
    layout_digest: wire.HexDigest  # of the adapter's layout
    # The model against which the session is secure; ``ACTIVE`` runs the consistency check.
    adversary: Annotated[Adversary, wire.choice(Adversary)]
    # Of the devices of a round; None: a round has one sum.
    grouping: Annotated[Grouping | None, wire.optional(wire.record(Grouping))] = None

    def __post_init__(self) -> None:
        clients = self.vector.max_clients
        ranges = (
            ("rounds", 1 <= self.rounds <= MAX_ROUNDS, f"between 1 and {MAX_ROUNDS}"),
            ("threshold", 2 <= self.threshold <= self.degree + 1, f"between 2 and degree + 1 = {self.degree + 1}"),
            (
                "minimum_survivors",
                self.threshold <= self.minimum_survivors <= clients,
                f"between the threshold {self.threshold} and max_clients {clients}",
            ),
            ("degree", self.degree < clients, f"below max_clients {clients}"),
            ("clip_norm", math.isfinite(self.clip_norm) and self.clip_norm > 0, "a positive number"),
            ("weight_cap", 1 <= self.weight_cap <= 2**32, "between 1 and 2^32"),
            ("base_digest", _DIGEST.fullmatch(self.base_digest), "a SHA-256 in 64 lower-case hex digits"),
            ("layout_digest", _DIGEST.fullmatch(self.layout_digest), "a SHA-256 in 64 lower-case hex digits"),
        )
        check_fields(self, "spec.", ranges)
        self._require_groups()
        self._require_noise()

    def _require_groups(self) -> None:
        """Return if so many groups fit the session, and the quorum of a survivor set is shown to each device."""
        if self.grouping is None:
            return
        count, minimum = self.grouping.count, self.grouping.minimum
        if self.adversary is not Adversary.ACTIVE:
            text = "groups need the consistency check: a device counts on the signatures of its group"
            raise ConfigError(text, about="spec.grouping.adversary")
        if count * minimum > self.vector.max_clients:
            text = f"{count} groups of {minimum} devices or more do not fit max_clients {self.vector.max_clients}"
            raise ConfigError(text, about="spec.grouping.count")

    def _require_noise(self) -> None:
        """Return if all of the vector has noise, and it is accounted for, or none of it."""
        noisy = [segment for segment in self.vector.segments if segment.noise]
        if self.privacy is None:
            if noisy:
                raise ConfigError("the vector has noise, and no mechanism is named", about="spec.privacy")
            return
        if len(noisy) != 1 or len(self.vector.segments) != 1 or self.weight_cap != 1:
            text = "with noise, a vector consists of one segment, which has noise, and the weight cap is 1"
            raise ConfigError(text, about="spec.privacy")
        if not 1 <= self.privacy.honest <= self.smallest_sum:
            text = f"privacy.honest {self.privacy.honest} is not between 1 and {self.smallest_sum}, the smallest sum"
            raise ConfigError(text, about="spec.privacy.honest")
        self.spent(self.minimum_survivors)

    @property
    def groups(self) -> int:
        return self.grouping.count if self.grouping else 1

    @property
    def smallest_sum(self) -> int:
        return self.grouping.minimum if self.grouping else self.minimum_survivors

    def noise_multiplier(self, corrupt: int = 0) -> float:
        """The standard deviation of the noise in the smallest sum over the clip norm; 0 without noise. ``corrupt``: as
        of ``spent``."""
        if self.privacy is None:
            return 0.0
        honest = max(0, self.honest(self.minimum_survivors, corrupt))
        return self.vector.segments[0].noise * math.sqrt(honest) / self.clip_norm

    def honest(self, survivors: int, corrupt: int = 0) -> int:
        """How many devices add the noise of a sum that the account counts on. All as of ``spent``."""
        assumed = self.smallest_sum - self.privacy.honest if self.privacy else 0
        return (self.smallest_sum if self.grouping else survivors) - max(corrupt, assumed)

    def spent(self, survivors: int, corrupt: int = 0) -> Spent:
        """What a round reveals of one device, in a session with noise. With groups, each sum counts as the smallest.

        ``survivors``: their number, ``minimum_survivors`` or more. ``corrupt``: how many of them may have added no
        noise; the session's own number, if that is higher. Raises ConfigError: no honest device is left, or a number is
        out of the range of ``NoisySum``."""
        if self.privacy is None:
            raise ValueError("a session without noise has no account")
        (segment,) = self.vector.segments
        step = self.vector.step(segment)
        honest = self.honest(survivors, corrupt)
        longest = norm_squared(self.clip_norm / step, segment.size)
        variance = (segment.noise / step) ** 2
        return Spent.on([NoisySum(self.privacy.mechanism, segment.size, longest, variance, honest)])

    @property
    def quorum(self) -> int:
        """Consistency signatures that a device requires before it reveals shares, in an active session. On the complete
        graph the threshold exceeds half of all devices, so that two survivor sets cannot both have that many. On a
        sparse graph the threshold is relative to a neighborhood, so the minimum of survivors is required."""
        return self.threshold if self.degree == self.vector.max_clients - 1 else self.minimum_survivors
