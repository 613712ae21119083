"""What a device demands of an offer before it takes part. Its own file, never the coordinator's word.

The defaults are the safe ones; the coordinator cannot change them and each weaker value is the owner's choice.
"""

from dataclasses import dataclass

from aggregation.errors import ConfigError, ProtocolError
from aggregation.spec import CORRUPT_FRACTION, Adversary, SessionSpec, corrupt_count


@dataclass(frozen=True, slots=True)
class Policy:
    """Limits on what this device joins.

    Args:
        known_bases: SHA-256 of the frozen bases that this device holds, in hex. Empty: it joins nothing.
        minimum_cohort: Fewest devices in a cohort.
        minimum_ring_bits: Fewest bits of a ring element.
        maximum_ring_bits: Most bits of a ring element.
        adversaries: Adversary models that this device is content with.
        corrupt_fraction: Share of the cohort that may side with the coordinator; the threshold must withstand it.
        maximum_weight: Largest weight cap, in examples.
        maximum_rounds: Most rounds in a session.

    Raises:
        ConfigError: A value is out of range.
    """

    known_bases: frozenset[str] = frozenset()
    minimum_cohort: int = 8
    minimum_ring_bits: int = 16
    maximum_ring_bits: int = 64
    adversaries: frozenset[Adversary] = frozenset({Adversary.ACTIVE})
    corrupt_fraction: float = CORRUPT_FRACTION
    maximum_weight: int = 65_536
    maximum_rounds: int = 64

    def __post_init__(self) -> None:
        if self.minimum_cohort < 3:
            raise ConfigError(
                f"minimum_cohort {self.minimum_cohort} is below 3: a sum of two shows each the other's part"
            )
        if not 0 <= self.corrupt_fraction < 1:
            raise ConfigError(f"corrupt_fraction {self.corrupt_fraction} is not in [0, 1)")
        if not 1 <= self.minimum_ring_bits <= self.maximum_ring_bits <= 64:
            raise ConfigError("ring bits must be 1 <= minimum_ring_bits <= maximum_ring_bits <= 64")

    def check(self, spec: SessionSpec, cohort: int) -> None:
        """Return if this device may take part in a session of ``spec`` with ``cohort`` devices.

        Raises:
            ProtocolError: It may not; the message names the first reason.
        """
        for holds, reason in self._demands(spec, cohort):
            if not holds:
                raise ProtocolError(f"offer refused: {reason}", "coordinator")

    def _demands(self, spec: SessionSpec, cohort: int) -> tuple[tuple[bool, str], ...]:
        corrupt = corrupt_count(cohort, self.corrupt_fraction)
        bits = spec.vector.ring_bits
        return (
            (
                cohort >= self.minimum_cohort,
                f"cohort of {cohort} is below this device's minimum of {self.minimum_cohort}",
            ),
            (spec.threshold <= cohort, f"threshold {spec.threshold} is above the cohort of {cohort}"),
            (
                2 * spec.threshold > cohort + corrupt,
                f"threshold {spec.threshold} of {cohort} does not withstand {corrupt} corrupt devices",
            ),
            (spec.vector.max_clients >= cohort, f"a sum of {cohort} could wrap the ring"),
            (spec.degree >= cohort - 1, f"degree {spec.degree} is not the complete graph of {cohort} devices"),
            (spec.minimum_survivors >= spec.threshold, "minimum of survivors is below the threshold"),
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
