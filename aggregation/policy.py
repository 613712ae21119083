"""What a device requires of an offer before it takes part. The policy belongs to the device's owner.

The defaults are the secure ones. The coordinator cannot change them; each weaker value is the owner's choice.
"""

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from aggregation import graph
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.pki.revocation import RevocationList
from aggregation.session import COORDINATOR
from aggregation.spec import CORRUPT_FRACTION, COUNTS, Adversary, SessionSpec

MAX_REPEATS = 15
_Rule = tuple[bool, str, object, str]  # whether it holds, the field it is about, that field's value, and the refusal


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits on the sessions that this device joins.

    Args:
        known_bases: SHA-256 of the frozen bases that this device holds, in hex. Empty: it joins no session.
        minimum_cohort: Smallest cohort, in devices.
        minimum_survivors: Fewest honest devices, this one included, in a sum: the session's own minimum of survivors,
            or with groups that of a group, less all corrupt devices of the cohort. And fewest in a linear combination
            of sums from one adapter.
        minimum_ring_bits: Fewest bits of a ring element.
        maximum_ring_bits: Most bits of a ring element.
        adversaries: Adversary models that this device accepts.
        corrupt_fraction: Fraction of the cohort that may collude with the coordinator; threshold and graph must
            withstand it.
        complete_up_to: Largest cohort in which every device must be every other's neighbor.
        maximum_weight: Largest weight cap, in examples.
        maximum_rounds: Most rounds in a session.
        maximum_repeats: Most sums from an adapter for which the device reveals shares after the first one.
            All are over the same devices (``client.node.adapterstate``).
        minimum_movement: How far an adapter has to be from those of earlier sums without noise, for a sum over other
            devices: as a share of the longest step of training (``adapters.movement``).
        minimum_noise_multiplier: Least noise of a sum: the standard deviation of that of its honest devices in the
            smallest sum of a round, in clip norms. Above 0, a session must have noise.
        minimum_evaluation_noise: The same of a session that counts right answers, above 0: a device does not know how
            many others have its release, so that an exact sum could be its own counts.
        maximum_epsilon: Most that all contributions of this device together may reveal, for ``delta``
            (``client.node.privacyledger``). Above 0, a session must have noise; 0: no limit.
        delta: The probability for which ``maximum_epsilon`` is stated.
        demand_proofs: Whether to take part again only if the coordinator proves what its log holds (``transcript``).
        revocation_days: Greatest age of the authority's revocation list, in days. 0: no list is required, and a list
            that the device has is valid until its own end.

    Raises:
        ConfigError: A value is out of range.
    """

    known_bases: frozenset[str] = frozenset()
    minimum_cohort: int = 8
    minimum_survivors: int = graph.MINIMUM_SURVIVORS
    minimum_ring_bits: int = 16
    maximum_ring_bits: int = 64
    adversaries: frozenset[Adversary] = frozenset({Adversary.ACTIVE})
    corrupt_fraction: float = CORRUPT_FRACTION
    complete_up_to: int = graph.COMPLETE_UP_TO
    maximum_weight: int = 65_536
    maximum_rounds: int = 64
    maximum_repeats: int = 3
    minimum_movement: float = 0.02
    minimum_noise_multiplier: float = 0.0
    minimum_evaluation_noise: float = 1.0
    maximum_epsilon: float = 0.0
    delta: float = 1e-6
    demand_proofs: bool = True
    revocation_days: int = 0

    def __post_init__(self) -> None:
        low, high = self.minimum_ring_bits, self.maximum_ring_bits
        ranges = (
            ("minimum_cohort", self.minimum_cohort >= 3, "3 or more: a sum of two shows each the other's part"),
            ("minimum_survivors", self.minimum_survivors >= 2, "2 or more: a sum of one honest device shows its part"),
            ("corrupt_fraction", 0 <= self.corrupt_fraction < 1, "in [0, 1)"),
            ("minimum_ring_bits", 1 <= low <= high, f"between 1 and maximum_ring_bits {high}"),
            ("maximum_ring_bits", high <= 64, "64 or less"),
            ("maximum_repeats", 0 <= self.maximum_repeats <= MAX_REPEATS, f"between 0 and {MAX_REPEATS}"),
            ("minimum_movement", 0 <= self.minimum_movement < math.inf, "a number from 0 on"),
            ("revocation_days", self.revocation_days >= 0, "0 or more"),
            ("minimum_noise_multiplier", 0 <= self.minimum_noise_multiplier < math.inf, "a number from 0 on"),
            ("minimum_evaluation_noise", 0 < self.minimum_evaluation_noise < math.inf, "a number above 0"),
            ("maximum_epsilon", 0 <= self.maximum_epsilon < math.inf, "a number from 0 on"),
            ("delta", 0 < self.delta < 1, "between 0 and 1"),
        )
        for name, holds, expected in ranges:
            if not holds:
                value = getattr(self, name)
                raise ConfigError(f"{name} {value} is not {expected}", about=f"policy.{name}", value=value)
        honest = self.minimum_cohort - graph.count_of(self.minimum_cohort, self.corrupt_fraction)
        if honest < self.minimum_survivors:
            raise ConfigError(
                f"a cohort of minimum_cohort {self.minimum_cohort} has {honest} honest devices, fewer than "
                f"minimum_survivors {self.minimum_survivors}: lower minimum_survivors, or raise minimum_cohort",
                about="policy.minimum_survivors",
                value=self.minimum_survivors,
            )

    def check(self, spec: SessionSpec, cohort: int) -> None:
        """Return if this device may take part in a session of ``spec`` with ``cohort`` devices.

        Raises:
            ProtocolError: It may not; the error is about the first field that breaks the policy.
        """
        _require("offer", self._offer_rules(spec, cohort))

    def check_revocations(self, revoked: RevocationList | None, at: datetime) -> None:
        """Return if this device may rely at time ``at`` on the revocation list that it has, or on having none.

        Raises:
            ProtocolError: The list is missing, too old, or past its end: the coordinator withholds a newer one.
        """
        if revoked is None:
            missing = "the coordinator sent no revocation list, and this device's policy requires one"
            _require("offer", ((not self.revocation_days, "revocations", None, missing),))
            return
        try:
            revoked.require_fresh(at, timedelta(self.revocation_days) if self.revocation_days else None)
        except TrustError as error:
            message, about = f"offer refused: {error}", f"offer.{error.about}"
            raise ProtocolError(message, COORDINATOR, about=about, value=revoked.number) from None

    def check_roster(self, spec: SessionSpec, cohort: int, roster: int) -> None:
        """Return if the graph is secure with ``roster`` of the ``cohort`` devices, all corrupt ones among them.

        Raises:
            ProtocolError: It is not.
        """
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
        combined = (left >= honest, "combined", left, few)
        if degree >= present - 1:
            text = f"threshold {threshold} of {present} does not withstand {corrupt} corrupt devices"
            return (2 * threshold > present + corrupt, "threshold", threshold, text), combined
        bits = graph.SIGMA + (graph.GRINDING if spec.adversary is Adversary.ACTIVE else 0)
        sparse = f"degree {degree} is not the complete graph of {present} devices"
        weak = f"degree {degree} and threshold {threshold} of {present} devices do not withstand {corrupt} corrupt ones"
        return (
            (cohort > self.complete_up_to, "degree", degree, sparse),
            (graph.is_secure(present, corrupt, degree, threshold, bits), "graph", (degree, threshold), weak),
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
            (cohort >= self.minimum_cohort, "cohort", cohort, small),
            (
                spec.threshold <= cohort,
                "threshold",
                spec.threshold,
                f"threshold {spec.threshold} is above the cohort of {cohort}",
            ),
            (spec.vector.max_clients >= cohort, "max_clients", cohort, f"a sum of {cohort} could wrap the ring"),
            *self._graph_rules(spec, cohort, cohort),
            (honest >= self.minimum_survivors, "minimum_survivors", spec.smallest_sum, few),
            (adversary is not Adversary.ACTIVE or 2 * quorum > cohort + corrupt, "quorum", quorum, two_groups),
            (in_ring, "ring_bits", bits, f"ring of {bits} bits is outside this device's limits"),
            (adversary in self.adversaries, "adversary", adversary, model),
            (base in self.known_bases, "base_digest", base, f"base {base[:12]} is not on this device"),
            (spec.weight_cap <= self.maximum_weight, "weight_cap", spec.weight_cap, weight),
            (spec.rounds <= self.maximum_rounds, "rounds", spec.rounds, rounds),
            *self._noise_rules(spec, corrupt),
        )

    def _noise_rules(self, spec: SessionSpec, corrupt: int) -> tuple[_Rule, ...]:
        counts = self.minimum_evaluation_noise if spec.vector.segments[0].name == COUNTS else 0.0
        found, least = spec.noise_multiplier(corrupt), max(self.minimum_noise_multiplier, counts)
        demanded = least > 0 or self.maximum_epsilon > 0
        bare = "the session adds no noise to its sums, and this device's policy demands it"
        little = f"noise multiplier {found:.3g}, without {corrupt} corrupt devices, is below this device's {least:g}"
        return (
            (spec.privacy is not None or not demanded, "privacy", None, bare),
            (found >= least, "noise_multiplier", found, little),
        )


def _require(what: str, rules: tuple[_Rule, ...]) -> None:
    for holds, field, value, reason in rules:
        if not holds:
            raise ProtocolError(f"{what} refused: {reason}", COORDINATOR, about=f"{what}.{field}", value=value)
