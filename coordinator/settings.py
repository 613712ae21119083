"""The settings of a federation, ``federation.toml``, and the parameters of a session that follow from them. The table
of each kind of round is in the kind's module."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from itertools import combinations
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from aggregation import graph
from aggregation.errors import ConfigError
from aggregation.graph import GraphParameters
from aggregation.messages import MAX_COHORT
from aggregation.privacy.accounting import NOTHING, Mechanism, calibrated
from aggregation.spec import CORRUPT_FRACTION, Adversary, Grouping, Privacy, SessionSpec
from edgeadapt.formats.layout import Layout
from edgeadapt.formats.manifest import VersionManifest
from edgeadapt.formats.peftconfig import PeftConfig
from edgeadapt.formats.settings import Settings
from edgeadapt.rounds.analytic import Analytic
from edgeadapt.rounds.combination import Combination, Median, TrimmedMean
from edgeadapt.rounds.discovery import DiscoveryRounds, DiscoveryTask
from edgeadapt.rounds.evaluation import EvaluationRounds, EvaluationTask
from edgeadapt.rounds.federatedmethods import METHODS
from edgeadapt.rounds.observation import ObservationRounds, ObservationTask
from edgeadapt.rounds.optimizer import OPTIMIZERS, ServerOptimizer, made, numbers_of
from edgeadapt.rounds.roundtask import KindSettings, RoundOf, RoundTask
from edgeadapt.rounds.sums import LEAST_RING_BITS, Bounds
from edgeadapt.rounds.task import Task, Training

ADDRESS = r"(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}"  # HOST:PORT
SETTINGS = "federation.toml"  # in the coordinator's state directory
UPDATES = Training().task(RoundOf(PeftConfig.lora(), (), 0, METHODS["fedit"], False))  # shares all tensors


class PrivacySettings(Settings):
    """Differential privacy: noise that each device adds, and what all sums together may say about one device."""

    mechanism: Literal["none", "skellam", "discrete-gaussian"] = "none"
    """noise that each device adds to its update: skellam, discrete-gaussian or none; with noise, every device has the
    same weight, and sums have no metrics"""
    epsilon: float = Field(default=0.0, ge=0)
    """epsilon of all rounds together, for one device: the noise is calibrated to it, and the run ends before it is
    exceeded; 0: noise_multiplier is given instead"""
    delta: float = Field(default=1e-6, gt=0, lt=1)
    """delta for which epsilon is stated"""
    noise_multiplier: float = Field(default=0.0, ge=0, le=1000)
    """standard deviation of the noise of the honest devices in the smallest sum of a round, in clip norms; 0:
    calibrated to epsilon"""

    @model_validator(mode="after")
    def _names_the_noise(self) -> Self:
        noises = (self.epsilon > 0) + (self.noise_multiplier > 0)
        if noises != (self.mechanism != "none"):
            reason = "privacy takes a mechanism with epsilon or noise_multiplier, one of the two, or none of the three"
            raise ValueError(reason)
        return self

    @property
    def noisy(self) -> bool:
        return self.mechanism != "none"


class Aggregation(Settings):
    """Secure aggregation: what a session is secure against, and the bounds of an update."""

    adversary: Literal["active", "honest-but-curious"] = "active"
    """what a corrupt coordinator may do: active (anything) or honest-but-curious; a device's policy may refuse the
    latter"""
    session_rounds: int = Field(default=4, ge=1, le=64)
    """rounds in a session, which has one set of keys"""
    minimum_devices: int = Field(default=3, ge=3)
    """fewest devices of a session"""
    minimum_survivors: float = Field(default=0.5, gt=0, le=1)
    """share of the cohort that must survive a round, 0 to 1; never below the threshold, nor so few that sums of one
    adapter could be combined to fewer devices than the default policy of a device demands"""
    corrupt_fraction: float = Field(default=CORRUPT_FRACTION, ge=0, lt=1)
    """share of the cohort that may collude with the coordinator, 0 to 1; a device's policy has its own"""
    dropout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """share of the cohort that may drop out while a session is made, and again in a round, 0 to 1; for sparse graphs"""
    groups: int = Field(default=1, ge=1, le=1000)
    """sums of a round: each over a group of the devices, dealt anew for each adapter, and their means are combined, so
    that one device spoils one of them; 1: one sum of all"""
    combine: Literal["median", "trimmed-mean"] = "median"
    """how the means of the groups are combined: median or trimmed-mean"""
    trim: float = Field(default=0.2, gt=0, lt=0.5)
    """trimmed-mean: share of the groups that is cut off at each end of a coordinate, at least one group"""
    clip_norm: float = Field(default=12.0, gt=0)
    """largest L2 norm of a device's update, in weight units"""
    weight_cap: int = Field(default=128, ge=1, le=65536)
    """largest weight of one device in the mean, in examples; 1 in a federation with noise"""
    ring_bits: int = Field(default=LEAST_RING_BITS, ge=LEAST_RING_BITS, le=62)
    """fewest bits of an element of the masked vector; a session takes more where its sums need them, as those of an
    analytic head and those with noise do"""
    keep_masked_inputs: bool = False
    """keep every masked update in the transcript, so that whoever reads it can recompute the sums, with the exact
    number of examples; takes devices × rounds × upload of disk space"""

    def spec(
        self,
        devices: int,
        layout: Layout,
        base_digest: str,
        rounds: int,
        task: RoundTask = UPDATES,
        *,
        clip_norm: float | None = None,
        privacy: PrivacySettings | None = None,
    ) -> SessionSpec:
        """Set the parameters of a session with a cohort of ``devices``; ``clip_norm`` is by default that of an update.
        Raises ConfigError: no ring can hold the sum of all devices, or as ``masking_graph`` and ``survivors``."""
        chosen = self.masking_graph(devices)
        survivors, grouping = self.survivors(devices, chosen), self.grouping(devices)
        noise = privacy if privacy is not None and privacy.noisy else None
        smallest = grouping.minimum if grouping else survivors
        honest = smallest - graph.count_of(devices, self.corrupt_fraction)
        if noise and honest < 1:
            text = f"a sum of {smallest} devices has no honest one: lower corrupt_fraction"
            raise ConfigError(text, about="aggregation.corrupt_fraction")
        norm, cap = clip_norm or self.clip_norm, 1 if noise else self.weight_cap
        deviation = noise.noise_multiplier * norm / math.sqrt(honest) if noise else 0.0
        bounds = Bounds(norm, cap, self.ring_bits, devices, deviation)
        bounds = replace(bounds, ring_bits=max(self.ring_bits, task.ring_bits(layout, bounds)))
        return SessionSpec(
            rounds=rounds,
            threshold=chosen.threshold,
            minimum_survivors=survivors,
            degree=chosen.degree,
            vector=task.vector(layout, bounds),
            clip_norm=norm,
            weight_cap=cap,
            privacy=Privacy(Mechanism(noise.mechanism), honest, noise.delta) if noise else None,
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
        """Split a cohort of ``devices`` into groups; None if a round has one sum. All corrupt devices may be in one
        group, and a sum must have as many honest ones as devices demand by default. Raises ConfigError: the groups
        would be too small."""
        if self.groups == 1:
            return None
        size, minimum = devices // self.groups, self._group_minimum(devices)
        if minimum > size:
            corrupt = graph.count_of(devices, self.corrupt_fraction)
            text = f"{self.groups} groups of {devices} devices have {size} each, and a sum needs {minimum}, because "
            text += f"{corrupt} may be corrupt: take at most {devices // minimum} groups, or more devices"
            raise ConfigError(text, about="aggregation.groups")
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
        """Fewest survivors of a round in a cohort of ``devices`` with the masking graph ``chosen``. Raises ConfigError:
        sums over all devices on this graph could be combined to a few devices."""
        # In an active session enough that no two groups of survivors can sign different survivor sets.
        signed = graph.quorum(devices, self.corrupt_fraction) if self.adversary == Adversary.ACTIVE.value else 0
        corrupt = graph.count_of(devices, self.corrupt_fraction)
        for count in range(max(chosen.threshold, signed, round(self.minimum_survivors * devices)), devices + 1):
            if graph.left_over(devices, corrupt, *chosen, count) >= graph.demanded(devices):
                return count
        reason = f"sums of {devices} devices could be combined to a few of them: lower corrupt_fraction"
        raise ConfigError(reason, about="aggregation.corrupt_fraction")

    def masking_graph(self, devices: int) -> GraphParameters:
        """Choose the neighbors of a device and the shares that reconstruct its secrets, in a cohort of ``devices``.

        A sparse graph must still be secure on the roster, which lacks the dropouts before it and no corrupt device.
        Where that roster would have at most ``graph.COMPLETE_UP_TO`` devices, the graph is complete. Raises
        ConfigError: no graph on the cohort is secure against its corrupt devices and dropouts.

        >>> Aggregation().masking_graph(10)
        GraphParameters(degree=9, threshold=7)
        """
        corrupt, gone = (graph.count_of(devices, share) for share in (self.corrupt_fraction, self.dropout_fraction))
        if devices - gone <= graph.COMPLETE_UP_TO:
            return GraphParameters(devices - 1, graph.least_threshold(devices, self.corrupt_fraction))
        bits = graph.SIGMA + (graph.GRINDING if self.adversary == Adversary.ACTIVE.value else 0)
        smallest = devices - gone
        for count in range(smallest, devices + 1):
            parameters = graph.graph_parameters(count, corrupt / count, gone / count, bits=bits)
            if all(graph.is_secure(present, corrupt, *parameters, bits) for present in (smallest, devices)):
                return parameters
        reason = f"no graph on {devices} devices is secure against {corrupt} corrupt devices and {gone} dropouts: "
        reason += "lower corrupt_fraction or dropout_fraction"
        raise ConfigError(reason, about="aggregation.corrupt_fraction")


class Server(Settings):
    """The server's step, on the mean of the devices' updates."""

    optimizer: Annotated[str, AfterValidator(OPTIMIZERS.require)] = "fedavg"
    """rule of the server's step: fedavg, fedavgm, fedadam, fedyogi, or one that an installed package adds
    (docs/how-to/extend.md)"""
    learning_rate: float = Field(default=1.0, gt=0)
    """learning rate of the server's step"""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """fedavgm: the momentum; fedadam, fedyogi: decay of the first moment"""
    beta2: float = Field(default=0.99, ge=0, lt=1)
    """fedadam, fedyogi: decay of the second moment"""
    tau: float = Field(default=1e-3, gt=0)
    """fedadam, fedyogi: added to the root of the second moment, in weight units"""
    numbers: dict[str, float] = Field(default_factory=dict)
    """numbers of a rule that a package adds, by name, before those above"""

    @model_validator(mode="after")
    def _has_the_numbers(self) -> Self:
        try:
            if self.numbers:
                self.rule()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self

    def rule(self) -> ServerOptimizer:
        """Make the optimizer. Raises ConfigError: it cannot be imported, or does not have such numbers."""
        named = {"momentum": self.beta1, **self.model_dump(include={"learning_rate", "beta1", "beta2", "tau"})}
        wanted = numbers_of(OPTIMIZERS.find(self.optimizer))
        return made(self.optimizer, {name: named[name] for name in wanted if name in named} | self.numbers)


class CohortSettings(Settings):
    """Which devices a session has, and how long the others wait for the slowest of them."""

    size: int = Field(default=0, ge=0, le=MAX_COHORT)
    """devices of a session, chosen at random; 0: all that are there"""
    over_selection: float = Field(default=1.3, ge=1, le=100)
    """nodes that are asked to check in, as a multiple of the size; the first devices that do are taken"""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | Literal["random"] = "random"
    """chooses the nodes, the same ones in each run; random: the operating system's entropy does; in a simulation, the
    scenario's seed"""
    quorum: float = Field(default=1.0, gt=0, le=1)
    """share of the devices asked at a step after whose answers the others have the grace time left; never fewer than
    the protocol needs"""
    grace: float = Field(default=0.0, ge=0)
    """time for further answers after those of the quorum, in seconds"""

    def fewest(self, asked: int, needed: int) -> int:
        """Answers after which only the grace time is left. ``needed``: answers that the step needs.

        >>> CohortSettings(quorum=0.8).fewest(10, 3), CohortSettings(quorum=0.8).fewest(10, 9)
        (8, 9)
        """
        return max(math.ceil(self.quorum * asked), needed)


class GatewaySettings(Settings):
    """The gateway for light devices (docs/reference/gateway.md)."""

    devices: int = Field(default=4096, ge=1, le=16_384)
    """light devices that are connected at once, at most; when there are more, they take turns; each takes 90 KiB of
    memory, so that 4096 take 360 MiB; never more than a quarter of the file descriptors of the process"""
    check_ins_per_minute: float = Field(default=10_000.0, gt=0, le=1e6)
    """check-ins of light devices that the gateway lets come in a minute"""
    accepted_seconds: float = Field(default=1.0, gt=0, le=86_400)
    """time until a light device comes back that took part and made room for another, at least"""
    rejected_seconds: float = Field(default=10.0, gt=0, le=86_400)
    """time until a light device that was not admitted returns, at least; a session begins up to twice as long later
    while the gateway is full, so that those come whose turn it is"""
    client_version: str = Field(default="", pattern=r"^([0-9]{1,6}(\.[0-9]{1,6}){0,3})?$")
    """least version of edgeadapt on a light device; empty: any"""
    websocket: str = Field(default="", pattern=rf"^({ADDRESS})?$")
    """HOST:PORT at which the gateway serves browsers as well, with TLS unless HOST is loopback; empty: none are
    served"""
    origins: tuple[str, ...] = Field(default=(), max_length=64)
    """origins of pages from which browsers may take part, as https://fleet.example; those of loopback always may"""


# what may change between two rounds of a run
RELOADED = ("rounds", "interval", "deadline", "attempts", "stuck_after", "cohort")


class FederationSettings(Settings):
    """``federation.toml`` in the coordinator's state directory."""

    longest: ClassVar[int] = 2**20  # the cells of a discovery are long
    rounds: int = Field(default=10, ge=1, le=100_000)
    """rounds of training in all"""
    interval: float = Field(default=0.0, ge=0, le=31_536_000)
    """least time between a sum and the next session, in seconds: 86400, with session_rounds = 1, is a round a day"""
    deadline: float = Field(default=600.0, gt=0)
    """time that a device has for one answer, in seconds"""
    attempts: int = Field(default=20, ge=1, le=1000)
    """attempts at making a session before the run ends, and at a step of a round that too few devices answer; the
    pauses between them grow from 15 s to the deadline"""
    stuck_after: float = Field(default=900.0, gt=0, le=31_536_000)
    """time without progress after which status, dashboard and metrics say that the fleet is stuck, in seconds; longer
    than devices are away at a time, as by day where they take part at night"""
    method: Literal["fedit", "ffa", "rolora", "fedsb", "fedsa", "fedper", "fedbabu", "head"] = "fedit"
    """which parts of the adapter devices train and share (docs/reference/federated-methods.md): fedit, ffa, rolora,
    fedsb, fedsa, fedper, fedbabu or head"""
    cohort: CohortSettings = CohortSettings()
    training: Training = Training()
    analytic: Analytic = Analytic()
    evaluation: EvaluationRounds = EvaluationRounds()
    observation: ObservationRounds = ObservationRounds()
    discovery: DiscoveryRounds = DiscoveryRounds()
    server: Server = Server()
    aggregation: Aggregation = Aggregation()
    privacy: PrivacySettings = PrivacySettings()
    gateway: GatewaySettings = GatewaySettings()

    @model_validator(mode="after")
    def _takes_turns(self) -> Self:
        if len(METHODS[self.method].turns) > 1 and self.server.optimizer != "fedavg":
            raise ValueError(
                f"method {self.method} trains parts by turns, and {self.server.optimizer} would move a part in the "
                "rounds of another: take server.optimizer fedavg"
            )
        return self

    @model_validator(mode="after")
    def _has_the_rounds(self) -> Self:
        for name, table in self._others.items():
            if table.rounds > self.rounds:
                reason = f"{name}.rounds is {table.rounds}, more than the {self.rounds} rounds of the federation"
                raise ValueError(reason)
        if self.training_rounds < 0:
            names = ", ".join(f"{name}.rounds" for name in self._others)
            raise ValueError(f"{names} are together more than the {self.rounds} rounds")
        if self.evaluation.every and self.privacy.epsilon:
            raise ValueError("evaluation.every adds rounds that privacy.epsilon knows not: set a noise_multiplier")
        return self

    @model_validator(mode="after")
    def _can_have_its_groups(self) -> Self:
        bounds, groups = self.aggregation, self.aggregation.groups
        if groups == 1:
            return self
        if bounds.adversary != Adversary.ACTIVE.value:
            raise ValueError('aggregation.groups needs aggregation.adversary = "active": devices sign their groups')
        if self.analytic.rounds:
            raise ValueError("an analytic head is solved from one sum: set analytic.rounds to 0, or groups to 1")
        if self.counting_rounds:
            names = "evaluation.rounds, observation.rounds and discovery.rounds"
            raise ValueError(f"counts are one sum: set {names} to 0, or groups to 1")
        if bounds.fewest_devices == MAX_COHORT:
            raise ValueError(f"no cohort has {groups} groups with more than its corrupt devices each: take fewer")
        if (size := self.cohort.size) and size < bounds.fewest_devices:
            raise ValueError(f"{groups} groups take {bounds.fewest_devices} devices, and cohort.size is {size}")
        return self

    def changes(self, newer: "FederationSettings") -> list[str]:
        """List the keys that ``newer`` changes for the rounds to come. Raises ConfigError: the others have to stay as
        they are while a run goes on."""
        old, new = self.model_dump(), newer.model_dump()
        changed = [key for key in old if old[key] != new[key]]
        if fixed := [key for key in changed if key not in RELOADED]:
            text = f"{' and '.join(fixed)} changed, and only {', '.join(RELOADED)} may while a run goes on"
            raise ConfigError(f"{text}: stop 'up' and start it again", about=fixed[0])
        return changed

    @property
    def has_noise(self) -> bool:
        """Whether some rounds have noise: all, or those that count."""
        return self.privacy.noisy or self.counting_rounds > 0

    @property
    def counting_rounds(self) -> int:
        """How many rounds evaluate, observe or discover; one at least where evaluations are scheduled."""
        counting = self.evaluation.rounds + self.observation.rounds + self.discovery.rounds
        return counting + (self.evaluation.every > 0)

    @property
    def training_rounds(self) -> int:
        return self.rounds - sum(table.rounds for table in self._others.values())

    @property
    def _others(self) -> dict[str, Analytic | EvaluationRounds | ObservationRounds | DiscoveryRounds]:
        return {name: getattr(self, name) for name in ("analytic", "evaluation", "observation", "discovery")}

    @property
    def kinds(self) -> tuple[tuple[KindSettings, int], ...]:
        """The settings of each kind of round, and its number of rounds, in the order in which they are run."""
        others = ((table, table.rounds) for table in self._others.values())
        return (self.training, self.training_rounds), *others

    def kind_of(self, number: int) -> type[RoundTask]:
        last = 0
        for table, count in self.kinds:
            last += count
            if number <= last:
                return table.KIND
        return table.KIND

    def task_of(self, kind: type[RoundTask], manifest: VersionManifest) -> RoundTask:
        """Build the task of a round of that kind, of the adapter that ``manifest`` describes. Raises as ``task``."""
        return self._table(kind).task(self._round(manifest.peft_config, manifest.labels, manifest.version))

    def task(self, manifest: VersionManifest) -> Task:
        """Build the task of a round that trains the adapter that ``manifest`` describes. Raises ConfigError: the method
        tells LoRA's matrices apart, and the adapter is of another kind."""
        return self.training.task(self._round(manifest.peft_config, manifest.labels, manifest.version))

    def _round(self, config: PeftConfig, labels: tuple[str, ...], version: int) -> RoundOf:
        return RoundOf(config, labels, version, METHODS[self.method], self.privacy.noisy)

    def _table(self, kind: type[RoundTask]) -> KindSettings:
        return next(table for table, _ in self.kinds if table.KIND is kind)

    def rule(self, task: RoundTask) -> ServerOptimizer:
        return task.RULE or self.server.rule()

    def weight_cap(self, task: RoundTask) -> int:
        return 1 if self._privacy(type(task), 0.0).noisy else self.aggregation.weight_cap

    def clip_norm(self, task: RoundTask) -> float:
        return self._table(type(task)).bound(self.aggregation.clip_norm, self.privacy.noisy)

    def _privacy(self, kind: type[RoundTask], multiplier: float) -> PrivacySettings:
        """Set the noise of a kind's sums from the noise ``multiplier`` of all rounds of the federation."""
        if not (multiplier := self._table(kind).multiplier(multiplier)):
            return self.privacy
        mechanism = self.privacy.mechanism if self.privacy.noisy else "skellam"
        return self.privacy.model_copy(update={"mechanism": mechanism, "noise_multiplier": multiplier})

    def session_spec(
        self, devices: int, layout: Layout, base_digest: str, rounds: int, task: RoundTask = UPDATES
    ) -> SessionSpec:
        """Set the parameters of a session (``Aggregation.spec``), its noise calibrated to all rounds of the federation.
        Rounds of all kinds have the same noise multiplier, and those that count at least their own. Raises ConfigError
        as ``Aggregation.spec``, or where no noise meets the epsilon."""
        privacy = self.privacy

        def build(of: RoundTask, multiplier: float) -> SessionSpec:
            noise = self._privacy(type(of), multiplier)
            clip_norm = self.clip_norm(of)
            return self.aggregation.spec(devices, layout, base_digest, rounds, of, clip_norm=clip_norm, privacy=noise)

        def epsilon(multiplier: float) -> float:
            spent = NOTHING
            for of, count in self._rounds_of(task):
                spec = build(of, multiplier)
                spent += spec.spent(spec.minimum_survivors).times(count)
            return spent.epsilon(privacy.delta)

        if not privacy.noisy:
            return build(task, 0.0)
        return build(task, privacy.noise_multiplier or calibrated(epsilon, privacy.epsilon))

    def _rounds_of(self, task: RoundTask) -> Iterator[tuple[RoundTask, int]]:
        """Yield a task of each kind that the federation has, and its number of rounds; ``task`` is of one of them."""
        of = self._round(task.peft_config, task.labels, 0)
        for table, count in self.kinds:
            if count:
                yield (task if isinstance(task, table.KIND) else table.task(of)), count

    def evaluating(self, done: int, newest: str, previous: str) -> Self:
        return self.bare(done).with_counting("evaluation", done, {"newest": newest, "previous": previous, "every": 0.0})

    def bare(self, done: int) -> Self:
        """The settings with no round to do after those that are ``done``."""
        others = {"analytic": Analytic(), "observation": ObservationRounds()}
        for name in ("evaluation", "discovery"):
            others[name] = getattr(self, name).model_copy(update={"rounds": 0})
        return self.model_copy(update={"rounds": done, **others})

    def with_counting(
        self, kind: Literal["evaluation", "observation", "discovery"], done: int, asked: Mapping[str, Any]
    ) -> Self:
        """Add a round after those that are still to do, of a kind that counts. ``asked``: keys of its table. One of the
        kind that is still to do is replaced. Those that are done count for nothing more: a finished one, still in its
        table, would come again in the place of the new one. Raises ConfigError: a key is not valid, or there are
        groups."""
        left = [self.kind_of(number) for number in range(done + 1, self.rounds + 1)]
        kinds = {"evaluation": EvaluationTask, "observation": ObservationTask, "discovery": DiscoveryTask}
        counts = {name: sum(one is each for one in left) for name, each in kinds.items()}
        table = self.model_dump(mode="json")
        table["rounds"] = max(self.rounds, done) + (counts[kind] == 0)
        for name, count in (counts | {kind: max(1, counts[kind])}).items():
            table[name]["rounds"] = count
        table[kind] |= asked
        return self.parse(table, SETTINGS)


SERVICES = "services.toml"  # in the coordinator's state directory


def is_address(text: str) -> bool:
    """Whether ``text`` is HOST:PORT with a port from 1 to 65535.

    >>> is_address("127.0.0.1:9443"), is_address("[::1]:9443"), is_address("localhost"), is_address("host:0")
    (True, True, False, False)
    """
    return bool(re.fullmatch(ADDRESS, text)) and 0 < int(text.rpartition(":")[2]) < 2**16


def is_loopback(address: str) -> bool:
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ServiceSettings(Settings):
    """``services.toml`` in the coordinator's state directory."""

    gateway: str = ""
    """HOST:PORT at which light devices are served; a device must reach it; empty: none are"""
    superlink: str = ""
    """HOST:PORT at which Flower's SuperLink listens for SuperNodes; empty: it is not run"""
    dashboard: str = ""
    """HOST:PORT of the page for the operator, with TLS unless it is 127.0.0.1; empty: no page"""
    channels: str = ""
    """folder of a repository of channels, which the dashboard shows; empty: none"""
    ready: float = Field(default=120.0, gt=0, le=3600)
    """time in which a service must be ready, in seconds; then it is restarted"""
    stop: float = Field(default=30.0, gt=0, le=3600)
    """time that a service has to stop, in seconds; then it is killed"""
    pause: float = Field(default=60.0, ge=1, le=3600)
    """longest pause before a service that ended is started again, in seconds; pauses double from 1 s"""
    look: float = Field(default=10.0, gt=0, le=3600)
    """time between two looks whether a service that was ready still answers, in seconds"""
    failures: int = Field(default=3, ge=1, le=1000)
    """looks in a row that a service leaves without an answer before it is killed and started again"""

    @model_validator(mode="after")
    def _has_places_to_listen(self) -> Self:
        places = {"gateway": self.gateway, "superlink": self.superlink, "dashboard": self.dashboard}
        for key, address in places.items():
            if address and not is_address(address):
                raise ValueError(f"{key} is {address!r}, and not HOST:PORT with a port from 1 to 65535")
        for (first, there), (other, same) in combinations(places.items(), 2):
            if there and there == same:
                raise ValueError(f"{first} and {other} cannot both listen at {there}")
        return self
