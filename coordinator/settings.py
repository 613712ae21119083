"""The settings of a federation, ``federation.toml``: rounds, training, the server's step, secure aggregation."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from adapters.analytic import AnalyticTask
from adapters.evaluation import EvaluationTask
from adapters.layout import Layout
from adapters.manifest import VersionManifest
from adapters.peftconfig import PeftConfig
from adapters.settings import Settings
from adapters.task import UNSTABLE, OptimizerName, RateSchedule, Task, is_stable
from adapters.taskkinds import AnyTask
from aggregation.errors import ConfigError
from aggregation.messages import MAX_COHORT
from aggregation.privacy.accounting import NOTHING, calibrated
from aggregation.spec import Adversary, SessionSpec
from coordinator.methods import METHODS
from coordinator.optimizer import AnalyticHead, Evaluation, FedAdam, FedAvg, FedAvgM, FedYogi
from coordinator.optimizer import Settings as ServerOptimizer
from coordinator.sessionsettings import Aggregation, PrivacySettings

ADDRESS = r"(\[[0-9a-fA-F:]+\]|[^\s:/\[\]]+):\d{1,5}"  # HOST:PORT
SETTINGS = "federation.toml"  # in the coordinator's state directory


class Training(Settings):
    """Training on a device, in one round."""

    epochs: int = Field(default=1, ge=1, le=100, description="passes over the device's examples in a round")
    batch_size: int = Field(default=16, ge=1, le=1024, description="examples in a step")
    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="learning rate of the first step")
    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw", description="what makes a step of a gradient: adamw, or sgd"
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="momentum of sgd, 0 to 1; not used by adamw")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant",
        description="how the learning rate falls to 0 over the steps of a device in a round: constant (it does not), "
        "linear or cosine",
    )
    weight_decay: float = Field(
        default=0.0, ge=0, le=1, description="weight decay: decoupled with adamw, in the gradient with sgd"
    )
    gradient_norm: float = Field(
        default=0.0, ge=0, description="largest L2 norm of a step's gradient, to which it is clipped; 0: any"
    )
    proximal: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="weight of FedProx's term in the loss: half of it times the squared distance from the global "
        "adapter",
    )

    @model_validator(mode="after")
    def _is_stable(self) -> Self:
        if not is_stable(self.learning_rate, self.proximal, self.weight_decay):
            raise ValueError(f"training.proximal is {self.proximal:g}: {UNSTABLE}")
        return self


class Analytic(Settings):
    """Rounds of the analytic head, at the end of a federation or alone."""

    rounds: int = Field(
        default=0,
        ge=0,
        description="how many of the rounds, the last ones, fit the head by a ridge regression to a sum over all "
        "devices' embeddings, without training",
    )
    ridge: float = Field(
        default=2e-4, gt=0, le=1, description="strength of the regularization, for each example of the sum"
    )
    scale: float = Field(default=16.0, gt=0, le=1000, description="logit of a score of 1 of the regression")
    dimensions: int = Field(
        default=128,
        ge=1,
        le=2**16,
        description="with noise: coordinates of the randomly rotated embeddings that are summed; fewer have less noise",
    )
    clip_norm: float = Field(
        default=0.2, gt=0, description="with noise: largest L2 norm of the mean moments of a device's embeddings"
    )


class EvaluationRounds(Settings):
    """Rounds that count the right answers of two releases on the devices that have them, after all others."""

    rounds: int = Field(default=0, ge=0, description="how many of the rounds, the last ones, evaluate and do not train")
    newest: str = Field(
        default="", pattern="^([0-9a-f]{64})?$", description="SHA-256 of what the adapter of the newest release is"
    )
    previous: str = Field(
        default="", pattern="^([0-9a-f]{64})?$", description="SHA-256 of what the adapter of the release before is"
    )
    most: int = Field(
        default=32,
        ge=1,
        le=2**16,
        description="most held-out examples of a device that count; the noise is in proportion to it",
    )
    noise_multiplier: float = Field(
        default=1.1,
        gt=0,
        le=1000,
        description="standard deviation of the noise in the counts, as privacy.noise_multiplier, also in a federation "
        "without noise; in one that has more, that",
    )

    @model_validator(mode="after")
    def _compares_two_releases(self) -> Self:
        if self.rounds and (not self.newest or not self.previous or self.newest == self.previous):
            raise ValueError("evaluation.newest and evaluation.previous must name the adapters of two releases")
        return self


class Server(Settings):
    """The server's step, on the mean of the devices' updates."""

    optimizer: Literal["fedavg", "fedavgm", "fedadam", "fedyogi"] = Field(
        default="fedavg", description="rule of the server's step: fedavg, fedavgm, fedadam or fedyogi"
    )
    learning_rate: float = Field(default=1.0, gt=0, description="learning rate of the server's step")
    beta1: float = Field(
        default=0.9, ge=0, lt=1, description="fedavgm: the momentum; fedadam, fedyogi: decay of the first moment"
    )
    beta2: float = Field(default=0.99, ge=0, lt=1, description="fedadam, fedyogi: decay of the second moment")
    tau: float = Field(
        default=1e-3, gt=0, description="fedadam, fedyogi: added to the root of the second moment, in weight units"
    )

    def rule(self) -> ServerOptimizer:
        """The optimizer's settings as its own type."""
        match self.optimizer:
            case "fedavg":
                return FedAvg(self.learning_rate)
            case "fedavgm":
                return FedAvgM(self.learning_rate, self.beta1)
            case "fedadam":
                return FedAdam(self.learning_rate, self.beta1, self.beta2, self.tau)
            case "fedyogi":
                return FedYogi(self.learning_rate, self.beta1, self.beta2, self.tau)


