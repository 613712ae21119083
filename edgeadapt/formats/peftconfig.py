"""The PEFT config of an adapter: what ``peft`` and the exporter need to rebuild its modules and to scale its updates.

The patterns mean what peft's ``rank_pattern`` and ``alpha_pattern`` mean: regular expressions for the end of a layer's
path, of which the first that matches counts. Those that could take forever are refused. A property test holds this file
to peft itself (``tests/edgeadapt/methods/peft/test_folder.py``)."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Annotated, Final, Literal, Self, TypeVar

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from aggregation.errors import ConfigError, DataError
from edgeadapt.formats.jsontext import Exact

Rank = Annotated[int, Field(ge=0, lt=2**63)]
Alpha = Rank | Annotated[float, Field(ge=0, lt=2**63)]  # a whole number to peft's types, any number in its files
Pattern = Annotated[str, Field(min_length=1, max_length=512)]
# Sets within sets and word boundaries, which Python and the engine that is used read differently.
LAYER = re.compile(r".*\.[^.]*\.(\d{1,9})\.", re.ASCII)
OTHERWISE = re.compile(r"\[[^]]*\[|--|&&|~~|\\[<>]|\\[bB]\{")
# A coordinator names them, and a device makes room for them before it sees the adapter's layout.
MAX_RANK = 1024
MAX_LOHA_RANK = math.isqrt(MAX_RANK)  # a graph has its update as LoRA of the squared rank
MAX_VIRTUAL_TOKENS = 1024
MAX_LAYERS = 1024
V = TypeVar("V")

# As peft names them, which has no bottleneck adapters (``edgeadapt.formats.graphinputs.ACTIVATIONS``).
Method = Literal[
    "LORA", "ADALORA", "LOHA", "VERA", "IA3", "LN_TUNING", "BEFT", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "OWN",
    "BOTTLENECK", "BOTTLENECK_RELU", "BOTTLENECK_GELU",
]  # fmt: skip
BOTTLENECKS: tuple[Method, ...] = ("BOTTLENECK", "BOTTLENECK_RELU", "BOTTLENECK_GELU")
OWN: Final = "OWN"  # none of PEFT's: all parameters of a model with its own training loop
# As scenarios and commands name what can be trained from the start: LoRA with each of its scalings is a method there.
MethodName = Literal[
    "lora", "rslora", "dora", "adalora", "loha", "vera", "ia3", "ln_tuning", "beft", "prompt_tuning", "prefix_tuning",
    "bottleneck", "bottleneck_relu", "bottleneck_gelu",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class PeftConfig(Exact):
    """Names the method of an adapter, and the layers at which it is, as ``target_modules`` name them.

    ``LORA`` is low-rank adaptation (Hu et al. 2021). ``ADALORA`` (Zhang et al. 2023), ``LOHA`` (Hyeon-Woo et al. 2022)
    and ``VERA`` (Kopiczko et al. 2024) have updates of low rank as well (``edgeadapt.methods.peft.lowrank``); ``r`` is
    AdaLoRA's ``init_r``, ``lora_alpha`` is LoHa's ``alpha``, and VeRA has none. The other methods have vectors only,
    whose values say everything: ``IA3`` scales activations (Liu et al. 2022), ``LN_TUNING`` replaces the parameters of
    normalizations (Zhao et al. 2023), ``BEFT`` adds to biases. ``BOTTLENECK`` and those with another activation are of
    rank ``r`` (``edgeadapt.methods.bottleneck``). ``PROMPT_TUNING`` (Lester et al. 2021) and ``P_TUNING``
    (Liu et al. 2021) have embeddings of virtual tokens, ``PREFIX_TUNING`` (Li and Liang 2021) has their keys and
    values; they are at no layer. Methods without low rank have rank and alpha 0. The fields are those of peft's own
    configurations."""

    peft_type: Method
    r: Rank
    lora_alpha: Alpha
    target_modules: tuple[str, ...]
    # Pairs, not dictionaries: the first pattern that matches counts, and a signed JSON object has no order.
    rank_pattern: tuple[tuple[Pattern, Rank], ...] = ()
    alpha_pattern: tuple[tuple[Pattern, Alpha], ...] = ()
    use_rslora: bool = False  # scaling is alpha / sqrt(rank), not alpha / rank (Kalajdzievski 2023)
    use_dora: bool = False  # weights are split into magnitude and direction (Liu et al. 2024)
    feedforward_modules: tuple[str, ...] = ()  # of IA3: those of the targets whose input is scaled, not their output
    num_virtual_tokens: Rank = 0
    # Which of the base's biases LoRA trains besides (BitFit, Ben Zaken et al. 2022): "all", or those of its targets.
    bias: Literal["none", "all", "lora_only"] = "none"
    layers_to_transform: tuple[Rank, ...] = ()  # numbers of the layers whose targets are adapted, ascending; (): all

    @classmethod
    def lora(cls, rank: int = 8, alpha: int = 16, targets: Sequence[str] = ("query", "value")) -> Self:
        """Configure plain LoRA: ``y = W x + (alpha / rank) B A x`` at the layers that ``targets`` name."""
        return cls("LORA", rank, alpha, tuple(targets))

    def rank_of(self, path: str) -> int:
        """Return the rank of the layer at ``path`` in the base's module tree. Raises as ``scaling_of``."""
        return _matching(self.rank_pattern, path, self.r)

    def alpha_of(self, path: str) -> float:
        """Return the alpha of the layer at ``path``. Raises as ``scaling_of``."""
        return _matching(self.alpha_pattern, path, self.lora_alpha)

    def scaling_of(self, path: str) -> float:
        """Return the factor of the update of the layer at ``path``. Raises DataError: a pattern is not a regular
        expression, or needs look-around or back references; or the layer has rank 0."""
        rank, alpha = self.rank_of(path), self.alpha_of(path)
        if rank < 1:
            raise DataError(f"the adapter's configuration gives {path!r} rank 0, which has no scaling", about=path)
        return alpha / rank**0.5 if self.use_rslora else alpha / rank


