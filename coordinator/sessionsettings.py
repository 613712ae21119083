"""The settings of secure aggregation and of its noise, and the parameters of a session that follow from them."""

import math
from functools import partial
from typing import Literal, Self

from pydantic import Field, model_validator

from adapters import taskkinds
from adapters.layout import Layout
from adapters.settings import Settings
from adapters.task import LEAST_RING_BITS
from adapters.taskkinds import AnyTask, updates_spec
from aggregation import graph
from aggregation.errors import ConfigError
from aggregation.graph import GraphParameters
from aggregation.messages import MAX_COHORT
from aggregation.privacy.accounting import Mechanism
from aggregation.spec import CORRUPT_FRACTION, Adversary, Grouping, Privacy, SessionSpec
from coordinator.combination import Combination, Median, TrimmedMean


class PrivacySettings(Settings):
    """Differential privacy: noise that each device adds, and what all sums together may say about one device."""

    mechanism: Literal["none", "skellam", "discrete-gaussian"] = Field(
        default="none",
        description="noise that each device adds to its update: skellam, discrete-gaussian or none; with noise, every "
        "device has the same weight, and sums have no metrics",
    )
    epsilon: float = Field(
        default=0.0,
        ge=0,
        description="epsilon of all rounds together, for one device: the noise is calibrated to it, and the run ends "
        "before it is exceeded; 0: noise_multiplier is given instead",
    )
    delta: float = Field(default=1e-6, gt=0, lt=1, description="delta for which epsilon is stated")
    noise_multiplier: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="standard deviation of the noise of the honest devices in the smallest sum of a round, in clip "
        "norms; 0: calibrated to epsilon",
    )

    @model_validator(mode="after")
    def _names_the_noise(self) -> Self:
        given = (self.epsilon > 0) + (self.noise_multiplier > 0)
        if given != (self.mechanism != "none"):
            raise ValueError(
                "privacy takes a mechanism with epsilon or noise_multiplier, one of the two, or none of the three"
            )
        return self

    @property
    def noisy(self) -> bool:
        return self.mechanism != "none"