class CohortSettings(Settings):
    """Which devices a session has, and how long the others wait for the slowest of them."""

    size: int = Field(
        default=0, ge=0, le=MAX_COHORT, description="devices of a session, chosen at random; 0: all that are there"
    )
    over_selection: float = Field(
        default=1.3,
        ge=1,
        le=100,
        description="nodes that are asked to check in, as a multiple of the size; the first devices that do are taken",
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | Literal["random"] = Field(
        default="random",
        description="chooses the nodes, the same ones in each run; random: the operating system's entropy does; in a "
        "simulation, the scenario's seed",
    )
    quorum: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="share of the devices asked at a step after whose answers the others have the grace time left; "
        "never fewer than the protocol needs",
    )
    grace: float = Field(
        default=0.0, ge=0, description="time for further answers after those of the quorum, in seconds"
    )

    def fewest(self, asked: int, needed: int) -> int:
        """Answers after which only the grace time is left.

        >>> CohortSettings(quorum=0.8).fewest(10, 3), CohortSettings(quorum=0.8).fewest(10, 9)
        (8, 9)

        Args:
            asked: Devices.
            needed: Answers that the step needs.
        """
        return max(math.ceil(self.quorum * asked), needed)


class GatewaySettings(Settings):
    """The gateway for light devices (docs/reference/gateway.md)."""

    check_ins_per_minute: float = Field(
        default=10_000.0, gt=0, le=1e6, description="check-ins of light devices that the gateway lets come in a minute"
    )
    accepted_seconds: float = Field(
        default=1.0, gt=0, le=86_400, description="time until a light device that took part comes back, at least"
    )
    rejected_seconds: float = Field(
        default=10.0, gt=0, le=86_400, description="time until a light device that was not admitted returns, at least"
    )
    client_version: str = Field(
        default="",
        pattern=r"^([0-9]{1,6}(\.[0-9]{1,6}){0,3})?$",
        description="least version of edgeadapt on a light device; empty: any",
    )
    websocket: str = Field(
        default="",
        pattern=rf"^({ADDRESS})?$",
        description="HOST:PORT at which the gateway serves browsers as well, with TLS unless HOST is loopback; empty: "
        "none are served",
    )
    origins: tuple[str, ...] = Field(
        default=(),
        max_length=64,
        description="origins of pages from which browsers may take part, as https://fleet.example; those of loopback "
        "always may",
    )