SETTINGS = {field.name for field in fields(PeftConfig)} - {"peft_type"}
OFF = (0, (), "none")
AT_LAYERS, VIRTUAL = frozenset({"target_modules", "layers_to_transform"}), frozenset({"num_virtual_tokens"})
TRAINABLE: Mapping[Method, frozenset[str]] = {  # method → the settings with which it can be trained
    "LORA": AT_LAYERS | {"r", "lora_alpha", "use_rslora", "use_dora", "bias"},
    "ADALORA": AT_LAYERS | {"r", "lora_alpha"},
    "LOHA": AT_LAYERS | {"r", "lora_alpha"},
    "VERA": AT_LAYERS | {"r"},
    "IA3": AT_LAYERS | {"feedforward_modules"},
    "LN_TUNING": AT_LAYERS,
    "BEFT": AT_LAYERS,
    **dict.fromkeys(BOTTLENECKS, AT_LAYERS | {"r"}),
    "PROMPT_TUNING": VIRTUAL,
    "P_TUNING": VIRTUAL,
    "PREFIX_TUNING": VIRTUAL,
    "OWN": frozenset(),
}


def require_trainable(config: PeftConfig) -> None:
    """Check that an adapter of this configuration can be trained here.

    A device builds what a coordinator names. So modules are named in plain words, without patterns, which run as long
    as they like; sizes are bounded; and a setting that the method does not read is refused, because training something
    else would go unnoticed. Raises ConfigError: it cannot; ``about`` names the setting."""
    method = config.peft_type
    for name in sorted(SETTINGS - TRAINABLE[method]):  # the same refusal in every process
        if (value := getattr(config, name)) not in OFF:
            raise _untrainable(name, value, f"{method} without {name}")
    if "target_modules" in TRAINABLE[method]:
        if not config.target_modules:
            raise _untrainable("target_modules", (), f"{method} of at least one target module")
    elif TRAINABLE[method] and not 1 <= config.num_virtual_tokens <= MAX_VIRTUAL_TOKENS:
        wanted = f"{method} of 1 to {MAX_VIRTUAL_TOKENS} virtual tokens"
        raise _untrainable("num_virtual_tokens", config.num_virtual_tokens, wanted)
    largest = MAX_LOHA_RANK if method == "LOHA" else MAX_RANK
    if "r" in TRAINABLE[method] and not 1 <= config.r <= largest:
        raise _untrainable("r", config.r, f"{method} of a rank of 1 to {largest}")
    whole = isinstance(config.lora_alpha, int) and config.lora_alpha >= 1
    if "lora_alpha" in TRAINABLE[method] and not whole:
        raise _untrainable("lora_alpha", config.lora_alpha, f"{method} of a whole alpha of at least 1")
    if (numbers := config.layers_to_transform) != tuple(sorted({n for n in numbers if n < MAX_LAYERS})):
        wanted = f"layers by ascending numbers below {MAX_LAYERS}"
        raise _untrainable("layers_to_transform", numbers, wanted)
    if numbers and config.bias == "all":
        raise _untrainable("bias", "all", "biases of all layers only where all layers are adapted")
    if odd := sorted(set(config.feedforward_modules) - set(config.target_modules)):
        raise _untrainable("feedforward_modules", odd, "IA3 whose feedforward_modules are among its target_modules")


def require_gradients(config: PeftConfig) -> None:
    """Check that a training graph can train it: no biases of the base with LoRA. Raises ConfigError."""
    if config.bias != "none":
        raise ConfigError(
            f"a training graph trains no biases with LoRA, bias is {config.bias!r}: set it to 'none', or add to biases "
            "with BEFT, or install the extra train",
            about="task.peft_config",
        )


def layer_number(path: str) -> int | None:
    """Read the number of the layer that a module is in, as peft does; None outside of layers.

    >>> layer_number("encoder.layer.11.output.dense"), layer_number("embeddings.norm")
    (11, None)
    """
    inner = LAYER.match(path)
    return int(inner[1]) if inner else None


def exactly(path: str) -> str:
    """Return the pattern that matches ``path`` and nothing else.

    >>> exactly("layers.0.q_proj")
    '^layers\\\\.0\\\\.q_proj'
    """
    return "^" + re.escape(path)


def _untrainable(name: str, value: object, wanted: str) -> ConfigError:
    return ConfigError(f"{name} is {value!r:.80}; devices train {wanted}", about=name)


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
    """Return a type that accepts the paths whose end matches ``pattern``. Patterns come from folders of strangers. For
    a pattern of a few characters, Python's engine can run for years; pydantic's needs a time in proportion to the path,
    and has no look-around and no back references."""
    whole = rf"(.*\.)?({pattern})$"
    try:
        re.compile(whole)  # peft refuses it too
    except (re.error, OverflowError, RecursionError) as error:
        reason = f"the adapter's pattern {pattern[:40]!r} is not a regular expression: {error}"
        raise DataError(reason, about="pattern") from error
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
    )