class Aggregation(Settings):
    """Secure aggregation: what a session is secure against, and the bounds of an update."""

    adversary: Literal["active", "honest-but-curious"] = Field(
        default="active",
        description="what a corrupt coordinator may do: active (anything) or honest-but-curious; a device's policy may "
        "refuse the latter",
    )
    session_rounds: int = Field(default=4, ge=1, le=64, description="rounds in a session, which has one set of keys")
    minimum_devices: int = Field(default=3, ge=3, description="fewest devices of a session")
    minimum_survivors: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="share of the cohort that must survive a round, 0 to 1; never below the threshold, nor so few that "
        "sums of one adapter could be combined to fewer devices than the default policy of a device demands",
    )
    corrupt_fraction: float = Field(
        default=CORRUPT_FRACTION,
        ge=0,
        lt=1,
        description="share of the cohort that may collude with the coordinator, 0 to 1; a device's policy has its own",
    )
    dropout_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the cohort that may drop out while a session is made, and again in a round, 0 to 1; for "
        "sparse graphs",
    )
    groups: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="sums of a round: each over a group of the devices, dealt anew for each adapter, and their means "
        "are combined, so that one device spoils one of them; 1: one sum of all",
    )
    combine: Literal["median", "trimmed-mean"] = Field(
        default="median", description="how the means of the groups are combined: median or trimmed-mean"
    )
    trim: float = Field(
        default=0.2,
        gt=0,
        lt=0.5,
        description="trimmed-mean: share of the groups that is cut off at each end of a coordinate, at least one group",
    )
    clip_norm: float = Field(default=12.0, gt=0, description="largest L2 norm of a device's update, in weight units")
    weight_cap: int = Field(
        default=128,
        ge=1,
        le=65536,
        description="largest weight of one device in the mean, in examples; 1 in a federation with noise",
    )
    ring_bits: int = Field(
        default=LEAST_RING_BITS,
        ge=LEAST_RING_BITS,
        le=62,
        description="fewest bits of an element of the masked vector; a session takes more where its sums need them, as "
        "those of an analytic head and those with noise do",
    )
    keep_masked_inputs: bool = Field(
        default=False,
        description="keep every masked update in the transcript, so that whoever reads it can recompute the sums, with "
        "the exact number of examples; takes devices × rounds × upload of disk space",
    )

    def spec(
        self,
        devices: int,
        layout: Layout,
        base_digest: str,
        rounds: int,
        task: AnyTask | None = None,
        *,
        clip_norm: float | None = None,
        privacy: PrivacySettings | None = None,
        noise_multiplier: float = 0.0,
    ) -> SessionSpec:
        """The parameters of a session with a cohort of ``devices``.

        Args:
            devices: Of the cohort.
            layout: Of the adapter.
            base_digest: Of the frozen base.
            rounds: Of the session.
            task: Of the session's rounds; None: one in which updates of all tensors are summed.
            clip_norm: If not that of an update.
            privacy: Mechanism and delta of a session with noise.
            noise_multiplier: Of such a session: see ``PrivacySettings``.

        Raises:
            ConfigError: No ring can hold the sum of so many devices, or as ``masking_graph`` and ``survivors``.
        """
        chosen = self.masking_graph(devices)
        survivors, grouping = self.survivors(devices, chosen), self.grouping(devices)
        smallest = grouping.minimum if grouping else survivors
        honest = smallest - graph.count_of(devices, self.corrupt_fraction)
        noisy = privacy is not None and privacy.noisy
        if noisy and honest < 1:
            text = f"a sum of {smallest} devices has no honest one: lower corrupt_fraction"
            raise ConfigError(text, about="aggregation.corrupt_fraction", value=self.corrupt_fraction)
        norm, cap = clip_norm or self.clip_norm, 1 if noisy else self.weight_cap
        noise = noise_multiplier * norm / math.sqrt(honest) if noisy else 0.0
        vector_spec = partial(updates_spec if task is None else partial(taskkinds.vector_spec, task), noise=noise)
        least = taskkinds.least_ring_bits(
            task, layout, clip_norm=norm, weight_cap=cap, max_clients=devices, noise=noise
        )
        bits = max(self.ring_bits, least)
        return SessionSpec(
            rounds=rounds,
            threshold=chosen.threshold,
            minimum_survivors=survivors,
            degree=chosen.degree,
            vector=vector_spec(layout, clip_norm=norm, weight_cap=cap, ring_bits=bits, max_clients=devices),
            clip_norm=norm,
            weight_cap=cap,
            privacy=Privacy(Mechanism(privacy.mechanism), honest, privacy.delta) if privacy and noisy else None,
            base_digest=base_digest,
            layout_digest=layout.digest,
            adversary=Adversary(self.adversary),
            grouping=grouping,
        )

    @property
    def combination(self) -> Combination | None:
        """How the means of groups are combined; None if a round has one sum."""
        if self.groups == 1:
            return None
        return Median() if self.combine == "median" else TrimmedMean(self.trim)

    def grouping(self, devices: int) -> Grouping | None:
        """The groups of a session with a cohort of ``devices``; None if a round has one sum.

        All corrupt devices may be in one group, and a sum must have as many honest ones as devices demand by default.

        Raises:
            ConfigError: The groups would be too small.
        """
        if self.groups == 1:
            return None
        size, minimum = devices // self.groups, self._group_minimum(devices)
        if minimum > size:
            corrupt = graph.count_of(devices, self.corrupt_fraction)
            text = f"{self.groups} groups of {devices} devices have {size} each, and a sum needs {minimum}, because "
            text += f"{corrupt} may be corrupt: take at most {devices // minimum} groups, or more devices"
            raise ConfigError(text, about="aggregation.groups", value=self.groups)
        return Grouping(self.groups, minimum)

    def _group_minimum(self, devices: int) -> int:
        corrupt = graph.count_of(devices, self.corrupt_fraction)
        return max(corrupt + graph.demanded(devices), round(self.minimum_survivors * (devices // self.groups)))

    @property
    def fewest_devices(self) -> int:
        """Fewest devices of a session: those of the settings, or as many as its groups take.

        >>> Aggregation().fewest_devices, Aggregation(groups=3).fewest_devices
        (3, 18)
        """
        counts = range(self.minimum_devices, MAX_COHORT)
        return next((n for n in counts if self.groups == 1 or self._group_minimum(n) <= n // self.groups), MAX_COHORT)

    def survivors(self, devices: int, chosen: GraphParameters) -> int:
        """Fewest survivors of a round in a cohort of ``devices`` with the masking graph ``chosen``.

        Raises:
            ConfigError: Sums over all devices on this graph could be combined to a few devices.
        """
        # In an active session so many that no two groups of survivors can sign different survivor sets.
        signed = graph.quorum(devices, self.corrupt_fraction) if self.adversary == Adversary.ACTIVE.value else 0
        corrupt = graph.count_of(devices, self.corrupt_fraction)
        for count in range(max(chosen.threshold, signed, round(self.minimum_survivors * devices)), devices + 1):
            if graph.left_over(devices, corrupt, *chosen, count) >= graph.demanded(devices):
                return count
        raise ConfigError(
            f"sums of {devices} devices could be combined to a few of them: lower corrupt_fraction",
            about="aggregation.corrupt_fraction",
            value=self.corrupt_fraction,
        )

    def masking_graph(self, devices: int) -> GraphParameters:
        """Neighbors of a device, and shares that reconstruct its secrets, in a cohort of ``devices``.

        A sparse graph must still be secure on the roster, which lacks the dropouts before it and no corrupt device.
        Where that roster would have at most ``graph.COMPLETE_UP_TO`` devices, the graph is complete.

        >>> Aggregation().masking_graph(10)
        GraphParameters(degree=9, threshold=7)

        Raises:
            ConfigError: No graph on so many devices is secure against so many corrupt devices and dropouts.
        """
        corrupt, gone = (graph.count_of(devices, share) for share in (self.corrupt_fraction, self.dropout_fraction))
        if devices - gone <= graph.COMPLETE_UP_TO:
            return GraphParameters(devices - 1, graph.least_threshold(devices, self.corrupt_fraction))
        bits = graph.SIGMA + (graph.GRINDING if self.adversary == Adversary.ACTIVE.value else 0)
        smallest = devices - gone
        for count in range(smallest, devices + 1):
            found = graph.graph_parameters(count, corrupt / count, gone / count, bits=bits)
            if all(graph.is_secure(present, corrupt, *found, bits) for present in (smallest, devices)):
                return found
        raise ConfigError(
            f"no graph on {devices} devices is secure against {corrupt} corrupt devices and {gone} dropouts: "
            "lower corrupt_fraction or dropout_fraction",
            about="aggregation.corrupt_fraction",
            value=self.corrupt_fraction,
        )