class FederationSettings(Settings):
    """``federation.toml`` in the coordinator's state directory."""

    rounds: int = Field(default=10, ge=1, le=100_000, description="rounds of training in all")
    deadline: float = Field(default=600.0, gt=0, description="time that a device has for one answer, in seconds")
    attempts: int = Field(
        default=20,
        ge=1,
        le=1000,
        description="attempts at making a session before the run ends, and at a step of a round that too few devices "
        "answer; the pauses between them grow from 15 s to the deadline",
    )
    method: Literal["fedit", "ffa", "rolora", "fedsb", "fedsa", "fedper", "head"] = Field(
        default="fedit",
        description="which parts of the adapter devices train and share (docs/reference/federated-methods.md): fedit, "
        "ffa, rolora, fedsb, fedsa, fedper or head",
    )
    cohort: CohortSettings = CohortSettings()
    training: Training = Training()
    analytic: Analytic = Analytic()
    evaluation: EvaluationRounds = EvaluationRounds()
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
        for name, count in (("analytic", self.analytic.rounds), ("evaluation", self.evaluation.rounds)):
            if count > self.rounds:
                raise ValueError(f"{name}.rounds is {count}, more than the {self.rounds} rounds of the federation")
        if self.training_rounds < 0:
            raise ValueError(f"analytic.rounds and evaluation.rounds are more than the {self.rounds} rounds")
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
        if self.evaluation.rounds:
            raise ValueError("an evaluation is one sum: set evaluation.rounds to 0, or groups to 1")
        if bounds.fewest_devices == MAX_COHORT:
            raise ValueError(f"no cohort has {groups} groups with more than its corrupt devices each: take fewer")
        if (size := self.cohort.size) and size < bounds.fewest_devices:
            raise ValueError(f"{groups} groups take {bounds.fewest_devices} devices, and cohort.size is {size}")
        return self

    @property
    def has_noise(self) -> bool:
        """Whether some rounds have noise: all, or those of evaluation."""
        return self.privacy.noisy or self.evaluation.rounds > 0

    def weight_cap(self, task: AnyTask | None) -> int:
        """Largest weight of one device in a session of a task."""
        return 1 if self._privacy(task).noisy else self.aggregation.weight_cap

    def _privacy(self, task: AnyTask | None) -> PrivacySettings:
        """The noise of a session of a task."""
        if self.privacy.noisy or not isinstance(task, EvaluationTask):
            return self.privacy
        return PrivacySettings(mechanism="skellam", noise_multiplier=self.evaluation.noise_multiplier)

    def session_spec(
        self, devices: int, layout: Layout, base_digest: str, rounds: int, task: AnyTask | None = None
    ) -> SessionSpec:
        """The parameters of a session, as ``Aggregation.spec``; noise is calibrated to all rounds of the federation.

        Rounds of all kinds have the same noise multiplier, and those of evaluation at least their own.

        Raises:
            ConfigError: As ``Aggregation.spec``, or no noise meets the epsilon.
        """
        privacy = self.privacy

        def build(of: AnyTask | None, multiplier: float) -> SessionSpec:
            if isinstance(of, EvaluationTask):
                multiplier = max(multiplier, self.evaluation.noise_multiplier)
            return self.aggregation.spec(
                devices,
                layout,
                base_digest,
                rounds,
                of,
                clip_norm=self.clip_norm(of),
                privacy=self._privacy(of),
                noise_multiplier=multiplier,
            )

        def epsilon(multiplier: float) -> float:
            """Of all rounds, if no more devices survive than a round must have."""
            spent = NOTHING
            for of, count in self._kinds(task):
                spec = build(of, multiplier)
                spent += spec.spent(spec.minimum_survivors).times(count)
            return spent.epsilon(privacy.delta)

        if not privacy.noisy:
            return build(task, 0.0)
        return build(task, privacy.noise_multiplier or calibrated(epsilon, privacy.epsilon))

    def clip_norm(self, task: AnyTask | None) -> float:
        """The L2 bound on what a device contributes to a sum of a task."""
        if self.privacy.noisy and isinstance(task, AnalyticTask):
            return self.analytic.clip_norm
        if isinstance(task, EvaluationTask):
            return task.norm
        return self.aggregation.clip_norm

    def _kinds(self, task: AnyTask | None) -> list[tuple[AnyTask | None, int]]:
        """Each kind of task of the federation, and its number of rounds; ``task`` is of one of them."""
        if task is None:
            return [(None, self.rounds)]
        config, labels = task.peft_config, task.labels
        found: list[tuple[AnyTask | None, int]] = []
        if self.training_rounds:
            found.append(
                (task if isinstance(task, Task) else self._training_task(config, labels, 0), self.training_rounds)
            )
        if self.analytic.rounds:
            found.append((self._analytic_task(config, labels), self.analytic.rounds))
        if self.evaluation.rounds:
            found.append((self._evaluation_task(config, labels), self.evaluation.rounds))
        return found

    @property
    def training_rounds(self) -> int:
        return self.rounds - self.analytic.rounds - self.evaluation.rounds

    def kind_of(self, number: int) -> type[AnyTask]:
        """The kind of task of a round, counted from 1: training first, then the head, then evaluation."""
        if number > self.rounds - self.evaluation.rounds:
            return EvaluationTask
        return AnalyticTask if number > self.training_rounds else Task

    def task_of(self, kind: type[AnyTask], manifest: VersionManifest) -> AnyTask:
        """The task of a round of that kind, of the adapter that ``manifest`` describes. Raises as ``task``."""
        if kind is EvaluationTask:
            return self._evaluation_task(manifest.peft_config, manifest.labels)
        return self.analytic_task(manifest) if kind is AnalyticTask else self.task(manifest)

    def with_evaluation(self, done: int, newest: str, previous: str) -> Self:
        """The settings with a round that compares two releases, after those that are still to do.

        A comparison that is still to do is replaced.

        Args:
            done: Rounds that ended.
            newest, previous: ``AdapterManifest.content`` of their adapters.

        Raises:
            ConfigError: The federation has groups.
        """
        table = self.model_dump(mode="json")
        waits = self.evaluation.rounds and done < self.rounds
        table["rounds"] = self.rounds if waits else max(self.rounds, done) + 1
        table["evaluation"] |= {"newest": newest, "previous": previous}
        if not waits:
            table["evaluation"]["rounds"] = 1
        return self.parse(table, SETTINGS)

    def _evaluation_task(self, config: PeftConfig, labels: tuple[str, ...]) -> EvaluationTask:
        own = self.evaluation
        return EvaluationTask(config, labels, own.newest, own.previous, own.most)

    def analytic_task(self, manifest: VersionManifest) -> AnalyticTask:
        """The task of a round that fits the head of the adapter that ``manifest`` describes."""
        return self._analytic_task(manifest.peft_config, manifest.labels)

    def _analytic_task(self, config: PeftConfig, labels: tuple[str, ...]) -> AnalyticTask:
        own = self.analytic
        return AnalyticTask(config, labels, own.ridge, own.scale, own.dimensions if self.privacy.noisy else 0)

    def rule(self, task: AnyTask) -> ServerOptimizer:
        """What makes the next adapter from the sum of a task."""
        if isinstance(task, EvaluationTask):
            return Evaluation()
        return AnalyticHead() if isinstance(task, AnalyticTask) else self.server.rule()

    def task(self, manifest: VersionManifest) -> Task:
        """The task of a round that trains the adapter that ``manifest`` describes.

        Raises:
            ConfigError: The method tells LoRA's matrices apart, and the adapter is of another kind.
        """
        return self._training_task(manifest.peft_config, manifest.labels, manifest.version)

    def _training_task(self, config: PeftConfig, labels: tuple[str, ...], version: int) -> Task:
        training, method = self.training, METHODS[self.method]
        if method.splits_factors and (config.peft_type != "LORA" or config.use_dora or config.bias != "none"):
            kind = "DoRA" if config.use_dora else "LoRA with biases" if config.bias != "none" else config.peft_type
            reason = f"method {self.method} trains LoRA's matrices apart from each other, and the adapter is {kind}"
            raise ConfigError(f"{reason}: choose fedit, fedper or head", about="method", value=self.method)
        return Task(
            peft_config=config,
            labels=labels,
            epochs=training.epochs,
            batch_size=training.batch_size,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            proximal=training.proximal,
            trained=method.trained(version),
            shared=method.shared,
            optimizer=OptimizerName(training.optimizer),
            momentum=training.momentum,
            schedule=RateSchedule(training.schedule),
            gradient_norm=training.gradient_norm,
        )
