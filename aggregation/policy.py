"""What a device requires of an offer before it takes part. The policy belongs to the device's owner. The defaults are
the secure ones. The coordinator cannot change them; each weaker value is the owner's choice."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, get_type_hints

from aggregation import graph
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.pki.revocation import RevocationList
from aggregation.session import COORDINATOR
from aggregation.spec import CELLS, CORRUPT_FRACTION, COUNTS, OBSERVED, Adversary, SessionSpec

MAX_REPEATS = 15
_Rule = tuple[bool, str, str]  # whether it holds, the field it is about, and the refusal


@dataclass(frozen=True, slots=True)
class Limit:
    """What a field of ``Policy`` means to an owner, and its range. ``meaning``: for the owner, in ``device.toml`` and
    its document. ``ge``, ``gt``, ``le``, ``lt``: bounds of the field."""

    meaning: str
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def admits(self, value: float) -> bool:
        """Whether a number, which is finite, is within the range."""
        low = (self.ge is None or value >= self.ge) and (self.gt is None or value > self.gt)
        high = (self.le is None or value <= self.le) and (self.lt is None or value < self.lt)
        return low and high and math.isfinite(value)

    def __str__(self) -> str:
        bounds = {">=": self.ge, ">": self.gt, "<=": self.le, "<": self.lt}
        return " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if bound is not None)


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits on the sessions that this device joins. Raises ConfigError: a value is out of range."""

    known_bases: Annotated[
        frozenset[str], Limit("SHA-256 of the frozen bases to train on, in hex; if empty, the one that this device has")
    ] = frozenset()
    minimum_cohort: Annotated[int, Limit("fewest devices in a cohort", ge=3)] = 8  # two show each the other's part
    minimum_survivors: Annotated[
        int,
        Limit(
            "fewest honest devices in a sum, this one included: the session's minimum of survivors, less the corrupt "
            "devices of the cohort; and fewest in a combination of sums from one adapter",
            ge=2,
        ),
    ] = graph.MINIMUM_SURVIVORS
    minimum_ring_bits: Annotated[int, Limit("fewest bits of an element of the masked vector", ge=1, le=64)] = 16
    maximum_ring_bits: Annotated[int, Limit("most bits of an element of the masked vector", ge=1, le=64)] = 64
    adversaries: Annotated[
        frozenset[Adversary],
        Limit(
            'adversary models that a session may assume: "active", a coordinator that may send anything, or also '
            '"honest-but-curious", one that follows the protocol'
        ),
    ] = frozenset({Adversary.ACTIVE})
    corrupt_fraction: Annotated[
        float,
        Limit("fraction of the cohort that may collude with the coordinator; a session must withstand it", ge=0, lt=1),
    ] = CORRUPT_FRACTION
    complete_up_to: Annotated[int, Limit("largest cohort, in devices, that must use the complete graph", ge=3)] = (
        graph.COMPLETE_UP_TO
    )
    maximum_weight: Annotated[int, Limit("largest weight of one device in the mean, in examples", ge=1)] = 65_536
    maximum_rounds: Annotated[int, Limit("most rounds in a session", ge=1)] = 64
    maximum_repeats: Annotated[
        int,
        Limit(
            "most sums from an adapter for which the device reveals shares after the first one; all are over the same "
            "devices, less those that were revoked since",
            ge=0,
            le=MAX_REPEATS,
        ),
    ] = 3
    minimum_movement: Annotated[
        float,
        Limit(
            "without noise: distance of an adapter from those of earlier sums below which the device helps to a sum "
            "over the same devices only, as a share of the longest step that the task's optimizer can make",
            ge=0,
            le=1000,
        ),
    ] = 0.02
    minimum_noise_multiplier: Annotated[
        float,
        Limit(
            "least noise of a session: its standard deviation in the smallest sum of a round, from honest devices, in "
            "clip norms; above 0, sessions without noise are refused",
            ge=0,
            le=1000,
        ),
    ] = 0.0
    minimum_evaluation_noise: Annotated[
        float,
        Limit(
            "least noise of a session that counts the right answers of releases, or what devices answered, as "
            "minimum_noise_multiplier: nobody can tell a device how many others have its release, so that an exact "
            "sum could be its own counts",
            gt=0,
            le=1000,
        ),
    ] = 1.0
    maximum_epsilon: Annotated[
        float,
        Limit(
            "most that all contributions of this device together may reveal, as the epsilon of differential privacy "
            "for delta; above 0, sessions without noise are refused, and so is a plan that exceeds it; 0: no limit",
            ge=0,
        ),
    ] = 0.0
    delta: Annotated[float, Limit("probability for which maximum_epsilon is stated", gt=0, lt=1)] = 1e-6
    demand_proofs: Annotated[
        bool,
        Limit(
            "take part again only if the coordinator proves that its log extends what this device saw and contains "
            "what it did"
        ),
    ] = True
    revocation_days: Annotated[
        int,
        Limit(
            "greatest age of the authority's revocation list, in days; 0: no list is demanded, and an existing one is "
            "used until it expires",
            ge=0,
            le=36_500,
        ),
    ] = 0

    def __post_init__(self) -> None:
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if isinstance(value, int | float) and not limit.admits(value):
                raise ConfigError(f"{name} {value} is not {limit}", about=f"policy.{name}")
        if self.minimum_ring_bits > self.maximum_ring_bits:
            text = f"minimum_ring_bits {self.minimum_ring_bits} is above maximum_ring_bits {self.maximum_ring_bits}"
            raise ConfigError(text, about="policy.minimum_ring_bits")
        honest = self.minimum_cohort - graph.count_of(self.minimum_cohort, self.corrupt_fraction)
        if honest < self.minimum_survivors:
            raise ConfigError(
                f"a cohort of minimum_cohort {self.minimum_cohort} has {honest} honest devices, fewer than "
                f"minimum_survivors {self.minimum_survivors}: lower minimum_survivors, or raise minimum_cohort",
                about="policy.minimum_survivors",
            )

    def check(self, spec: SessionSpec, cohort: int) -> None:
        """Check that this device may take part in a session of ``spec`` with ``cohort`` devices. Raises ProtocolError:
        it may not; the error is about the first field that breaks the policy."""
        _require("offer", self._offer_rules(spec, cohort))

    def check_revocations(self, revoked: RevocationList | None, at: datetime) -> None:
        """Check that this device may rely at time ``at`` on the revocation list that it has, or on having none. Raises
        ProtocolError: the list is missing, too old, or past its end: the coordinator withholds a newer one."""
        if revoked is None:
            missing = "the coordinator sent no revocation list, and this device's policy requires one"
            _require("offer", ((not self.revocation_days, "revocations", missing),))
            return
        try:
            revoked.require_fresh(at, timedelta(self.revocation_days) if self.revocation_days else None)
        except TrustError as error:
            message, about = f"offer refused: {error}", f"offer.{error.about}"
            raise ProtocolError(message, COORDINATOR, about=about) from None

    def check_roster(self, spec: SessionSpec, cohort: int, roster: int) -> None:
        """Check that the graph is secure with ``roster`` of the ``cohort`` devices, all corrupt ones among them. Raises
        ProtocolError."""
        _require("roster", self._graph_rules(spec, cohort, roster))

    def _graph_rules(self, spec: SessionSpec, cohort: int, present: int) -> tuple[_Rule, ...]:
        """Neither both secrets of a device nor a part of the sum can be revealed: docs/explanation/threat-model.md."""
        corrupt = graph.count_of(cohort, self.corrupt_fraction)
        degree, threshold, honest = spec.degree, spec.threshold, self.minimum_survivors
        left = graph.left_over(present, corrupt, degree, threshold, spec.minimum_survivors)
        few = (
            f"sums of one adapter could be combined to {max(left, 0)} honest devices, below this device's "
            f"minimum_survivors of {honest}: threshold {threshold} or the session's minimum of survivors is too low"
        )
        combined = (left >= honest, "combined", few)
        if degree >= present - 1:
            text = f"threshold {threshold} of {present} does not withstand {corrupt} corrupt devices"
            return (2 * threshold > present + corrupt, "threshold", text), combined
        bits = graph.SIGMA + (graph.GRINDING if spec.adversary is Adversary.ACTIVE else 0)
        sparse = f"degree {degree} is not the complete graph of {present} devices"
        weak = f"degree {degree} and threshold {threshold} of {present} devices do not withstand {corrupt} corrupt ones"
        return (
            (cohort > self.complete_up_to, "degree", sparse),
            (graph.is_secure(present, corrupt, degree, threshold, bits), "graph", weak),
            combined,
        )

    def _offer_rules(self, spec: SessionSpec, cohort: int) -> tuple[_Rule, ...]:
        bits, corrupt = spec.vector.ring_bits, graph.count_of(cohort, self.corrupt_fraction)
        adversary, quorum, base = spec.adversary, spec.quorum, spec.base_digest
        in_ring = self.minimum_ring_bits <= bits <= self.maximum_ring_bits
        two_groups = f"{quorum} of {cohort} devices sign the survivor set: two groups could sign different sets"
        honest = spec.smallest_sum - corrupt  # all corrupt ones may be in one group, which the coordinator can try for
        few = (
            f"a sum over {spec.smallest_sum} of {cohort} devices has {honest} honest ones, below this device's "
            f"minimum_survivors of {self.minimum_survivors}; for a small fleet lower it together with minimum_cohort"
        )
        small = f"cohort of {cohort} is below this device's minimum of {self.minimum_cohort}"
        model = f"adversary model {adversary.value} is not one that this device accepts"
        rounds = f"session of {spec.rounds} rounds is over this device's maximum of {self.maximum_rounds}"
        weight = f"weight cap {spec.weight_cap} is over this device's maximum of {self.maximum_weight}"
        return (
            (cohort >= self.minimum_cohort, "cohort", small),
            (spec.threshold <= cohort, "threshold", f"threshold {spec.threshold} is above the cohort of {cohort}"),
            (spec.vector.max_clients >= cohort, "max_clients", f"a sum of {cohort} could wrap the ring"),
            *self._graph_rules(spec, cohort, cohort),
            (honest >= self.minimum_survivors, "minimum_survivors", few),
            (adversary is not Adversary.ACTIVE or 2 * quorum > cohort + corrupt, "quorum", two_groups),
            (in_ring, "ring_bits", f"ring of {bits} bits is outside this device's limits"),
            (adversary in self.adversaries, "adversary", model),
            (base in self.known_bases, "base_digest", f"base {base[:12]} is not on this device"),
            (spec.weight_cap <= self.maximum_weight, "weight_cap", weight),
            (spec.rounds <= self.maximum_rounds, "rounds", rounds),
            *self._noise_rules(spec, corrupt),
        )

    def _noise_rules(self, spec: SessionSpec, corrupt: int) -> tuple[_Rule, ...]:
        counts = self.minimum_evaluation_noise if spec.vector.segments[0].name in (COUNTS, OBSERVED, CELLS) else 0.0
        found, least = spec.noise_multiplier(corrupt), max(self.minimum_noise_multiplier, counts)
        demanded = least > 0 or self.maximum_epsilon > 0
        bare = "the session adds no noise to its sums, and this device's policy demands it"
        little = f"noise multiplier {found:.3g}, without {corrupt} corrupt devices, is below this device's {least:g}"
        return (
            (spec.privacy is not None or not demanded, "privacy", bare),
            (found >= least, "noise_multiplier", little),
        )


LIMITS: Mapping[str, Limit] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Policy, include_extras=True).items()
}


def _require(what: str, rules: tuple[_Rule, ...]) -> None:
    for holds, field, reason in rules:
        if not holds:
            raise ProtocolError(f"{what} refused: {reason}", COORDINATOR, about=f"{what}.{field}")
