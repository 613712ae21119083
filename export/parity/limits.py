"""How far an exported pair may be from torch, by profile and task: about twice as far as was measured.

docs/explanation/export.md has the measurements, the commands that repeat them, and the two exceptions from that margin.
"""

from dataclasses import dataclass
from math import inf

from adapters.manifest import Task
from aggregation.errors import ConfigError
from export.onnx.quantize import Profile


@dataclass(frozen=True, slots=True)
class Limits:
    """What ``parity.gate`` demands.

    A classifier is held to the largest difference of a probability, a language model to its perplexity: among tens of
    thousands of tokens the one largest difference says little.

    Raises:
        ConfigError: ``agreement`` is no share.
    """

    agreement: float  # least share of answers with the same most likely label or token, 0 to 1
    max_abs_diff: float = inf  # greatest difference of a label's probability
    perplexity_ratio: float = inf  # greatest perplexity, over torch's

    def __post_init__(self) -> None:
        if not 0 <= self.agreement <= 1:
            raise ConfigError(f"the minimum agreement {self.agreement} is not between 0 and 1")


LIMITS: dict[Task, dict[Profile, Limits]] = {
    "text-classification": {
        Profile.FP32: Limits(0.995, 0.01),
        Profile.NATIVE_INT8: Limits(0.965, 0.05),
        Profile.NATIVE_INT4: Limits(0.83, 0.35),
        Profile.WEB_INT8: Limits(0.95, 0.16),
    },
    "text-generation": {
        Profile.FP32: Limits(0.995, perplexity_ratio=1.001),
        Profile.NATIVE_INT8: Limits(0.9, perplexity_ratio=1.01),
        Profile.NATIVE_INT4: Limits(0.85, perplexity_ratio=1.1),
        Profile.WEB_INT8: Limits(0.7, perplexity_ratio=1.04),
    },
}


def limits_of(profile: str, task: Task) -> Limits:
    """The limits of a signed card's profile.

    Raises:
        ConfigError: This release knows no such profile.
    """
    try:
        return LIMITS[task][Profile(profile)]
    except ValueError:
        raise ConfigError(f"the bundle's profile {profile!r} has no limits here; export the base again") from None
