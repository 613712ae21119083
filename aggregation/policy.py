"""What a device demands of an offer before it takes part. Its own file, never the coordinator's word.

The defaults are the safe ones; the coordinator cannot change them and each weaker value is the owner's choice.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta

from aggregation import graph
from aggregation.errors import ConfigError, ProtocolError, TrustError
from aggregation.pki.revocation import RevocationList
from aggregation.spec import CORRUPT_FRACTION, Adversary, SessionSpec


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits on what this device joins.

    Args:
        known_bases: SHA-256 of the frozen bases that this device holds, in hex. Empty: it joins nothing.
        minimum_cohort: Fewest devices in a cohort.
        minimum_ring_bits: Fewest bits of a ring element.
        maximum_ring_bits: Most bits of a ring element.
        adversaries: Adversary models that this device is content with.
        corrupt_fraction: Share of the cohort that may side with the coordinator; threshold and graph must withstand it.
        complete_up_to: Largest cohort in which every device must be every other's neighbour.
        maximum_weight: Largest weight cap, in examples.
        maximum_rounds: Most rounds in a session.
        demand_proofs: Take part again only if the coordinator proves what its log holds (``receipts``).
        revocation_days: Greatest age of the authority's revocation list, in days. 0: none is demanded, and one that the
            device has counts until its own end.

    Raises:
        ConfigError: A value is out of range.
    """

    known_bases: frozenset[str] = frozenset()
    minimum_cohort: int = 8
    minimum_ring_bits: int = 16
    maximum_ring_bits: int = 64
    adversaries: frozenset[Adversary] = frozenset({Adversary.ACTIVE})
    corrupt_fraction: float = CORRUPT_FRACTION
    complete_up_to: int = graph.COMPLETE_UP_TO
    maximum_weight: int = 65_536
    maximum_rounds: int = 64
    demand_proofs: bool = True
    revocation_days: int = 0

    def __post_init__(self) -> None:
        if self.minimum_cohort < 3:
            raise ConfigError(
                f"minimum_cohort {self.minimum_cohort} is below 3: a sum of two shows each the other's part"
            )
        if not 0 <= self.corrupt_fraction < 1:
            raise ConfigError(f"corrupt_fraction {self.corrupt_fraction} is not in [0, 1)")
        if not 1 <= self.minimum_ring_bits <= self.maximum_ring_bits <= 64:
            raise ConfigError("ring bits must be 1 <= minimum_ring_bits <= maximum_ring_bits <= 64")
        if self.revocation_days < 0:
            raise ConfigError(f"revocation_days {self.revocation_days} is below 0")

    def check(self, spec: SessionSpec, cohort: int) -> None:
        """Return if this device may take part in a session of ``spec`` with ``cohort`` devices.

        Raises:
            ProtocolError: It may not; the message names the first reason.
        """
        _require("offer", self._demands(spec, cohort))

    def check_revocations(self, revoked: RevocationList | None, at: datetime) -> None:
        """Return if this device may go by the revocation list that it has at this time, or by having none.

        Raises:
            ProtocolError: The list is missing, too old, or past its end: the coordinator keeps a newer one back.
        """
        if revoked is None:
            _require("offer", ((not self.revocation_days, "no revocation list came, and this device demands one"),))
            return
        try:
            revoked.require_fresh(at, timedelta(self.revocation_days) if self.revocation_days else None)
        except TrustError as error:
            raise ProtocolError(f"offer refused: {error}", "coordinator") from None

    def check_roster(self, spec: SessionSpec, cohort: int, roster: int) -> None:
        """Return if the graph holds with ``roster`` of the ``cohort`` devices, all corrupt ones among them.

        Raises:
            ProtocolError: It does not.
        """
        _require("roster", self._graph_demands(spec, cohort, roster))

    def _graph_demands(self, spec: SessionSpec, cohort: int, present: int) -> tuple[tuple[bool, str], ...]:
        """No device's two secrets can both be opened, no part of the sum alone: docs/explanation/threat-model.md."""
        corrupt = graph.count_of(cohort, self.corrupt_fraction)
        if spec.degree >= present - 1:
            holds = 2 * spec.threshold > present + corrupt
            return ((holds, f"threshold {spec.threshold} of {present} does not withstand {corrupt} corrupt devices"),)
        bits = graph.SIGMA + (graph.GRINDING if spec.adversary is Adversary.ACTIVE else 0)
        return (
            (cohort > self.complete_up_to, f"degree {spec.degree} is not the complete graph of {present} devices"),
            (
                graph.is_secure(present, corrupt, spec.degree, spec.threshold, bits),
                f"degree {spec.degree} and threshold {spec.threshold} of {present} devices do not withstand "
                f"{corrupt} corrupt ones",
            ),
        )

    def _demands(self, spec: SessionSpec, cohort: int) -> tuple[tuple[bool, str], ...]:
        bits, corrupt = spec.vector.ring_bits, graph.count_of(cohort, self.corrupt_fraction)
        return (
            (
                cohort >= self.minimum_cohort,
                f"cohort of {cohort} is below this device's minimum of {self.minimum_cohort}",
            ),
            (spec.threshold <= cohort, f"threshold {spec.threshold} is above the cohort of {cohort}"),
            (spec.vector.max_clients >= cohort, f"a sum of {cohort} could wrap the ring"),
            *self._graph_demands(spec, cohort, cohort),
            (
                spec.adversary is not Adversary.ACTIVE or 2 * spec.quorum > cohort + corrupt,
                f"{spec.quorum} of {cohort} devices agree on the survivors: two groups could agree on different ones",
            ),
            (
                self.minimum_ring_bits <= bits <= self.maximum_ring_bits,
                f"ring of {bits} bits is outside this device's limits",
            ),
            (
                spec.adversary in self.adversaries,
                f"adversary model {spec.adversary.value} is not one this device accepts",
            ),
            (spec.base_digest in self.known_bases, f"base {spec.base_digest[:12]} is not on this device"),
            (spec.weight_cap <= self.maximum_weight, f"weight cap {spec.weight_cap} is above {self.maximum_weight}"),
            (spec.rounds <= self.maximum_rounds, f"session of {spec.rounds} rounds is above {self.maximum_rounds}"),
        )


def _require(what: str, demands: tuple[tuple[bool, str], ...]) -> None:
    for holds, reason in demands:
        if not holds:
            raise ProtocolError(f"{what} refused: {reason}", "coordinator")
