"""What a federation is told: how many rounds, which devices are enough, how the server moves, what devices train."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.layout import Layout
from adapters.manifest import VersionManifest
from adapters.task import Task, contribution_spec
from aggregation import graph
from aggregation.errors import ConfigError
from aggregation.graph import GraphParameters
from aggregation.spec import CORRUPT_FRACTION, Adversary, SessionSpec
from coordinator.optimizer import FedAdam, FedAvg

SETTINGS = "federation.json"  # in the coordinator's state directory


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Training(_Section):
    """What a device does in a round."""

    epochs: int = Field(default=1, ge=1, le=100, description="passes over the device's examples in a round")
    batch_size: int = Field(default=16, ge=1, le=1024, description="examples a step")
    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="of AdamW")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="of AdamW")

    def task(self, manifest: VersionManifest, seed: int) -> Task:
        """The task for the adapter that ``manifest`` describes."""
        return Task(
            method=manifest.method,
            labels=manifest.labels,
            epochs=self.epochs,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            seed=seed,
        )


class Server(_Section):
    """The server's step on the mean delta."""

    optimizer: Literal["fedavg", "fedadam"] = Field(default="fedavg", description="rule of the server's step")
    learning_rate: float = Field(default=1.0, gt=0, description="of the server's step")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="FedAdam: decay of the first moment")
    beta2: float = Field(default=0.99, ge=0, lt=1, description="FedAdam: decay of the second moment")
    tau: float = Field(default=1e-3, gt=0, description="FedAdam: adaptivity, added to the root of the second moment")

    def rule(self) -> FedAvg | FedAdam:
        """The optimizer's settings as its own type."""
        if self.optimizer == "fedavg":
            return FedAvg(self.learning_rate)
        return FedAdam(self.learning_rate, self.beta1, self.beta2, self.tau)


class Aggregation(_Section):
    """Secure aggregation: the adversary it must withstand and the numbers in the offer."""

    adversary: Literal["active", "honest-but-curious"] = Field(
        default="active",
        description="what the coordinator is held capable of; a device's own policy may refuse the weaker",
    )
    session_rounds: int = Field(default=4, ge=1, le=64, description="rounds a set of keys serves")
    minimum_devices: int = Field(default=3, ge=3, description="fewest devices a session may have")
    minimum_survivors: float = Field(
        default=0.5, gt=0, le=1, description="share of the cohort that must survive a round; never below the threshold"
    )
    corrupt_fraction: float = Field(
        default=CORRUPT_FRACTION,
        ge=0,
        lt=1,
        description="share of the cohort that may side with the coordinator; a device's policy has its own",
    )
    lost_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of the cohort lost while a session is made, and as many again in a round; for sparse graphs",
    )
    clip_norm: float = Field(default=12.0, gt=0, description="largest L2 norm of a device's delta, in weight units")
    weight_cap: int = Field(default=128, ge=1, le=65536, description="largest weight of one device, in examples")
    ring_bits: int = Field(default=22, ge=16, le=62, description="bits an element on the wire")
    keep_masked_inputs: bool = Field(
        default=False,
        description="keep every masked update in the transcript, so that an auditor can add up the sums again; "
        "takes disk space: devices × rounds × upload",
    )

    def spec(self, devices: int, layout: Layout, base_digest: str, rounds: int) -> SessionSpec:
        """The session of a cohort of ``devices``.

        Raises:
            ConfigError: The ring cannot hold the sum of so many devices.
        """
        vector = contribution_spec(
            layout,
            clip_norm=self.clip_norm,
            weight_cap=self.weight_cap,
            ring_bits=self.ring_bits,
            max_clients=devices,
        )
        degree, threshold = self.masking_graph(devices)
        # Of an active session so many that no two groups of survivors could agree on different sets.
        fewest = graph.quorum(devices, self.corrupt_fraction) if self.adversary == Adversary.ACTIVE.value else threshold
        return SessionSpec(
            rounds=rounds,
            threshold=threshold,
            minimum_survivors=max(fewest, round(self.minimum_survivors * devices)),
            degree=degree,
            vector=vector,
            clip_norm=self.clip_norm,
            weight_cap=self.weight_cap,
            privacy="none",
            base_digest=base_digest,
            layout_digest=layout.digest,
            adversary=Adversary(self.adversary),
        )

    def masking_graph(self, devices: int) -> GraphParameters:
        """Neighbours of a device and shares that open its secrets, in a cohort of ``devices``.

        A sparse graph must still hold on the roster, which lacks those who were lost before it and no corrupt one.
        Where so small a roster would be no larger than ``graph.COMPLETE_UP_TO``, everyone is everyone's neighbour.

        Raises:
            ConfigError: No graph on so many devices withstands so many corrupt and lost ones.
        """
        corrupt, lost = (graph.count_of(devices, share) for share in (self.corrupt_fraction, self.lost_fraction))
        if devices - lost <= graph.COMPLETE_UP_TO:
            return GraphParameters(devices - 1, graph.quorum(devices, self.corrupt_fraction))
        bits = graph.SIGMA + (graph.GRINDING if self.adversary == Adversary.ACTIVE.value else 0)
        smallest = devices - lost
        for count in range(smallest, devices + 1):
            found = graph.graph_parameters(count, corrupt / count, lost / count, bits=bits)
            if all(graph.is_secure(present, corrupt, *found, bits) for present in (smallest, devices)):
                return found
        raise ConfigError(f"no graph on {devices} devices withstands {corrupt} corrupt and {lost} lost ones")


class FederationSettings(_Section):
    """``federation.json`` in the coordinator's home."""

    rounds: int = Field(default=10, ge=1, le=100_000, description="rounds of training")
    seed: int = Field(
        default=0,
        ge=0,
        description="of the order in which devices visit their examples; a scenario's own seed replaces it",
    )
    deadline: float = Field(default=600.0, gt=0, description="seconds a device has for one answer")
    attempts: int = Field(default=3, ge=1, description="times a session is tried before the run gives up")
    training: Training = Training()
    server: Server = Server()
    aggregation: Aggregation = Aggregation()

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            ConfigError: Missing, not JSON, an unknown key, or a value out of range.
        """
        try:
            return cls.model_validate_json(path.read_bytes(), strict=True)
        except FileNotFoundError as error:
            raise ConfigError(
                f"{path.parent} is not a coordinator's state directory: it has no {path.name}", about=path.name
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            place = [".".join(map(str, first["loc"]))] if first["loc"] else []
            raise ConfigError(": ".join([str(path), *place, first["msg"]])) from error
