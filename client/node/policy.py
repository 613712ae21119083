"""The ``[policy]`` table of ``device.toml``: the limits within which a device accepts an offer and trains.

Each key is a limit of ``adapters.tasklimits`` or ``client.training.limits``, or of ``aggregation.policy`` with its
default. Reading refuses unknown keys, and limits that protect nobody.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from aggregation.errors import ConfigError
from aggregation.policy import MAX_REPEATS, Policy
from aggregation.spec import Adversary
from client.training.limits import TrainingLimits

SAFE = Policy()
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class PolicySettings(TrainingLimits):
    """``[policy]``. The defaults are safe; docs/reference/device-policy.md says what weaker values cost."""

    known_bases: list[_Digest] = Field(
        default=[],
        description="SHA-256 of the frozen bases to train on, in hex; if empty, the one that this device has",
    )
    minimum_cohort: int = Field(default=SAFE.minimum_cohort, ge=3, description="fewest devices in a cohort")
    minimum_survivors: int = Field(
        default=SAFE.minimum_survivors,
        ge=2,
        description="fewest honest devices in a sum, this one included: the session's minimum of survivors, less the "
        "corrupt devices of the cohort; and fewest in a combination of sums from one adapter",
    )
    minimum_ring_bits: int = Field(
        default=SAFE.minimum_ring_bits, ge=1, le=64, description="fewest bits of an element of the masked vector"
    )
    maximum_ring_bits: int = Field(
        default=SAFE.maximum_ring_bits, ge=1, le=64, description="most bits of an element of the masked vector"
    )
    adversaries: list[Literal["active", "honest-but-curious"]] = Field(
        default=[adversary.value for adversary in SAFE.adversaries],
        min_length=1,
        description='adversary models that a session may assume: "active", a coordinator that may send anything, or '
        'also "honest-but-curious", one that follows the protocol',
    )
    corrupt_fraction: float = Field(
        default=SAFE.corrupt_fraction,
        ge=0,
        lt=1,
        description="fraction of the cohort that may collude with the coordinator; a session must withstand it",
    )
    complete_up_to: int = Field(
        default=SAFE.complete_up_to,
        ge=3,
        description="largest cohort, in devices, that must use the complete graph",
    )
    maximum_weight: int = Field(
        default=SAFE.maximum_weight, ge=1, description="largest weight of one device in the mean, in examples"
    )
    maximum_rounds: int = Field(default=SAFE.maximum_rounds, ge=1, description="most rounds in a session")
    maximum_repeats: int = Field(
        default=SAFE.maximum_repeats,
        ge=0,
        le=MAX_REPEATS,
        description="most sums from an adapter for which the device reveals shares after the first one; all are over "
        "the same devices, less those that were revoked since",
    )
    minimum_movement: float = Field(
        default=SAFE.minimum_movement,
        ge=0,
        le=1000,
        description="without noise: distance of an adapter from those of earlier sums below which the device helps to "
        "a sum over the same devices only, as a share of the longest step that the task's optimizer can make",
    )
    minimum_noise_multiplier: float = Field(
        default=SAFE.minimum_noise_multiplier,
        ge=0,
        le=1000,
        description="least noise of a session: its standard deviation in the smallest sum of a round, from honest "
        "devices, in clip norms; above 0, sessions without noise are refused",
    )
    minimum_evaluation_noise: float = Field(
        default=SAFE.minimum_evaluation_noise,
        gt=0,
        le=1000,
        description="least noise of a session that counts the right answers of releases, as minimum_noise_multiplier: "
        "nobody can tell a device how many others have its release, so that an exact sum could be its own counts",
    )
    maximum_epsilon: float = Field(
        default=SAFE.maximum_epsilon,
        ge=0,
        description="most that all contributions of this device together may reveal, as the epsilon of differential "
        "privacy for delta; above 0, sessions without noise are refused, and so is a plan that exceeds it; 0: no limit",
    )
    delta: float = Field(default=SAFE.delta, gt=0, lt=1, description="probability for which maximum_epsilon is stated")
    demand_proofs: bool = Field(
        default=SAFE.demand_proofs,
        description="take part again only if the coordinator proves that its log extends what this device saw and "
        "contains what it did",
    )
    revocation_days: int = Field(
        default=SAFE.revocation_days,
        ge=0,
        le=36_500,
        description="greatest age of the authority's revocation list, in days; 0: no list is demanded, and an existing "
        "one is used until it expires",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            self.policy("0" * 64)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def policy(self, base_digest: str) -> Policy:
        """The policy of a device that has the base of this digest.

        Raises:
            ConfigError: A limit is out of range, or contradicts another.
        """
        bases = {base_digest} & set(self.known_bases) if self.known_bases else {base_digest}
        adversaries = frozenset(Adversary(name) for name in self.adversaries)
        limits = self.model_dump(exclude={"known_bases", "adversaries", *TrainingLimits.model_fields})
        return Policy(known_bases=frozenset(bases), adversaries=adversaries, **limits)
