"""What a device's owner allows, in ``device.toml``: ``[policy]``, the limits within which it accepts an offer and
trains, and ``[eligibility]``, when it takes part.

Each key of ``[policy]`` is a limit of ``TrainingLimits``, or a field of ``aggregation.policy`` with its default, range
and meaning. Reading refuses unknown keys, and limits that protect nobody."""

import math
from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import Field, create_model, model_validator

from aggregation.errors import ConfigError, ProtocolError
from aggregation.policy import LIMITS, Policy
from aggregation.session import COORDINATOR
from aggregation.spec import Adversary
from client.training.control import TOKENS, UNLIMITED, TrainingControl
from edgeadapt.formats.layout import Tensors
from edgeadapt.formats.settings import Settings
from edgeadapt.rounds.roundtask import RoundTask
from edgeadapt.rounds.taskkinds import KINDS
from edgeadapt.rounds.tasklimits import TaskLimits

CONSENTS = frozenset(kind.CONSENT for kind in KINDS)


class TrainingLimits(TaskLimits):
    maximum_tokens: int = Field(default=TOKENS, ge=1)
    """most tokens of one pass over the base, with padding; a larger batch is trained in parts, which bounds the
    memory"""
    maximum_seconds: float = Field(default=0.0, ge=0)
    """longest training of a round, in seconds: it ends then with what it has; 0: any"""
    duty_cycle: float = Field(default=1.0, ge=0.01, le=1)
    """share of the time in which training computes: it pauses after each step, which saves a battery and keeps the
    device cool"""
    moments: bool = True
    """contribute the second moments of embeddings to a sum for an analytic head"""
    observations: bool = False
    """contribute what this device answered, if it counts that (edgeadapt device usage), to sums that have noise"""
    answer_quantum_seconds: float = Field(default=60.0, ge=0, le=86_400)
    """offers and plans are answered at a multiple of this time after they arrived, in seconds; 0: at once. The multiple
    still shows coarsely how long training took, unless this is above the longest"""

    def control(self, step: Callable[[], object] = UNLIMITED.step) -> TrainingControl:
        seconds, norm = self.maximum_seconds or math.inf, self.maximum_gradient_norm
        return TrainingControl(seconds, self.duty_cycle, norm, True, self.maximum_tokens, step=step)

    def check(self, task: RoundTask, adapter: Tensors) -> None:
        """Check a task as ``TaskLimits.check`` does, and that the owner contributes to rounds of its kind."""
        super().check(task, adapter)
        self.require_consent(task.CONSENT)

    def require_consent(self, what: str) -> None:
        """Check that the owner contributes ``what`` a coordinator asks for: ``RoundTask.CONSENT`` of some kind."""
        if what not in CONSENTS:
            raise ProtocolError("this device does not know what it should contribute", COORDINATOR, about="consent")
        if what and not getattr(self, what):
            raise ProtocolError(f"this device contributes no {what}", COORDINATOR, about=f"task.{what}")


SAFE = Policy()
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_TYPES: dict[str, Any] = get_type_hints(Policy) | {
    "known_bases": list[_Digest],
    "adversaries": Annotated[list[Literal["active", "honest-but-curious"]], Field(min_length=1)],
}


def _field(name: str) -> tuple[Any, Any]:
    meaning, *bounds = asdict(LIMITS[name]).values()
    default = [adversary.value for adversary in SAFE.adversaries] if name == "adversaries" else getattr(SAFE, name)
    default = sorted(default) if isinstance(default, frozenset) else default
    ranges: dict[str, Any] = dict(zip(("ge", "gt", "le", "lt"), bounds, strict=True))
    return _TYPES[name], Field(default=default, description=meaning, **ranges)


_FIELDS: dict[str, Any] = {field.name: _field(field.name) for field in fields(Policy)}
_Limits: Any = create_model("_Limits", __base__=TrainingLimits, **_FIELDS)


class PolicySettings(_Limits):
    """``[policy]``. The defaults are safe; docs/reference/device-policy.md says what weaker values cost."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        try:
            self.policy("0" * 64)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def policy(self, base_digest: str) -> Policy:
        """Make the policy of a device that has the base of this digest. Raises ConfigError: a limit is out of range, or
        contradicts another."""
        limits = {field.name: getattr(self, field.name) for field in fields(Policy)}
        bases = {base_digest} & set(self.known_bases) if self.known_bases else {base_digest}
        adversaries = frozenset(Adversary(name) for name in self.adversaries)
        return Policy(**limits | {"known_bases": frozenset(bases), "adversaries": adversaries})


class EligibilitySettings(Settings):
    """``[eligibility]``. Without a condition, the device takes part at any time."""

    idle: bool = False
    """only while other processes use less than a quarter of the processors' time"""
    charging: bool = False
    """only on external power"""
    unmetered: bool = False
    """only on a network connection that is not metered"""
    hours: str = Field(default="", pattern=r"^(([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d)?$")
    """only between these hours of local time, "22:00-06:00" for example"""
    minimum_battery: int = Field(default=0, ge=0, le=100)
    """only with this charge, in percent"""
    minimum_examples: int = Field(default=0, ge=0)
    """only with so many examples, of all splits"""
    minimum_separation_hours: float = Field(default=0.0, ge=0, le=8760)
    """only so long after the last round, in hours, into another session"""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        begin, _, end = self.hours.partition("-")
        if self.hours and begin == end:
            raise ValueError(f"hours {self.hours} are none, or all: leave them out for all")
        return self
