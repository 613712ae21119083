"""The PEFT config of an adapter: what ``peft`` and the exporter need to rebuild its modules and to scale its updates.

The patterns mean what they mean to peft (``rank_pattern`` and ``alpha_pattern`` of its ``LoraConfig``): regular
expressions for the end of a layer's path, of which the first that matches counts. Those that could take forever are
refused. A property test holds this file to peft itself (``tests/adapters/peft/test_folder.py``).
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError

from aggregation.errors import ConfigError, DataError

Rank = Annotated[int, Field(ge=0, lt=2**63)]
Alpha = Rank | Annotated[float, Field(ge=0, lt=2**63)]  # a whole number to peft's types, any number in its files
Pattern = Annotated[str, Field(min_length=1, max_length=512)]
# Sets within sets and word boundaries, which Python and the engine that is used read differently.
OTHERWISE = re.compile(r"\[[^]]*\[|--|&&|~~|\\[<>]|\\[bB]\{")
MAX_RANK = 1024  # a coordinator names the rank, and a device makes room for it before it sees the adapter's layout
V = TypeVar("V")


Method = Literal["LORA", "IA3", "LN_TUNING", "BEFT", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"]  # as peft names them


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The method of an adapter, and the layers at which it is, as ``target_modules`` name them.

    ``LORA`` is low-rank adaptation (Hu et al. 2021). The other methods have vectors only, whose values say everything:
    ``IA3`` scales activations (Liu et al. 2022), ``LN_TUNING`` replaces the parameters of normalizations (Zhao et al.
    2023), ``BEFT`` adds to biases. ``PROMPT_TUNING`` (Lester et al. 2021) and ``P_TUNING`` (Liu et al. 2021) have
    embeddings of virtual tokens, ``PREFIX_TUNING`` (Li and Liang 2021) has their keys and values; they are at no layer.
    For all these, rank and alpha are 0.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    peft_type: Method
    r: Rank
    lora_alpha: Alpha
    target_modules: tuple[str, ...]
    # Pairs, not dictionaries: the first pattern that matches counts, and a signed JSON object has no order.
    rank_pattern: tuple[tuple[Pattern, Rank], ...] = ()
    alpha_pattern: tuple[tuple[Pattern, Alpha], ...] = ()
    use_rslora: bool = False  # scaling is alpha / sqrt(rank), not alpha / rank (Kalajdzievski 2023)

    def rank_of(self, path: str) -> int:
        """The rank of the layer at ``path``, its place in the base's module tree. Raises as ``scaling_of``."""
        return _matching(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """The alpha of the layer at ``path``. Raises as ``scaling_of``."""
        return _matching(self.alpha_pattern, path, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """The factor of the update of the layer at ``path``.

        Raises:
            DataError: A pattern is no regular expression, or needs look-around or back references; or the layer has
                rank 0.
        """
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        if rank < 1:
            raise DataError(f"the adapter's configuration gives {path!r} rank 0, which has no scaling", about=path)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


@dataclass(frozen=True, slots=True)
class LoraSpec:
    """Low-rank adaptation of the encoder (Hu et al. 2021): ``y = W x + (alpha / rank) B A x``."""

    rank: int = 8
    alpha: int = 16
    targets: tuple[str, ...] = ("query", "value")

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= MAX_RANK or self.alpha < 1 or not self.targets:
            raise ConfigError(
                f"LoRA needs a rank of 1 to {MAX_RANK}, an alpha of at least 1 and a target module", about="lora"
            )

    @classmethod
    def of(cls, config: PeftConfig) -> Self:
        """What a manifest or a task says, if every layer has one rank and one scaling, ``alpha / rank``.

        Raises:
            ConfigError: It says more, or what cannot be built. Training something else would go unnoticed.
        """
        plain = PeftConfig("LORA", config.r, config.lora_alpha, config.target_modules)
        if config != plain or not isinstance(config.lora_alpha, int):
            raise ConfigError(
                "the adapter has patterns or a scaling of its own; only plain LoRA can be trained here",
                about="peft_config",
            )
        return cls(config.r, config.lora_alpha, config.target_modules)


def _matching(patterns: tuple[tuple[str, V], ...], path: str, default: V) -> V:
    for pattern, value in patterns:
        try:
            _ending(pattern).validate_python(path)
        except ValidationError:
            continue
        return value
    return default


@lru_cache(maxsize=1024)
def _ending(pattern: str) -> TypeAdapter[str]:
    """A type that accepts the paths whose end matches ``pattern``.

    Patterns come from folders of strangers. For a pattern of a few characters, Python's engine can run for years;
    pydantic's needs a time in proportion to the path, and has no look-around and no back references.
    """
    whole = rf"(.*\.)?({pattern})$"
    try:
        re.compile(whole)  # peft refuses it too
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError(
            f"the adapter's pattern {pattern[:40]!r} is no regular expression: {error}", about="pattern", value=pattern
        ) from error
    if OTHERWISE.search(pattern):
        raise _refusal(pattern)
    try:
        return TypeAdapter(Annotated[str, StringConstraints(pattern=f"^(?:{whole})")])
    except Exception as error:  # of a class of its core that pydantic does not export
        raise _refusal(pattern) from error


def _refusal(pattern: str) -> DataError:
    return DataError(
        f"the adapter's pattern {pattern[:40]!r} cannot be matched here: name the layers in plain words, without "
        "look-around, back references or sets within sets",
        about="pattern",
        value=pattern,
    )
