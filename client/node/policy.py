"""The ``[policy]`` table of ``device.toml``: the limits within which a device accepts an offer and trains.

Each key is a limit of ``edgeadapt.rounds.tasklimits`` or ``client.training.limits``, or a field of
``aggregation.policy`` with its default, range and meaning. Reading refuses unknown keys, and limits that protect
nobody.
"""

from dataclasses import asdict, fields
from typing import Annotated, Any, Literal, Self, get_type_hints

from pydantic import Field, create_model, model_validator

from aggregation.errors import ConfigError
from aggregation.policy import LIMITS, Policy
from aggregation.spec import Adversary
from client.training.limits import TrainingLimits

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
        """Make the policy of a device that has the base of this digest.

        Raises ConfigError: a limit is out of range, or contradicts another.
        """
        limits = {field.name: getattr(self, field.name) for field in fields(Policy)}
        bases = {base_digest} & set(self.known_bases) if self.known_bases else {base_digest}
        adversaries = frozenset(Adversary(name) for name in self.adversaries)
        return Policy(**limits | {"known_bases": frozenset(bases), "adversaries": adversaries})
